"""Storing inodes: every field, every size of the record, times from 1901 to 2446, sizes and counts at their limits.
The kernel reads them back."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from fusewire.ext4 import inode, inodestore, layout, namestore, setattr, superstore
from fusewire.ext4.errors import Check, Corrupt
from fusewire.ext4.features import Feature
from fusewire.ext4.inode import FLAG_HUGE_FILE, Inode
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from tests import mounting
from tests.ext4.driver import Editor, image, new_path, seeded
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
FORMS = ["-t ext4 -b 1024", "-t ext4 -b 4096 -I 512", "-t ext4 -b 1024 -I 128 -O ^metadata_csum",
         "-t ext3 -b 2048 -I 128", "-t ext2 -b 1024 -I 1024", "-t ext4 -b 1024 -O ^metadata_csum -I 256"]
NANOS = 1_000_000_000
EDGES = [-(1 << 31) - 5, -(1 << 31), -(1 << 31) + 1, -1, 0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
         (1 << 32) + (1 << 31) - 1, (1 << 32) + (1 << 31), (1 << 33) + 12345, (1 << 34) - (1 << 31) - 2,
         (1 << 34) - (1 << 31) - 1, (1 << 34) - (1 << 31), 1 << 40]


def new_file(writer: Writer, name: bytes = b"file") -> int:
    return int(writer.change(lambda tx: namestore.create(tx, tx.inode(2), name, 0o644, ROOT)).number)


def store(tx: Transaction, number: int, fields: dict[str, Any]) -> Inode:
    return inodestore.change(tx, tx.inode(number), **fields)


def values(of: Inode) -> dict[str, Any]:
    return {name: getattr(of, name) for name in Inode.__slots__ if name not in ("memo", "mapping", "attributes", "raw")}


@pytest.mark.parametrize("form", FORMS)
def test_random_fields_are_read_back_after_a_reopening(form: str) -> None:
    choose = seeded()
    with Writer(image(form, 4096)) as writer:
        numbers = [new_file(writer, b"%d" % n) for n in range(20)]
        wanted = {}
        for number in numbers:
            fields = random_fields(writer, choose, number)
            for name in choose.sample(sorted(fields), choose.randrange(len(fields))):
                writer.change(store, number, {name: fields[name]})
            wanted[number] = values(writer.change(store, number, fields))
            assert values(writer.inode(number)) == wanted[number]
        again = writer.reopened()
        for number in numbers:
            found = values(again.inode(number))
            assert found == wanted[number]
        again.close()


def random_fields(writer: Writer, choose: Any, number: int) -> dict[str, Any]:
    def some(bits: int) -> int:
        return int(choose.choice([0, 1, (1 << bits) - 1, choose.getrandbits(bits)]))

    def when() -> tuple[int, int]:
        return choose.choice(EDGES), choose.randrange(NANOS)

    huge = Feature.HUGE_FILE in writer.fs.superblock.features
    kind = choose.choice([0o100000, 0o060000, 0o010000])
    return {
        "mode": kind | some(12), "uid": some(32), "gid": some(32), "links": some(16),
        "size": some(40 if kind == 0o100000 else 31), "sectors": some(49) & ~7 if huge else some(32),
        "generation": some(32), "file_acl": some(48 if writer.fs.is_64bit else 32), "dtime": some(32),
        "version": some(64) if writer.inode(number).extra_isize >= 28 else some(32), "block": choose.randbytes(60),
        "flags": some(32) & ~inode.FLAG_INLINE_DATA,
        "atime": when(), "ctime": when(), "mtime": when(), "crtime": when()}


@pytest.mark.parametrize("reach", [4, 8, 12, 16, 20, 24, 28])
def test_fields_behind_the_extra_size_are_not_written(reach: int) -> None:
    """What lies there belongs to the attributes."""
    marked = bytes(range(1, 129))
    editor = Editor(image("-t ext4 -b 1024", 4096))
    number = editor.number("lost+found")
    with editor.inode(number) as raw:
        raw[128 + reach:256] = marked[:128 - reach]
        struct.pack_into("<H", raw, 128, reach)
    path = new_path()
    path.write_bytes(editor.data)
    fields = {"atime": (1 << 33, 5), "ctime": (1 << 33, 6), "mtime": (1 << 33, 7), "crtime": (1 << 33, 8),
              "version": 0x1122334455667788, "project": 0x99AABBCC}
    with Writer(path, copy=False) as writer:
        before = writer.inode(number).raw
        made = writer.change(lambda tx: inodestore.change(tx, tx.inode(number), **fields))
        assert made.raw[128 + reach:] == before[128 + reach:]
        again = writer.reopened()
        found = again.inode(number)
        again.close()
    assert values(found) == values(made)
    places = layout.INODE_EXTRA.offsets
    for name in ("ctime", "mtime", "atime"):
        expected = fields[name] if places[f"{name}_extra"] + 4 <= reach else ((1 << 31) - 1, 0)
        assert getattr(found, name) == expected, name
    has_crtime = places["crtime"] + 4 <= reach
    assert (found.crtime is not None) == has_crtime
    if has_crtime:
        assert found.crtime == ((1 << 33, 8) if places["crtime_extra"] + 4 <= reach else ((1 << 31) - 1, 0))
    assert found.version == (0x1122334455667788 if reach >= 28 else 0x55667788)


def test_an_inode_that_never_said_how_far_its_fields_reach(mounts: None) -> None:
    """Its fields count, as the kernel sees it, and from the first change on it says so."""
    editor = Editor(image("-t ext4 -b 1024", 4096))
    number = editor.number("lost+found")
    with editor.inode(number) as raw:
        struct.pack_into("<H", raw, 128, 0)
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        before = values(writer.inode(number))
        made = writer.change(lambda tx: inodestore.change(tx, tx.inode(number), mtime=(1 << 33, 7)))
        assert values(made) == before | {"mtime": (1 << 33, 7), "extra_isize": 32}
        again = writer.reopened()
        assert values(again.inode(number)) == values(made)
        again.check()
        with mounting.kernel_mount(path) as mount:
            assert os.stat(mount.root / "lost+found").st_mtime_ns == (NANOS << 33) + 7
        again.close()


def test_bytes_that_we_do_not_know_survive() -> None:
    editor = Editor(image("-t ext4 -b 1024 -I 512", 4096))
    number = editor.number("lost+found")
    with editor.inode(number) as raw:
        struct.pack_into("<I", raw, layout.INODE.offsets["faddr"], 0x12345678)
        struct.pack_into("<H", raw, layout.INODE.offsets["reserved"], 0x9ABC)
        struct.pack_into("<H", raw, 128, 48)
        raw[160:176] = b"fields of later "
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        made = writer.change(lambda tx: inodestore.change(tx, tx.inode(number), mode=0o40700, uid=70000, atime=(5, 5)))
        assert struct.unpack_from("<I", made.raw, layout.INODE.offsets["faddr"])[0] == 0x12345678
        assert struct.unpack_from("<H", made.raw, layout.INODE.offsets["reserved"])[0] == 0x9ABC
        assert made.raw[160:176] == b"fields of later "
        writer.commit()


@pytest.mark.parametrize("want, minimum, extra", [(0, 0, 32), (28, 0, 32), (32, 40, 40), (64, 0, 64), (30, 0, 32),
                                                  (36, 33, 36), (200, 0, 32), (0xFFFF, 0xFFFF, 32), (34, 34, 32)])
def test_new_inodes_reach_as_far_as_the_superblock_asks(want: int, minimum: int, extra: int) -> None:
    editor = Editor(image("-t ext4 -b 1024", 4096)).put_super(want_extra_isize=want, min_extra_isize=minimum)
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        number = new_file(writer)
        assert writer.inode(number).extra_isize == extra
        again = writer.reopened()
        assert again.inode(number).extra_isize == extra
        again.close()


def test_an_inode_changed_behind_the_back_is_noticed() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)

        def stale(tx: Any) -> None:
            old = tx.inode(number)
            inodestore.change(tx, old, size=5)
            inodestore.change(tx, old, mode=0o100600)

        with pytest.raises(AssertionError):
            writer.change(stale)
        writer.check()


# ---- what the kernel reads -------------------------------------------------------------------------------------------

def copy_of(path: Path) -> Path:
    copy = new_path()
    copy.write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("form", ["-t ext4 -b 1024", "-t ext4 -b 4096 -I 512", "-t ext3 -b 1024 -I 128",
                                  "-t ext4 -b 1024 -I 128 -O ^metadata_csum"])
def test_times_are_kept_as_the_kernel_keeps_them(mounts: None, form: str) -> None:
    """The same utimensat on both: the kernel shows the same times, after a remount."""
    path = image(form, 4096)
    wide = int("-I 128" not in form)
    theirs, shown = copy_of(path), {}
    with mounting.kernel_mount(theirs, "rw,noatime") as mount:
        for at, seconds in enumerate(EDGES):
            (mount.root / str(at)).touch()
            os.utime(mount.root / str(at), ns=(seconds * NANOS + 123456789, seconds * NANOS + 987654321))
    with mounting.kernel_mount(theirs) as mount:
        for at in range(len(EDGES)):
            found = os.stat(mount.root / str(at))
            shown[at] = found.st_atime_ns, found.st_mtime_ns
    with Writer(path) as writer:
        for at, seconds in enumerate(EDGES):
            number = new_file(writer, b"%d" % at)
            writer.change(lambda tx, n=number, s=seconds: setattr.utimens(
                tx, tx.inode(n), (s, 123456789), (s, 987654321), None))
            of = writer.inode(number)
            assert (nanos(of.atime), nanos(of.mtime)) == shown[at], (seconds, wide)
        writer.check()
        with mounting.kernel_mount(writer.path) as mount:
            for at in range(len(EDGES)):
                found = os.stat(mount.root / str(at))
                assert (found.st_atime_ns, found.st_mtime_ns) == shown[at], EDGES[at]


def nanos(of: tuple[int, int]) -> int:
    return of[0] * NANOS + of[1]


@pytest.mark.parametrize("sectors", [0, 8, (1 << 32) - 8, 1 << 32, (1 << 47) + 8, (1 << 48) - 8, 1 << 48,
                                     (1 << 50) + 16])
def test_block_counts_at_their_limits(mounts: None, sectors: int) -> None:
    with Writer(image("-t ext4 -b 4096", 4096)) as writer:
        number = new_file(writer)
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), sectors=1 << 48))
        made = writer.change(lambda tx: inodestore.change(tx, tx.inode(number), sectors=sectors))
        assert bool(made.flags & FLAG_HUGE_FILE) == (sectors >= 1 << 48)
        again = writer.reopened()
        assert again.inode(number).sectors == sectors
        with mounting.kernel_mount(again.path) as mount:
            assert os.stat(mount.root / "file").st_blocks == sectors
        again.close()


@pytest.mark.parametrize("form, sectors", [("-t ext3 -b 1024", 1 << 32), ("-t ext4 -b 1024 -O ^huge_file", 1 << 32),
                                           ("-t ext4 -b 1024", -8)])
def test_impossible_block_counts_are_refused(form: str, sectors: int) -> None:
    with Writer(image(form, 4096)) as writer:
        number = new_file(writer)
        with pytest.raises(Corrupt) as caught:
            writer.change(lambda tx: inodestore.change(tx, tx.inode(number), sectors=sectors))
        assert caught.value.check is Check.INODE_SIZE
        writer.check()


@pytest.mark.parametrize("form", ["-t ext4 -b 1024 -O ^large_file", "-t ext2 -b 1024 -O ^large_file"])
def test_the_first_large_file_is_noted_in_the_superblock(mounts: None, form: str) -> None:
    with Writer(image(form, 4096)) as writer:
        number = new_file(writer)
        mask = Feature.LARGE_FILE.mask
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), size=(1 << 31) - 1))
        assert not superstore.get(writer.fs, "feature_ro_compat") & mask
        writer.check()
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), size=1 << 31))
        assert superstore.get(writer.fs, "feature_ro_compat") & mask
        writer.check()
        with mounting.kernel_mount(writer.path) as mount:
            assert os.stat(mount.root / "file").st_size == 1 << 31


def test_owners_modes_and_devices_under_the_kernel(mounts: None) -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        cases = [(0o100000 | 0o7777, 0, 0xFFFFFFFE), (stat.S_IFIFO | 0o600, 65536, 70000), (stat.S_IFSOCK, 1, 0x10000),
                 (stat.S_IFCHR | 0o222, 0xFFFF, 5), (stat.S_IFBLK, 5, 5)]
        devices = [(0, 0), (0, 0), (0, 0), (8, 255), (259, 0xFFFFF)]
        for at, ((mode, uid, gid), device) in enumerate(zip(cases, devices, strict=True)):
            made = writer.change(lambda tx, at=at, mode=mode, device=device: namestore.create(
                tx, tx.inode(2), b"%d" % at, mode, ROOT, device))
            writer.change(lambda tx, n=made.number, u=uid, g=gid, m=mode: inodestore.change(
                tx, tx.inode(n), uid=u, gid=g, mode=m, links=1))
        writer.check()
        with mounting.kernel_mount(writer.path) as mount:
            for at, ((mode, uid, gid), device) in enumerate(zip(cases, devices, strict=True)):
                found = os.stat(mount.root / str(at))
                assert (found.st_mode, found.st_uid, found.st_gid) == (mode, uid, gid)
                assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == device
