"""Names made and removed as the kernel's ext4 does it: the same errno for each call, the same tree in the end."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from fusewire.ext4 import inode, inodestore, namestore, newinode, rename
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.newinode import Caller
from tests.ext4.driver import Editor, image, new_path
from tests.ext4.twins import (
    FORMS,
    ROOT,
    KernelSide,
    Operation,
    OurSide,
    compare,
    kernel_side,
    name_of,
    script,
    tree,
)
from tests.ext4.writer import Writer

KINDS = script("""
    create file; create file; create file/below; create none/below; mkdir d 02755; mkdir d; mkdir file;
    mkdir d/n*255; mkdir d/n*256; create setuid 06711; create d/n*256; create .; mkdir d/..; mknod char 020600 1 3;
    mknod wide 020600 300 5; mknod block 060640 8 74565; mknod zero 060640 0 0; mknod fifo 010666;
    mknod socket 0140666; mknod regular 0100666; mknod untyped 0444; mknod x 040444; mknod x 0170444;
    mknod file 010666; symlink link0 ''; symlink link1 t; symlink link59 t*59; symlink link60 t*60;
    symlink link61 t*61; symlink link1023 t*1023; symlink link1024 t*1024; symlink link2047 t*2047;
    symlink link2048 t*2048; symlink link4095 t*4095; symlink file x; symlink d/n*256 x; symlink none/x x;
    link file d/hard; link file d/hard; link d hard; link file file; link link60 hardlink; link fifo hardfifo;
    link none x; link file none/x; link file d/n*256; unlink d; unlink none; unlink d/hard; unlink d/n*256;
    unlink file/x; rmdir d; rmdir file; rmdir none; rmdir d/n*255; rmdir d/.; mkdir d/e; rmdir d/e/..; rmdir d/e;
    rmdir d; unlink link1023; tmpfile '' -; tmpfile '' tmp; tmpfile '' tmp; tmpfile tmp -; tmpfile none -; unlink tmp;
    tmpfile '' tmp 04640
""")

SGID = script("""
    mkdir g; chown g 0 55; chmod g 02775; create g/file 02711; mkdir g/sub 01770; mkdir g/sub/below;
    symlink g/link x; tmpfile g g/tmp; mknod g/fifo 010666; create g/sub/plain
""")

FLAGS = script("""
    mkdir im; create im/f; mkdir im/d; create file; create fixed; flags im 0x10; flags fixed 0x10; create im/x;
    create im/f; mkdir im/x; mkdir im/d; symlink im/x t; mknod im/x 010600; link file im/x; tmpfile im -;
    unlink im/f; unlink im/none; rmdir im/d; rmdir im; rename im/f x; rename im/f im/f; rename file im/x;
    rename file im/f; rename file im/f 2; rename im x; create im/d/x; unlink fixed; link fixed x; rename fixed x;
    rename file fixed; rename file fixed 2; rename fixed file 2; mkdir ap; create ap/f; mkdir ap/d; create grows;
    flags ap 0x20; flags grows 0x20; create ap/x; mkdir ap/y; link file ap/z; tmpfile ap ap/t; unlink ap/f;
    rmdir ap/d; rename ap/f x; rename ap/f ap/x2; rename file ap/moved; rename fixed ap/f; create other;
    rename other ap/f; rename other ap/f 2; unlink grows; link grows x; rename grows x; rename other grows;
    mkdir fl; flags fl 0x300c8; create fl/f; mkdir fl/d; symlink fl/l x; symlink fl/l2 x*70; tmpfile fl fl/t;
    mknod fl/p 010644; create fl/d/f
""")

PROJECTS = script("""
    mkdir p; project p 77 1; create p/f; mkdir p/d; create p/d/f; create file; link file p/x; rename file p/x;
    rename file p/f; rename file p/f 1; rename file p/f 2; rename p/f file 2; link p/f out; rename p/f out2;
    rename p/d outd; rename out2 p/f; tmpfile p p/t; symlink p/l x; rename p/l p/d2
""")

ACLS = [*script("mkdir acl"), ("setxattr", b"acl", b"system.posix_acl_default", bytes.fromhex(
    "02000000 01000700ffffffff 0200060063000000 04000500ffffffff 10000700ffffffff 20000500ffffffff")), *script("""
    create acl/f 0666; mkdir acl/d 0777; symlink acl/l x; tmpfile acl acl/t 0640; mknod acl/p 010640; create acl/d/below
