"""Names moved, replaced and exchanged as the kernel's ext4 does it, alone and among random operations."""

from __future__ import annotations

import errno
import random
import stat

import pytest

from fusewire.ext4 import inodestore, namestore, rename
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.newinode import Caller
from tests.ext4.driver import Editor, image, new_path
from tests.ext4.twins import FORMS, Operation, OurSide, compare, name_of, script
from tests.ext4.writer import Writer

MOVES = script("""
    mkdir a; mkdir a/b; mkdir a/b/c; create f; create a/f; mkdir e; rename f g; rename f g; rename none none2;
    rename g none/x; rename g g; link g h; rename g h; unlink h; rename g a/f; create g; rename g a; rename a g;
    rename a e; rename e a; mkdir e; rename e a; rename a a/b/x; rename a a/x; rename a/b a; rename a/b/c a;
    rename a/b/c moved; rename moved a/b/back; rename . x; rename a/.. x; rename g a/.; rename g n*256;
    rename n*256 x; rename a/b/back e; rename e a/b/back; rename a/b b; rename g a/g 1; rename a/g a/f 1;
    rename b a/g 1; rename none a/g 1; create one 0600; create a/two 0666; symlink sym t*79; rename one a/two 3;
    rename one a/two 6; rename one a/two 8; rename one a/two 2; rename one none 2; rename none one 2;
    rename sym a/two 2; rename b a/two 2; rename b a 2; rename a a/two 2; rename a/two a 2;
    rename a/two/back one 2; rename one one 2; create w; rename w w2 4; create w3; rename w3 w2 4; rename a a2 4;
    rename w w4 5; rename w2 w4 5; rename w4 a2/w4 5
""")


@pytest.mark.parametrize("form", FORMS)
def test_moves_as_the_kernel_does(mounts: None, form: str) -> None:
    compare(form, MOVES)


KINDS = ["create", "create", "mkdir", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "rename", "rename",
         "exchange", "noreplace", "tmpfile", "mknod"]


def random_operations(seed: int, count: int) -> list[Operation]:
    """Operations on a few names in a few directories, so that they meet."""
    chance = random.Random(seed)
    folders = [b"", b"a", b"b", b"a/c"]

    def path() -> bytes:
        folder = chance.choice(folders)
        long = b"l%d" % chance.randrange(4) + b"n" * 200
        name = chance.choice([b"a", b"b", b"c", b"x%d" % chance.randrange(6), long])
        return folder + b"/" + name if folder else name

    def operation() -> Operation:
        kind = chance.choice(KINDS)
        if kind in ("exchange", "noreplace"):
            return "rename", path(), path(), 2 if kind == "exchange" else chance.choice([1, 4, 5])
        if kind in ("link", "rename"):
            return kind, path(), path()
        if kind == "symlink":
            return kind, path(), (b"t/" * 150)[:chance.choice([3, 59, 60, 300])]
        if kind == "tmpfile":
            return kind, chance.choice(folders), chance.choice([None, path()])
        if kind == "mknod":
            return kind, path(), chance.choice([stat.S_IFIFO, stat.S_IFCHR]) | 0o600, 4, chance.choice([5, 500])
        return kind, path()

    return [operation() for _ in range(count)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_operations_as_the_kernel_does(mounts: None, form: str, seed: int) -> None:
    print(f"seed {seed}")
    compare(form, random_operations(seed, 250))


def with_links(writer: Writer, path: str, links: int) -> None:
    """Let an inode of a path claim so many links."""
    writer.change(lambda tx: inodestore.change(tx, writer.at(path), links=links))


@pytest.mark.parametrize(("features", "indexed"), [("dir_nlink", True), ("dir_nlink", False), ("^dir_nlink", True)])
def test_subdirectories_beyond_65000_are_not_counted_where_that_is_allowed(features: str, indexed: bool) -> None:
    with Writer(image(f"-t ext4 -O {features}", 16384)) as writer:
        side = OurSide(writer)
        names = [("create", b"d/" + b"%03d" % number + b"n" * 200) for number in range(10 if indexed else 2)]
        for operation in [("mkdir", b"d"), ("mkdir", b"m"), *names]:
            assert side.do(operation) == 0
        with_links(writer, "/d", namestore.MAX_LINKS - 1)
        assert side.do(("mkdir", b"d/65000")) == 0
        assert writer.at("/d").links == namestore.MAX_LINKS
        stops = indexed and not features.startswith("^")
        for operation in ("mkdir", b"d/65001"), ("rename", b"m", b"d/m"):
            assert name_of(side.do(operation)) == ("0" if stops else "EMLINK")
        if stops:
            assert writer.at("/d").links == 1
            assert side.do(("rmdir", b"d/m")) == 0
            assert side.do(("mkdir", b"d/m")) == 0
            assert writer.at("/d").links == 1
            writer.check()


def test_exchanging_a_directory_for_a_file_counts_the_directories_links() -> None:
    with Writer(image("-t ext4 -O ^dir_nlink", 16384)) as writer:
        side = OurSide(writer)
        for operation in ("mkdir", b"a"), ("mkdir", b"a/d"), ("mkdir", b"b"), ("create", b"b/f"):
            assert side.do(operation) == 0
        with_links(writer, "/b", namestore.MAX_LINKS)
        assert name_of(side.do(("rename", b"a/d", b"b/f", rename.EXCHANGE))) == "EMLINK"
        assert name_of(side.do(("rename", b"b/f", b"a/d", rename.EXCHANGE))) == "EMLINK"
        with_links(writer, "/b", 2)
        assert side.do(("rename", b"b/f", b"a/d", rename.EXCHANGE)) == 0
        assert (writer.at("/a").links, writer.at("/b").links) == (2, 3)
        writer.check()


def test_a_circle_of_parents_ends() -> None:
    editor = Editor(image("-t ext4", 4096, commands=("mkdir /a", "mkdir /b", "mkdir /a/x")))
    for name, other in (("/a", "/b"), ("/b", "/a")):
        with editor.dir_block(editor.number(name)) as raw:
            raw[12:16] = editor.number(other).to_bytes(4, "little")
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer, pytest.raises(Corrupt) as caught:
        OurSide(writer).do(("rename", b"a/x", b"b/x"))
    assert caught.value.check is Check.DIRENT_INODE


def test_a_whiteout_needs_an_owner() -> None:
    with Writer(image("-t ext4", 4096)) as writer:
        assert OurSide(writer).do(("create", b"f")) == 0
        with pytest.raises(Refused) as caught:
            writer.change(lambda tx: rename.rename(tx, tx.inode(2), b"f", tx.inode(2), b"g", rename.WHITEOUT))
        assert caught.value.errno == errno.EINVAL


def test_an_indexed_directory_keeps_its_roots_checksum_when_it_moves() -> None:
    with Writer(image(FORMS[0], 16384)) as writer:
        above = writer.change(lambda tx: namestore.mkdir(tx, tx.inode(2), b"a", 0o755, Caller(0, 0))).number
        moved = writer.change(lambda tx: namestore.mkdir(tx, tx.inode(above), b"d", 0o755, Caller(0, 0))).number
        for number in range(80):
            name = b"n%03d" % number * 20
            writer.change(lambda tx, name=name: namestore.create(tx, tx.inode(moved), name, 0o644, Caller(0, 0)))
        writer.commit()     # what the root holds is sealed, and known to be indexed
        writer.change(lambda tx: rename.rename(tx, tx.inode(above), b"d", tx.inode(2), b"d"))
        writer.check()
