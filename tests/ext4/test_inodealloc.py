"""Allocating inodes: every free one and no other, near their directory; tables that were never initialised."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from fusewire.ext4 import checksum, group, inodealloc, inodestore, namestore
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.group import INODE_UNINIT
from fusewire.ext4.inode import FLAG_TOPDIR
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from tests import mounting
from tests.ext4.driver import Editor, image, new_path, run_tool, seeded
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
LAYOUTS = ["-t ext4 -b 1024 -g 1024 -N 1000", "-t ext4 -b 4096 -N 2000", "-t ext4 -b 1024 -O ^flex_bg -g 2048",
           "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg -g 1024", "-t ext3 -b 1024 -g 1024", "-t ext2 -b 2048 -I 128",
           "-t ext4 -b 1024 -O meta_bg,^resize_inode -g 512"]
SIZE = 16 << 10


def free_inodes(path: Path) -> set[int]:
    """What dumpe2fs lists as free."""
    found: set[int] = set()
    for line in run_tool("dumpe2fs", path).splitlines():
        if line.startswith("  Free inodes: "):
            for part in line.split(":", 1)[1].split(","):
                first, _, last = part.strip().partition("-")
                if first:
                    found |= set(range(int(first), int(last or first) + 1))
    return found


def take_all(writer: Writer, directory: bool) -> list[int]:
    taken: list[int] = []
    while True:
        try:
            taken.append(writer.change(lambda tx: inodealloc.allocate(tx, tx.inode(2), directory)))
        except Refused as error:
            assert error.errno == errno.ENOSPC
            return taken


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("directory", [False, True])
def test_every_free_inode_is_given_out_once(form: str, directory: bool) -> None:
    path = image(form, SIZE)
    choose = seeded()
    with Writer(path) as writer:
        dirs = [writer.run(group.load, number).used_dirs for number in range(writer.fs.geometry.groups)]
        taken = take_all(writer, directory)
        assert len(taken) == len(set(taken)) and set(taken) == free_inodes(path)
        assert min(taken) >= writer.fs.superblock.first_inode
        choose.shuffle(taken)
        for number in taken:
            writer.change(lambda tx, n=number: inodealloc.free(tx, n, directory))
        assert dirs == [writer.run(group.load, number).used_dirs for number in range(writer.fs.geometry.groups)]
        writer.check()


@pytest.mark.parametrize("form", LAYOUTS)
def test_inodes_in_use_are_covered_by_the_table(form: str) -> None:
    """itable_unused says what nobody looks at: e2fsck would not see inodes behind it."""
    choose = seeded()
    with Writer(image(form, SIZE)) as writer:
        used: set[int] = set()
        for _ in range(300):
            if choose.random() < 0.7 or not used:
                used.add(writer.change(lambda tx: inodealloc.allocate(tx, tx.inode(2), choose.random() < 0.3)))
            else:
                used.discard(number := choose.choice(sorted(used)))
                writer.change(lambda tx, n=number: inodealloc.free(tx, n, False))
        geometry = writer.fs.geometry
        for number in used:
            in_group, index = geometry.group_of_inode(number)
            desc = writer.run(group.load, in_group)
            if form not in (LAYOUTS[4], LAYOUTS[5]):
                assert desc.itable_unused < geometry.inodes_per_group - index
            assert not desc.flags & INODE_UNINIT


def test_files_stay_with_their_directory_and_directories_spread() -> None:
    with Writer(image("-t ext4 -b 1024 -g 1024 -N 4000", 32 << 10)) as writer:
        group_of = writer.fs.geometry.group_of_inode
        tops = [writer.change(lambda tx, n=n: namestore.mkdir(tx, tx.inode(2), b"%d" % n, 0o755, ROOT)).number
                for n in range(10)]
        assert len({group_of(number)[0] for number in tops}) == 10
        for top in tops:
            below = [writer.change(lambda tx, n=n, top=top: namestore.create(tx, tx.inode(top), b"%d" % n, 0o644, ROOT))
                     for n in range(5)]
            assert {group_of(made.number)[0] for made in below} == {group_of(top)[0]}
        deep = writer.change(lambda tx: namestore.mkdir(tx, tx.inode(tops[3]), b"deep", 0o755, ROOT))
        assert group_of(deep.number)[0] == group_of(tops[3])[0]
        writer.change(lambda tx: inodestore.change(tx, tx.inode(tops[3]), flags=tx.inode(tops[3]).flags | FLAG_TOPDIR))
        spread = [writer.change(lambda tx, n=n: namestore.mkdir(tx, tx.inode(tops[3]), b"s%d" % n, 0o755, ROOT))
                  for n in range(4)]
        assert len({group_of(made.number)[0] for made in spread}) == 4
        writer.check()


@pytest.mark.parametrize("form", ["-t ext4 -b 1024", "-t ext4 -b 1024 -O ^metadata_csum,uninit_bg",
                                  "-t ext4 -b 4096 -O ^flex_bg"])
def test_tables_full_of_garbage_are_used_safely(mounts: None, form: str) -> None:
    """mke2fs leaves tables as they were (lazy_itable_init): what was there is never taken for an inode."""
    path = new_path()
    path.write_bytes(b"\xa5\x5a" * (24 << 19))
    run_tool("mke2fs", "-q", "-F", "-N", "3000", "-E", "lazy_itable_init=1,nodiscard", *form.split(), path)
    with Writer(path) as writer:
        for n in range(1500):
            made = writer.change(lambda tx, n=n: namestore.create(tx, tx.inode(2), b"%d" % n, 0o644, ROOT))
            assert made.size == made.sectors == made.file_acl == 0
        writer.check()
        with mounting.kernel_mount(writer.path, "ro,noatime") as mount:
            found = [entry.stat() for entry in os.scandir(mount.root) if entry.name.isdigit()]
            assert len(found) == 1500 and all(stat.st_mode == 0o100644 and stat.st_size == 0 for stat in found)


def test_full_tables_are_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with Writer(image("-t ext4 -b 1024 -g 256 -N 1024", 64 << 10)) as writer:
        geometry = writer.fs.geometry
        per_group = geometry.inodes_per_group
        while geometry.group_of_inode(writer.change(lambda tx: inodealloc.allocate(tx, tx.inode(2), False)))[0] < 100:
            pass
        looked: list[int] = []
        real = group.load
        monkeypatch.setattr(group, "load", lambda fs, number: looked.append(number) or real(fs, number))
        for _ in range(per_group // 2):
            writer.change(lambda tx: inodealloc.allocate(tx, tx.inode(2), False))
        assert len(set(looked)) < 5
        monkeypatch.undo()
        writer.change(lambda tx: inodealloc.free(tx, 30, False))
        assert writer.change(lambda tx: inodealloc.allocate(tx, tx.inode(2), False)) == 30


def test_what_failed_transactions_made_full_is_found_again() -> None:
    with Writer(image("-t ext2 -b 1024 -g 512", 4096)) as writer:
        with pytest.raises(KeyError), Transaction(writer.fs) as tx:
            try:
                while True:
                    writer.run(lambda _fs: inodealloc.allocate(tx, tx.inode(2), False))
            except Refused:
                raise KeyError from None
        assert set(take_all(writer, False)) == free_inodes(image("-t ext2 -b 1024 -g 512", 4096))


# ---- hostile images --------------------------------------------------------------------------------------------------

def with_bitmap(clear: int, sealed: bool) -> Path:
    """An image whose first inode bitmap has bit ``clear`` changed."""
    editor = Editor(image("-t ext4 -b 1024", 4096))
    desc = editor.core.run(group.load, 0)
    with editor.block(desc.inode_bitmap) as raw:
        raw[clear // 8] ^= 1 << clear % 8
        data = bytes(raw)
    if sealed:
        with editor.desc(0) as raw:
            checksum.seal_inode_bitmap(data, editor.geometry.inodes_per_group, raw, editor.seed)
    path = new_path()
    path.write_bytes(editor.data)
    return path


@pytest.mark.parametrize("bit, sealed, check", [
    (7, True, Check.BITMAP_MISMATCH), (0, True, Check.BITMAP_MISMATCH), (7, False, Check.BITMAP_CHECKSUM),
    (100, False, Check.BITMAP_CHECKSUM)])
def test_reserved_inodes_are_never_given_out(bit: int, sealed: bool, check: Check) -> None:
    with Writer(with_bitmap(bit, sealed), copy=False) as writer, pytest.raises(Corrupt) as caught:
        writer.change(lambda tx: inodealloc.allocate(tx, tx.inode(2), False))
    assert caught.value.check is check


def test_freeing_a_free_inode_is_refused() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        with pytest.raises(Corrupt) as caught:
            writer.change(lambda tx: inodealloc.free(tx, 100, False))
        assert caught.value.check is Check.BITMAP_MISMATCH
        writer.check()


@pytest.mark.parametrize(("free", "directories"), [(0xFFFFFFFF, 0), (0, 0xFFFFFFFF), (9_000, 9_000)])
def test_counts_that_no_bitmap_has_are_corruption_and_do_not_overflow(free: int, directories: int) -> None:
    editor = Editor(image("-t ext4 -b 1024 -O ^has_journal,^metadata_csum,64bit", 8192))
    with editor.desc(0) as raw:
        for at, value in ((14, free & 0xFFFF), (46, free >> 16), (16, directories & 0xFFFF), (48, directories >> 16)):
            raw[at:at + 2] = value.to_bytes(2, "little")
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        for number in (11, 12):
            for used in (False, True):
                with suppress(Corrupt):
                    writer.change(lambda tx, number=number, used=used: inodealloc.mark(
                        tx, 0, number - 1, True, used=used))
        with pytest.raises((Corrupt, Refused)):
            writer.change(lambda tx: namestore.mkdir(tx, tx.inode(2), b"new", 0o755, Caller(0, 0)))
        writer.commit()