""")]
MANY: list[Operation] = [
    ("mkdir", b"d"),
    *[("create", b"d/long%03d" % number + b"x" * 150) for number in range(90)],
    *[("rename", b"d/long%03d" % number + b"x" * 150, b"d/other%03d" % number + b"y" * 150)
      for number in range(0, 90, 3)],
    *[("unlink", b"d/long%03d" % number + b"x" * 150) for number in range(1, 90, 3)],
    *[("mkdir", b"d/sub%03d" % number) for number in range(30)],
    *[("rmdir", b"d/sub%03d" % number) for number in range(0, 30, 2)],
    ("rmdir", b"d"),
]
# whether the subject's operations are all ours: the others' changes have versions of their own
SUBJECTS = {"kinds": (KINDS, True), "sgid": (SGID, False), "acls": (ACLS, False), "flags": (FLAGS, False),
            "many": (MANY, True)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_as_the_kernel_does(mounts: None, form: str, subject: str) -> None:
    operations, versions = SUBJECTS[subject]
    compare(form, operations, versions)


def test_a_project_is_inherited_and_not_left() -> None:
    """This kernel's ext4 may lack project ids, so the rules of its documentation stand here."""
    with Writer(image("-t ext4 -O project -I 256", 16384)) as writer:
        side = OurSide(writer)
        refused = {operation[:3] for operation in PROJECTS if side.do(operation) == errno.EXDEV}
        expected = [("link", b"file", b"p/x"), ("rename", b"file", b"p/x"), ("rename", b"file", b"p/f"),
                    ("rename", b"p/f", b"file")]
        assert refused == {*expected}
        writer.check()
        projects = {path: found.project for path, found in writer.tree() if found.project}
        assert projects == dict.fromkeys([b"/p", b"/p/f", b"/p/d2", b"/p/t", b"/outd", b"/outd/f", b"/out"], 77)
        assert writer.at("/outd").flags & inode.FLAG_PROJINHERIT
        assert not writer.at("/p/t").flags & inode.FLAG_PROJINHERIT


# ---- limits ---------------------------------------------------------------------------------------------------------

def with_links(writer: Writer, path: str, links: int) -> None:
    """Let an inode of a path claim so many links."""
    writer.change(lambda tx: inodestore.change(tx, writer.at(path), links=links))


def test_a_file_has_65000_names_at_most() -> None:
    with Writer(image("-t ext4", 16384)) as writer:
        side = OurSide(writer)
        assert side.do(("create", b"f")) == 0
        with_links(writer, "/f", namestore.MAX_LINKS - 1)
        assert side.do(("link", b"f", b"last")) == 0
        assert name_of(side.do(("link", b"f", b"more"))) == "EMLINK"
        assert writer.at("/f").links == namestore.MAX_LINKS


def fill(side: KernelSide | OurSide, kind: str, most: int = 3000) -> tuple[int, str]:
    """How many of a kind there is room for in directory "d", and the errno after that."""
    for number in range(most):
        name = b"d/%s%05d" % (kind.encode(), number) + b"x" * 200
        target = (b"t" * (100 if number % 3 else 10),) if kind == "symlink" else ()
        answer = side.do((kind, name, *target))
        if answer:
            return number, name_of(answer)
    raise AssertionError("the disk was never full")


@pytest.mark.parametrize("form", ["-t ext4 -N 64", "-t ext4 -N 2048 -O ^has_journal",
                                  "-t ext3 -N 2048 -O ^has_journal -m 0", "-t ext4 -b 4096 -N 4096 -O ^has_journal"])
def test_a_disk_is_full_when_the_kernel_finds_it_full(mounts: None, form: str) -> None:
    source = image(form, 2048)
    theirs = Path(shutil.copy(source, new_path()))
    with Writer(source) as writer:
        ours = OurSide(writer)
        with kernel_side(theirs) as kernel:
            kernel.hurried = True
            for operation in script("mkdir d; mkdir e; rmdir e"):
                assert kernel.do(operation) == ours.do(operation) == 0
            kinds = "symlink", "mkdir", "create"
            assert [fill(ours, kind) for kind in kinds] == [fill(kernel, kind) for kind in kinds]
        writer.check()


def test_a_full_disk_leaves_no_trace() -> None:
    """Whatever an operation needs last is what is missing: inodes, blocks of a directory, of a link."""
    with Writer(image("-t ext4 -N 64 -O ^has_journal", 512)) as writer:
        side = OurSide(writer)
        assert side.do(("mkdir", b"d")) == 0
        filled = 0
        while (answer := side.do(("create", b"d/" + b"%03d" % filled + b"n" * 240))) == 0:
            filled += 1
        assert answer == errno.ENOSPC
        assert writer.fs.writing is not None
        assert writer.fs.writing.free_inodes == 0
        before = tree(writer, None)
        whiteout = f"rename d/000n*240 x {rename.WHITEOUT}"
        for operation in script(f"mkdir x; symlink x t*80; tmpfile ''; mknod x 010600; {whiteout}"):
            assert name_of(side.do(operation)) == "ENOSPC", operation
        assert tree(writer, None) == before
        writer.check()


