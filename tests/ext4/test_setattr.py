"""Changing attributes: owners, modes, times and flags, as the kernel's ext4 leaves them after the same calls."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import struct
from pathlib import Path

import pytest

from fusewire.ext4 import inode, inodestore, namestore, setattr, xattr
from fusewire.ext4.errors import Refused
from fusewire.ext4.newinode import Caller
from tests import mounting
from tests.ext4.driver import Editor, image, new_path
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
FORM = "-t ext4 -b 1024 -N 512 -O ^has_journal"
GETFLAGS, SETFLAGS = 0x80086601, 0x40086602
CAPABILITY = b"security.capability"
VALUE = struct.pack("<IIIII", 0x02000001, 1, 0, 0, 0)
EXTENTS, JOURNAL_DATA = 0x80000, 0x4000


def copy_of(path: Path) -> Path:
    copy = new_path()
    copy.write_bytes(path.read_bytes())
    return copy


def make(writer: Writer, kind: str, name: bytes = b"file") -> int:
    """A file, directory, link or fifo."""
    if kind == "dir":
        made = writer.change(lambda tx: namestore.mkdir(tx, tx.inode(2), name, 0o755, ROOT))
    elif kind == "link":
        made = writer.change(lambda tx: namestore.symlink(tx, tx.inode(2), name, b"target", ROOT))
    else:
        mode = stat.S_IFIFO | 0o644 if kind == "fifo" else 0o644
        made = writer.change(lambda tx: namestore.create(tx, tx.inode(2), name, mode, ROOT))
    return int(made.number)


def make_there(path: Path, kind: str) -> None:
    {"dir": path.mkdir, "link": lambda: path.symlink_to("target"), "fifo": lambda: os.mkfifo(path, 0o644),
     "file": path.touch}[kind]()


# ---- owners and modes ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["file", "dir", "fifo"])
def test_a_new_owner_takes_away_what_made_a_program_privileged(mounts: None, kind: str) -> None:
    path = image(FORM, 8 << 10)
    modes = [0o4755, 0o2755, 0o6755, 0o2745, 0o6644, 0o1777, 0o7777, 0o0644]
    owners: list[tuple[int | None, int | None]] = [(5, None), (None, 6), (7, 8), (None, None)]
    shown = {}
    with mounting.kernel_mount(copy_of(path), "rw,noatime") as mount:
        there = mount.root / "file"
        make_there(there, kind)
        for mode, (uid, gid) in itertools.product(modes, owners):
            os.chmod(there, mode)
            if kind == "file":
                os.setxattr(there, CAPABILITY, VALUE)
            os.chown(there, -1 if uid is None else uid, -1 if gid is None else gid)
            found = there.stat()
            has = CAPABILITY.decode() in os.listxattr(there)
            shown[mode, uid, gid] = found.st_mode, found.st_uid, found.st_gid, has
    with Writer(path) as writer:
        number = make(writer, kind)
        for mode, (uid, gid) in itertools.product(modes, owners):
            writer.change(lambda tx, m=mode: setattr.chmod(tx, tx.inode(number), m))
            if kind == "file":
                writer.change(lambda tx: setattr.set_xattr(tx, tx.inode(number), CAPABILITY, VALUE))
            found = writer.change(lambda tx, u=uid, g=gid: setattr.chown(tx, tx.inode(number), u, g))
            has = CAPABILITY in writer.run(xattr.names, writer.inode(number), True)
            assert (found.mode, found.uid, found.gid, has) == shown[mode, uid, gid], (oct(mode), uid, gid)
        writer.check()


def test_chmod_changes_nothing_but_permissions() -> None:
    with Writer(image(FORM, 8 << 10)) as writer:
        for kind in ("file", "dir", "fifo", "link"):
            number = make(writer, kind, kind.encode())
            before = writer.inode(number).kind
            found = writer.change(lambda tx, n=number: setattr.chmod(tx, tx.inode(n), 0o170000 | 0o7123))
            assert found.mode == before | 0o7123 and found.kind == before
        writer.check()


def test_dropping_privileges_touches_only_what_has_some() -> None:
    with Writer(image(FORM, 8 << 10)) as writer:
        number = make(writer, "file")
        before = writer.inode(number)
        assert writer.change(lambda tx: setattr.drop_privileges(tx, tx.inode(number))).raw == before.raw
        writer.clock = (5000, 1)
        writer.change(lambda tx: setattr.set_xattr(tx, tx.inode(number), CAPABILITY, VALUE))
        writer.clock = (6000, 1)
        found = writer.change(lambda tx: setattr.drop_privileges(tx, tx.inode(number)))
        assert found.ctime == (6000, 1) and not writer.run(xattr.names, found, True)


def test_times_are_given_or_now_or_left() -> None:
    with Writer(image(FORM, 8 << 10)) as writer:
        number = make(writer, "file")
        writer.clock = (1000, 1)
        found = writer.change(lambda tx: setattr.utimens(tx, tx.inode(number), (5, 6), (7, 8), None))
        assert (found.atime, found.mtime, found.ctime) == ((5, 6), (7, 8), (1000, 1))
        writer.clock = (2000, 2)
        found = writer.change(lambda tx: setattr.utimens(tx, tx.inode(number), None, (9, 9), None))
        assert (found.atime, found.mtime, found.ctime) == ((5, 6), (9, 9), (2000, 2))
        found = writer.change(lambda tx: setattr.utimens(tx, tx.inode(number), (1, 1), None, (3, 3)))
        assert (found.atime, found.mtime, found.ctime) == ((1, 1), (9, 9), (3, 3))


def test_every_change_is_counted_as_the_kernel_counts() -> None:
    """i_version grows by one with each call (measured on the kernel), and wraps at 64 bits."""
    with Writer(image(FORM, 8 << 10)) as writer:
        number = make(writer, "file")
        for change in (lambda tx, of: setattr.chmod(tx, of, 0o600), lambda tx, of: setattr.chown(tx, of, 5, 5),
                       lambda tx, of: setattr.utimens(tx, of, (1, 1), None, None),
                       lambda tx, of: setattr.set_xattr(tx, of, b"user.a", b"v"),
                       lambda tx, of: setattr.set_flags(tx, of, of.flags | inode.FLAG_NODUMP)):
            before = writer.inode(number).version
            writer.change(lambda tx, change=change: change(tx, tx.inode(number)))
            assert writer.inode(number).version == before + 1
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), version=(1 << 64) - 1))
        assert writer.change(lambda tx: setattr.chmod(tx, tx.inode(number), 0o644)).version == 0


# ---- flags -----------------------------------------------------------------------------------------------------------

def flags_there(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int(struct.unpack("<I", fcntl.ioctl(descriptor, GETFLAGS, bytes(8))[:4])[0])
    finally:
        os.close(descriptor)


def set_there(path: Path, flags: int) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.ioctl(descriptor, SETFLAGS, struct.pack("<Q", flags))
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(descriptor)
    return 0


def set_here(writer: Writer, number: int, flags: int) -> int:
    try:
        writer.change(lambda tx: setattr.set_flags(tx, tx.inode(number), flags))
    except Refused as error:
        return error.errno
    return 0


@pytest.mark.parametrize("kind", ["file", "dir"])
def test_each_flag_is_taken_or_refused_as_by_the_kernel(mounts: None, kind: str) -> None:
    """Every bit alone, set and taken away again, and while the file is immutable.

    Left out is what we do not serve and say so: journalled data, and files without extents.
    """
    path = image(FORM, 8 << 10)
    bits = [1 << bit for bit in range(32) if 1 << bit not in (EXTENTS, JOURNAL_DATA)]
    with mounting.kernel_mount(copy_of(path), "rw,noatime") as mount, Writer(path) as writer:
        there, number = mount.root / "file", make(writer, kind)
        make_there(there, kind)
        for bit in bits:
            for flags in (EXTENTS | bit, EXTENTS, EXTENTS | 0x10, EXTENTS | 0x10 | bit, EXTENTS | 0x40 | bit, EXTENTS):
                expected = set_there(there, flags)
                assert set_here(writer, number, flags) == expected, (hex(flags), errno.errorcode.get(expected))
                assert writer.inode(number).flags == flags_there(there), hex(flags)
        writer.check()


@pytest.mark.parametrize("kind", ["file", "dir", "fifo", "link"])
def test_how_data_are_stored_is_not_changed(kind: str) -> None:
    with Writer(image(FORM, 8 << 10)) as writer:
        number = make(writer, kind)
        flags = writer.inode(number).flags
        for wanted in (flags ^ EXTENTS, flags | JOURNAL_DATA, flags | inode.FLAG_CASEFOLD, flags | 1 << 31):
            assert set_here(writer, number, wanted) == errno.EOPNOTSUPP
        assert writer.inode(number).flags == flags
        if kind in ("fifo", "link"):
            assert set_here(writer, number, flags & EXTENTS | inode.FLAG_SYNC) == errno.EOPNOTSUPP
        if kind == "fifo":
            assert set_here(writer, number, inode.FLAG_NODUMP | inode.FLAG_NOATIME) == 0


def test_flags_that_are_only_shown_stay() -> None:
    """An index stays one whatever chattr(1) hands back."""
    with Writer(image(FORM, 8 << 10)) as writer:
        number = make(writer, "dir")
        shown = inode.FLAG_INDEX | EXTENTS
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), flags=shown))
        assert set_here(writer, number, EXTENTS | inode.FLAG_NODUMP) == 0
        assert writer.inode(number).flags == shown | inode.FLAG_NODUMP
        assert set_here(writer, number, shown) == 0
        assert writer.inode(number).flags == shown


# ---- projects --------------------------------------------------------------------------------------------------------

def test_projects_need_the_feature_and_room() -> None:
    with Writer(image(FORM, 8 << 10)) as writer:
        number = make(writer, "file")
        assert writer.change(lambda tx: setattr.set_project(tx, tx.inode(number), 0)).project == 0
        with pytest.raises(Refused) as caught:
            writer.change(lambda tx: setattr.set_project(tx, tx.inode(number), 7))
        assert caught.value.errno == errno.EOPNOTSUPP
    editor = Editor(image("-t ext4 -b 1024 -O project", 8 << 10))
    number = editor.number("lost+found")
    for reach, error in ((28, errno.EOVERFLOW), (32, 0)):
        with editor.inode(number) as raw:
            struct.pack_into("<H", raw, 128, reach)
        path = new_path()
        path.write_bytes(editor.data)
        with Writer(path, copy=False) as writer:
            if error:
                with pytest.raises(Refused) as caught:
                    writer.change(lambda tx: setattr.set_project(tx, tx.inode(number), 7))
                assert caught.value.errno == error
            else:
                assert writer.change(lambda tx: setattr.set_project(tx, tx.inode(number), 7)).project == 7
