"""What access control lists do to modes: inheritance and chmod for a table of lists and modes; the kernel is judge."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import struct

import pytest

from fusewire.ext4 import acl, aclrules, namestore, setattr, xattr, xattrwrite
from fusewire.ext4.acl import GROUP, GROUP_OBJ, MASK, NO_ID, OTHER, USER, USER_OBJ, Entries
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.newinode import Caller
from tests import mounting
from tests.ext4.driver import image, new_path, seeded
from tests.ext4.writer import Writer

ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"


def minimal(user: int, group: int, other: int) -> Entries:
    return [(USER_OBJ, user, NO_ID), (GROUP_OBJ, group, NO_ID), (OTHER, other, NO_ID)]


def named(user: int, group: int, mask: int, other: int) -> Entries:
    return [(USER_OBJ, user, NO_ID), (USER, 7, 1000), (USER, 5, 2000), (GROUP_OBJ, group, NO_ID), (GROUP, 6, 3000),
            (MASK, mask, NO_ID), (OTHER, other, NO_ID)]


LISTS = [minimal(7, 5, 0), minimal(6, 0, 4), minimal(0, 0, 0), named(7, 7, 5, 1), named(6, 2, 7, 7), named(0, 7, 0, 4),
         [*minimal(7, 6, 5)[:2], (MASK, 3, NO_ID), (OTHER, 5, NO_ID)]]
MODES = [0o777, 0o666, 0o640, 0o000, 0o027, 0o4755, 0o2771]


def packed(entries: Entries) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def test_inheritance_is_the_kernels(mounts: None) -> None:
    """Files and directories made in directories with each list, with each mode."""
    path = image("-t ext4 -b 1024 -N 512", 8 << 10)
    copy = new_path()
    copy.write_bytes(path.read_bytes())
    cases = list(itertools.product(range(len(LISTS)), MODES))
    shown = {}
    with mounting.kernel_mount(copy, "rw,noatime") as mount:
        before = os.umask(0o022)
        for at, entries in enumerate(LISTS):
            os.mkdir(mount.root / f"d{at}")
            os.setxattr(mount.root / f"d{at}", DEFAULT, packed(entries))
        for at, mode in cases:
            os.close(os.open(mount.root / f"d{at}" / f"f{mode:o}", os.O_CREAT | os.O_WRONLY, mode))
            os.mkdir(mount.root / f"d{at}" / f"s{mode:o}", mode & 0o1777)
            for kind in "fs":
                file = mount.root / f"d{at}" / f"{kind}{mode:o}"
                shown[at, mode, kind] = (file.stat().st_mode, {
                    name: os.getxattr(file, name) for name in sorted(os.listxattr(file))})
        os.umask(before)
    with Writer(path) as writer:
        caller = Caller(0, 0, 0o022)
        for at, entries in enumerate(LISTS):
            made = writer.change(lambda tx, at=at: namestore.mkdir(tx, tx.inode(2), b"d%d" % at, 0o755, caller))
            writer.change(lambda tx, n=made.number, e=entries: setattr.set_xattr(tx, tx.inode(n), DEFAULT, packed(e)))
            for mode in MODES:
                file = writer.change(lambda tx, n=made.number, m=mode: namestore.create(
                    tx, tx.inode(n), b"f%o" % m, m, caller))
                folder = writer.change(lambda tx, n=made.number, m=mode: namestore.mkdir(
                    tx, tx.inode(n), b"s%o" % m, m & 0o1777, caller))
                for kind, of in (("f", file), ("s", folder)):
                    found = writer.inode(of.number)
                    names = sorted(writer.run(xattr.names, found, True))
                    ours = {name.decode(): writer.run(xattr.get, found, name) for name in names}
                    assert (found.mode, ours) == shown[at, mode, kind], (entries, oct(mode), kind)
        writer.check()


def test_chmod_and_lists_are_the_kernels(mounts: None) -> None:
    """Each list set on a file, then each mode: the list and the mode as the kernel has them."""
    path = image("-t ext4 -b 1024 -N 512", 8 << 10)
    copy = new_path()
    copy.write_bytes(path.read_bytes())
    shown = {}
    with mounting.kernel_mount(copy, "rw,noatime") as mount:
        file = mount.root / "file"
        file.touch()
        for at, entries in enumerate(LISTS):
            os.chmod(file, 0o6750)
            os.setxattr(file, ACCESS, packed(entries))
            shown[at, None] = state_of(file)
            for mode in MODES:
                os.chmod(file, mode)
                shown[at, mode] = state_of(file)
            if os.listxattr(file):
                os.removexattr(file, ACCESS)
            shown[at, -1] = state_of(file)
    with Writer(path) as writer:
        number = int(writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"file", 0o644, Caller(0, 0))).number)

        def state() -> tuple[int, bytes | None]:
            of = writer.inode(number)
            names = writer.run(xattr.names, of, True)
            return of.mode, writer.run(xattr.get, of, ACCESS) if ACCESS in names else None

        for at, entries in enumerate(LISTS):
            writer.change(lambda tx: setattr.chmod(tx, tx.inode(number), 0o6750))
            writer.change(lambda tx, e=entries: setattr.set_xattr(tx, tx.inode(number), ACCESS, packed(e)))
            assert state() == shown[at, None], entries
            for mode in MODES:
                writer.change(lambda tx, m=mode: setattr.chmod(tx, tx.inode(number), m))
                assert state() == shown[at, mode], (entries, oct(mode))
            writer.change(lambda tx: setattr.set_xattr(tx, tx.inode(number), ACCESS, None))
            assert state() == shown[at, -1]
        writer.check()


def state_of(file: os.PathLike[str]) -> tuple[int, bytes | None]:
    has = ACCESS.decode() in os.listxattr(file)
    return os.stat(file).st_mode, os.getxattr(file, ACCESS) if has else None


# ---- values that are no lists ----------------------------------------------------------------------------------------

BAD = {
    "empty": b"", "short": b"\2\0", "no entries": packed([]), "version 1": struct.pack("<I", 1),
    "version 3": struct.pack("<I", 3) + packed(LISTS[0])[4:], "cut": packed(LISTS[0])[:-1],
    "no other": packed(LISTS[0][:2]), "no mask": packed([e for e in LISTS[3] if e[0] != MASK]),
    "order": packed([LISTS[0][2], *LISTS[0][:2]]), "twice": packed([LISTS[0][0], *LISTS[0]]),
    "two masks": packed([*LISTS[3][:6], LISTS[3][5], LISTS[3][6]]), "permission": packed(minimal(8, 0, 0)),
    "tag": packed([(USER_OBJ, 7, NO_ID), (3, 7, 5), *LISTS[0][1:]]),
    "no id": packed([LISTS[3][0], (USER, 7, NO_ID), *LISTS[3][3:]]),
    "ids out of order": packed([LISTS[3][0], LISTS[3][2], LISTS[3][1], *LISTS[3][3:]]),
    "id twice": packed([LISTS[3][0], LISTS[3][1], LISTS[3][1], *LISTS[3][3:]]), "good": packed(LISTS[3])}


@pytest.mark.parametrize("which", [ACCESS, DEFAULT], ids=["access", "default"])
def test_what_is_no_list_is_refused_as_by_the_kernel(mounts: None, which: bytes) -> None:
    path = image("-t ext4 -b 1024 -N 512", 8 << 10)
    copy = new_path()
    copy.write_bytes(path.read_bytes())
    with mounting.kernel_mount(copy, "rw,noatime") as mount, Writer(path) as writer:
        for kind, make in ((b"file", namestore.create), (b"dir", namestore.mkdir)):
            theirs = mount.root / kind.decode()
            theirs.mkdir() if kind == b"dir" else theirs.touch()
            os.chmod(theirs, 0o750)
            number = int(writer.change(lambda tx, k=kind, m=make: m(tx, tx.inode(2), k, 0o750, Caller(0, 0))).number)
            for name, value in BAD.items():
                expected = 0
                try:
                    os.setxattr(theirs, which, value)
                except OSError as error:
                    expected = error.errno or -1
                ours = 0
                try:
                    writer.change(lambda tx, n=number, v=value: setattr.set_xattr(tx, tx.inode(n), which, v))
                except Refused as refused:
                    ours = refused.errno
                assert ours == expected, (kind, name, errno.errorcode.get(expected))
                assert stat.S_IMODE(writer.inode(number).mode) == stat.S_IMODE(theirs.stat().st_mode), (kind, name)


def test_links_have_no_lists() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        made = writer.change(lambda tx: namestore.symlink(tx, tx.inode(2), b"link", b"target", Caller(0, 0)))
        for which in (ACCESS, DEFAULT):
            with pytest.raises(Refused) as caught:
                writer.change(lambda tx, w=which: setattr.set_xattr(tx, tx.inode(made.number), w, packed(LISTS[3])))
            assert caught.value.errno == errno.EOPNOTSUPP


# ---- the rules alone -------------------------------------------------------------------------------------------------

def test_forms_on_disk_and_in_the_call_are_each_others_inverse() -> None:
    choose = seeded()
    for _ in range(200):
        users = [(USER, choose.randrange(8), choose.randrange(1 << 31)) for _ in range(choose.randrange(4))]
        groups = [(GROUP, choose.randrange(8), choose.randrange(1 << 31)) for _ in range(choose.randrange(4))]
        mask = [(MASK, choose.randrange(8), NO_ID)] if users or groups or choose.random() < 0.3 else []
        user, group, other = minimal(*(choose.randrange(8) for _ in range(3)))
        entries = [user, *users, group, *groups, *mask, other]
        assert acl.from_xattr(packed(entries)) == entries
        acl.check(entries)
        assert acl.entries(acl.to_disk(entries)) == entries
        assert acl.to_xattr(acl.to_disk(entries)) == packed(entries)
        mode = aclrules.mode_with(entries, 0o107000 | choose.randrange(0o1000))
        assert aclrules.with_mode(entries, mode) == entries, "a mode made from a list changes nothing in it"
        minimal_mode = aclrules.equivalent_mode(entries)
        assert (minimal_mode is None) == bool(users or groups or mask)
        assert minimal_mode is None or minimal_mode == mode & 0o777


@pytest.mark.parametrize("entries", [[], minimal(7, 7, 7)[:1], minimal(7, 7, 7)[1:], [(OTHER, 7, NO_ID)] * 3])
def test_lists_on_disk_that_say_too_little_are_corrupt(entries: Entries) -> None:
    with pytest.raises(Corrupt) as caught:
        aclrules.equivalent_mode(entries)
    assert caught.value.check is Check.ACL_FORMAT
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        made = writer.change(lambda tx: namestore.mkdir(tx, tx.inode(2), b"d", 0o755, Caller(0, 0)))
        writer.change(lambda tx: xattrwrite.put(tx, tx.inode(made.number), xattr.INDEX_ACL_DEFAULT, b"",
                                                acl.to_disk(entries)))
        with pytest.raises(Corrupt) as caught:
            writer.change(lambda tx: namestore.create(tx, tx.inode(made.number), b"f", 0o644, Caller(0, 0)))
        assert caught.value.check is Check.ACL_FORMAT