def test_a_directory_that_cannot_grow_leaves_no_trace() -> None:
    with Writer(image("-t ext4 -m 0 -N 512 -O ^has_journal,^resize_inode", 512)) as writer:
        side = OurSide(writer)
        answers, number = [], 0
        assert side.do(("mkdir", b"d")) == 0
        while side.do(("symlink", b"link%d" % number, b"t" * 100)) == 0:
            number += 1
        assert writer.fs.writing is not None
        free = writer.fs.writing.free_inodes
        for index in range(6):
            answers.append(name_of(side.do(("create", b"d/" + b"%03d" % index + b"n" * 240))))
        assert answers[0] == "0"
        assert answers[-1] == "ENOSPC"
        assert writer.fs.writing.free_inodes == free - answers.count("0")
        assert name_of(side.do(("mkdir", b"more"))) == "ENOSPC"
        writer.check()


# ---- broken disks, and calls that no kernel makes -------------------------------------------------------------------

def test_a_name_may_not_lead_to_its_directory_or_to_the_root() -> None:
    editor = Editor(image("-t ext4", 4096, commands=("mkdir /d", "mkdir /d/e", "mkdir /d/f")))
    number = editor.number("/d")
    with editor.dir_block(number) as raw:
        for name, target in ((b"e", 2), (b"f", number)):
            at = raw.index(b"\x01\x02" + name) - 6
            raw[at:at + 4] = target.to_bytes(4, "little")
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        for name in (b"d/e", b"d/f"):
            for operation in ("rmdir", name), ("unlink", name), ("rename", name, b"x"), ("rename", b"lost+found", name):
                with pytest.raises(Corrupt) as caught:
                    OurSide(writer).do(operation)
                assert caught.value.check is Check.DIRENT_INODE


def test_names_that_no_kernel_sends_are_refused() -> None:
    with Writer(image("-t ext4", 4096)) as writer:
        for name, expected in ((b"", errno.ENOENT), (b"a/b", errno.EINVAL), (b"a\0b", errno.EINVAL),
                               (b".", errno.EEXIST), (b"..", errno.EEXIST), (b"n" * 256, errno.ENAMETOOLONG)):
            with pytest.raises(Refused) as caught:
                writer.change(lambda tx, name=name: namestore.create(tx, tx.inode(2), name, 0o644, ROOT))
            assert caught.value.errno == expected, name
        with pytest.raises(Refused) as caught:
            writer.change(lambda tx: namestore.symlink(tx, tx.inode(2), b"l", b"a\0b", ROOT))
        assert caught.value.errno == errno.EINVAL


def test_nothing_is_made_in_a_directory_that_was_removed() -> None:
    with Writer(image("-t ext4", 4096)) as writer:
        side = OurSide(writer, release=False)
        assert side.do(("mkdir", b"d")) == side.do(("create", b"f")) == 0
        number = writer.at("/d").number
        assert side.do(("rmdir", b"d")) == 0
        source = writer.at("/f")
        calls = [lambda tx, d: namestore.create(tx, d, b"x", 0o644, ROOT),
                 lambda tx, d: namestore.mkdir(tx, d, b"x", 0o755, ROOT),
                 lambda tx, d: namestore.symlink(tx, d, b"x", b"t", ROOT),
                 lambda tx, d: namestore.tmpfile(tx, d, 0o644, ROOT),
                 lambda tx, d: namestore.link(tx, source, d, b"x"),
                 lambda tx, d: rename.rename(tx, tx.inode(2), b"f", d, b"x"),
                 lambda tx, d: namestore.unlink(tx, d, b"x")]
        for call in calls:
            with pytest.raises(Refused) as caught:
                writer.change(lambda tx, call=call: call(tx, tx.inode(number)))
            assert caught.value.errno == errno.ENOENT
        side.free(number)
        writer.check()


def test_new_inodes_belong_to_their_creator() -> None:
    with Writer(image("-t ext4", 4096)) as writer:
        caller = Caller(70000, 80000, 0o027)
        made = [writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"f", 0o666, caller)),
                writer.change(lambda tx: namestore.mkdir(tx, tx.inode(2), b"d", 0o777, caller)),
                writer.change(lambda tx: namestore.symlink(tx, tx.inode(2), b"l", b"t", caller))]
        assert [(found.uid, found.gid, found.mode & 0o777) for found in made] == [
            (70000, 80000, 0o640), (70000, 80000, 0o750), (70000, 80000, 0o777)]
        assert len({found.generation for found in made}) == 3
        writer.check()


@pytest.mark.parametrize("device", [(0, 0), (1, 3), (255, 255), (256, 0), (0, 256), (4095, 0xFFFFF)])
def test_device_numbers_survive(device: tuple[int, int]) -> None:
    assert inode.device_of(newinode.device_block(*device)) == device
