"""Transactions apply whole or not at all, whatever is raised and wherever; what they free is kept apart until it may be
used; counters, views and checksums are right at every close of a batch.  The referee is e2fsck."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fusewire.ext4 import (
    alloc,
    commit,
    group,
    inode,
    inodefree,
    inodestore,
    iomap,
    mapping,
    namestore,
    orphan,
    rename,
    superstore,
    truncate,
    xattrwrite,
)
from fusewire.ext4.batch import BatchLimits
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.group import GroupDesc
from fusewire.ext4.inode import Inode
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import REVOKE_RECORD_BYTES, CommitFirst, Transaction
from tests.ext4.driver import image, seeded
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
FORMS = ["-t ext4 -b 1024", "-t ext4 -b 4096", "-t ext4 -b 2048 -O ^metadata_csum,uninit_bg,^orphan_file",
         "-t ext3 -b 1024 -I 128", "-t ext2 -b 1024"]
EDITS = ("edit", "edit_keeping", "create", "seal", "revoke", "freed", "after_commit")


class Injected(Exception):
    """What the test raises in the middle of an operation."""


def state(writer: Writer) -> dict[str, Any]:
    """Everything that a transaction may change, in memory and in blocks."""
    fs, cache = writer.fs, writer.fs.cache
    writing = fs.writing
    assert writing is not None
    batch = writing.batch
    return {
        "blocks": dict(batch.blocks), "revoked": set(batch.revoked), "freed": list(batch.freed),
        "wrote": batch.wrote_data, "held": dict(writing.held._masks), "held_count": writing.held.count,
        "free": (writing.free_clusters, writing.free_inodes), "orphans": dict(writing.orphans),
        "shared": dict(writing.shared_attributes), "at": writing.directory_group,
        "pinned": {block: (entry, entry.data, dict(entry.seals)) for block, entry in cache._pinned.items()}}


def fields_of(of: Inode) -> dict[str, object]:
    return {name: getattr(of, name) for name in Inode.__slots__ if name not in ("memo", "mapping", "attributes", "raw")}


def check_views(writer: Writer) -> None:
    """No view says other than the bytes beside it."""
    fs, cache = writer.fs, writer.fs.cache
    for block, entry in {**cache._old, **cache._young, **cache._pinned}.items():
        for key, view in entry.views.items():
            if isinstance(view, Inode):
                offset = writer.run(inodestore.place, view.number)[1]
                raw = bytes(entry.data[offset:offset + fs.geometry.inode_bytes])
                assert fields_of(inode.decode(fs, view.number, raw)) == fields_of(view), (block, key)
            elif isinstance(view, GroupDesc):
                offset = fs.superblock.descriptor_block(key[1])[1]
                raw = bytes(entry.data[offset:offset + fs.geometry.group_desc_bytes])
                fresh = GroupDesc(raw, fs.is_64bit)
                assert all(getattr(fresh, name) == getattr(view, name) for name in GroupDesc.__slots__), (block, key)
            elif key == "free":
                ones = ~int.from_bytes(entry.data, "little") & (1 << view.bit_length()) - 1
                assert view & ones == view, (block, key)


# ---- operations, each a function of a transaction ------------------------------------------------------------------

def op_create(tx: Transaction) -> None:
    namestore.create(tx, tx.inode(2), b"new", 0o644, ROOT)


def op_mkdir(tx: Transaction) -> None:
    namestore.mkdir(tx, tx.inode(2), b"dir", 0o755, ROOT)


def op_symlink(tx: Transaction) -> None:
    namestore.symlink(tx, tx.inode(2), b"link", b"x" * 200, ROOT)


def op_unlink(tx: Transaction) -> None:
    namestore.unlink(tx, tx.inode(2), b"big")


def op_release(tx: Transaction) -> None:
    victim = namestore.unlink(tx, tx.inode(2), b"attributes")
    assert inodefree.release(tx, victim)


def op_rename(tx: Transaction) -> None:
    rename.rename(tx, tx.inode(2), b"big", tx.inode(2), b"attributes")


def op_xattr(tx: Transaction) -> None:
    xattrwrite.put(tx, tx.inode(number_of(tx, b"big")), 1, b"large", bytes(600))


def op_truncate(tx: Transaction) -> None:
    of = truncate.set_size(tx, tx.inode(number_of(tx, b"big")), 1)
    truncate.shrink(tx, of)


def op_grow(tx: Transaction) -> None:
    of = tx.inode(number_of(tx, b"big"))
    for file_block in range(100, 140, 2):
        of, _ = mapping.allocate(tx, of, file_block, 1, unwritten=True)
    inodestore.change(tx, of, size=140 * tx.geometry.block_bytes)


def number_of(tx: Transaction, name: bytes) -> int:
    found = namestore.existing(tx, tx.inode(2), name)[0]
    return int(found.number)


OPERATIONS = [op_create, op_mkdir, op_symlink, op_unlink, op_release, op_rename, op_xattr, op_truncate, op_grow]


def prepare(writer: Writer) -> None:
    big = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"big", 0o644, ROOT))
    for file_block in range(0, 40, 2):
        writer.change(lambda tx, at=file_block: mapping.allocate(tx, tx.inode(big.number), at, 1, unwritten=False))
    size = 40 * writer.block_bytes
    writer.change(lambda tx: inodestore.change(tx, tx.inode(big.number), size=size))
    other = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"attributes", 0o644, ROOT))
    writer.change(lambda tx: xattrwrite.put(tx, tx.inode(other.number), 1, b"a", bytes(300)))
    writer.check()


@contextmanager
def injected(at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The ``at``-th change that any transaction makes raises ``Injected``; counts the changes."""
    count = [0]

    def broken(name: str) -> Callable[..., Any]:
        real = getattr(Transaction, name)

        def call(self: Transaction, *arguments: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                raise Injected
            return real(self, *arguments)

        return call

    with monkeypatch.context() as patch:
        for name in EDITS:
            patch.setattr(Transaction, name, broken(name))
        yield count


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_is_raised_leaves_no_trace(form: str, operation: Callable[[Transaction], None],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    with Writer(image(form, 4096)) as writer:
        prepare(writer)
        with pytest.raises(Injected):
            writer.change(lambda tx: (operation(tx), stop()))  # fetches what the operation needs
        before = state(writer)
        at = 1
        while True:
            with injected(at, monkeypatch) as count:
                try:
                    writer.change(operation)
                except Injected:
                    pass
                else:
                    break
            assert state(writer) == before, (operation, at)
            check_views(writer)
            at += 1
        assert at == count[0] + 1 > 3
        check_views(writer)
        settle(writer)
        writer.check()


def stop() -> None:
    raise Injected


def settle(writer: Writer) -> None:
    """Free the orphans without names, finish cutting the others."""
    for number in writer.run(orphan.numbers):
        done = False
        while not done:
            if writer.inode(number).links:
                done = writer.change(lambda tx, number=number: truncate.shrink(tx, tx.inode(number)))[1]
            else:
                done = writer.change(lambda tx, number=number: inodefree.release(tx, tx.inode(number)))


def test_interrupts_leave_no_trace_either() -> None:
    with Writer(image("-t ext4", 4096)) as writer:
        prepare(writer)
        before = state(writer)

        def interrupted(tx: Transaction) -> None:
            op_create(tx)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            writer.change(interrupted)
        assert state(writer) == before
        writer.check()


# ---- reading inside --------------------------------------------------------------------------------------------------

def test_a_transaction_reads_its_own_edits_and_nobody_else_does() -> None:
    with Writer(image("-t ext4", 4096)) as writer:
        with Transaction(writer.fs) as tx:
            root = writer.run(lambda _fs: tx.inode(2))
            inodestore.change(tx, root, mtime=(77, 0))
            assert tx.inode(2).mtime == (77, 0)
            assert writer.inode(2).mtime != (77, 0)
            block = writer.run(lambda _fs: tx.create(3000) and 3000)
            tx.edit(block)[:4] = b"mine"
            assert tx.cache.read(3000)[:4] == b"mine"
            assert tx.cache.view(3000, "first", lambda data: data[:4]) == b"mine"
            tx.edit(3000)[:4] = b"more"
            assert tx.cache.view(3000, "first", lambda data: data[:4]) == b"more", "a stale view"
            assert not writer.fs.cache.holds(3000)
        assert writer.inode(2).mtime == (77, 0)
        assert writer.fs.cache.read(3000)[:4] == b"more"


def test_edited_parts_are_not_verified_until_they_are_sealed() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = writer.run(lambda fs: fs.geometry.inodes)
        writer.change(lambda tx: inodestore.create(tx, number, 0o100644))
        block, offset = writer.run(inodestore.place, number)
        writer.fs.cache.entry(block).views.clear()
        assert writer.inode(number).mode == 0o100644
        writer.commit()
        assert writer.last is not None and not writer.fs.cache.entry(block).seals
        writer.fs.cache.entry(block).views.clear()
        assert writer.inode(number).mode == 0o100644
        spoilt = bytearray(writer.fs.cache.read(block))
        spoilt[offset + 100] ^= 1
        writer.fs.cache.drop(block)
        writer.fs.cache.admit({block: bytes(spoilt)})
        with pytest.raises(Corrupt) as caught:
            writer.inode(number)
        assert caught.value.check is Check.INODE_CHECKSUM


def test_blocks_outside_the_file_system_are_refused() -> None:
    with Writer(image("-t ext4", 4096)) as writer, Transaction(writer.fs) as tx:
        for block in (-1, writer.fs.geometry.blocks):
            with pytest.raises(Corrupt) as caught:
                tx.create(block)
            assert caught.value.check is Check.BLOCK_RANGE
            with pytest.raises(Corrupt):
                tx.edit(block)


# ---- batches ---------------------------------------------------------------------------------------------------------

def test_commit_first_leaves_no_trace_and_fits_afterwards() -> None:
    with Writer(image("-t ext4 -b 1024", 4096), batch_blocks=4) as writer:
        writer.change(lambda tx: tx.create(3000) and None)
        writer.change(lambda tx: tx.create(3001) and None)
        before = state(writer)
        with pytest.raises(CommitFirst), Transaction(writer.fs) as tx:
            for block in (3000, 3002, 3003, 3004):
                tx.create(block)
            tx.freed(5, 3)
            tx.after_commit(stop)
        assert state(writer) == before
        with Transaction(writer.fs) as tx:
            tx.create(3000)
            tx.create(3002)
        assert len(writer.fs.writing.batch.blocks) == 3  # type: ignore[union-attr]
        writer.commit()
        with Transaction(writer.fs) as tx:
            for block in range(3010, 3020):
                tx.create(block)  # a batch of its own, however large


@pytest.mark.parametrize("open_already", [False, True])
def test_what_is_too_large_for_any_batch_fails_alone(open_already: bool) -> None:
    with Writer(image("-t ext4 -b 1024", 4096), batch_blocks=4) as writer:
        assert writer.fs.writing is not None
        writer.fs.writing.limits = BatchLimits(4, 9)
        if open_already:
            writer.change(lambda tx: tx.create(3000) and None)
        before = state(writer)
        with pytest.raises(Refused) as refused, Transaction(writer.fs) as tx:
            for block in range(3010, 3020):
                tx.create(block)
            tx.freed(5, 3)
            tx.after_commit(stop)
        assert refused.value.errno == errno.ENOSPC and state(writer) == before
        writer.change(lambda tx: [tx.create(block) for block in range(3010, 3019)] and None)
        assert len(writer.fs.writing.batch.blocks) == 9


def revoke(tx: Transaction, blocks: Iterable[int]) -> None:
    for block in blocks:
        tx.revoke(block)


def test_revocations_count_against_the_batch() -> None:
    with Writer(image("-t ext4 -b 1024", 4096), batch_blocks=10) as writer:
        in_block = writer.block_bytes // REVOKE_RECORD_BYTES
        writer.change(lambda tx: tx.create(3000) and None)
        for first in range(3100, 3100 + 9 * in_block, in_block):
            writer.change(revoke, range(first, first + in_block))
        assert writer.closed == 0
        writer.change(revoke, [3001])
        assert writer.closed == 1, "the batch grew past what the journal can take"


def test_a_freed_metadata_block_leaves_the_batch_and_the_cache() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        start = writer.change(lambda tx: alloc.allocate(tx, 3000, 2)).start
        writer.change(lambda tx: (tx.create(start), tx.create(start + 1)))
        writer.change(lambda tx: alloc.free(tx, start, 1, metadata=True))
        batch = writer.fs.writing.batch  # type: ignore[union-attr]
        assert start not in batch.blocks and start in batch.revoked and start + 1 in batch.blocks
        assert not writer.fs.cache.holds(start)
        writer.change(lambda tx: tx.create(start) and None)
        assert start not in batch.revoked and start in batch.blocks
        writer.change(lambda tx: tx.revoke(start))
        assert start in batch.revoked and start not in batch.blocks
        with Transaction(writer.fs) as tx:
            tx.create(start)
            tx.revoke(start)
            assert tx.is_revoked(start)
        assert start in batch.revoked and start not in batch.blocks
        with Transaction(writer.fs) as tx:
            tx.revoke(start)
            tx.create(start)
            assert not tx.is_revoked(start)
        assert start not in batch.revoked and start in batch.blocks


def test_what_a_transaction_frees_it_does_not_take_again() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        run = writer.change(lambda tx: alloc.allocate(tx, 2000, 50))

        def free_and_take(tx: Transaction) -> alloc.Run:
            alloc.free(tx, run.start, run.length)
            return alloc.allocate(tx, run.start, run.length)

        again = writer.change(free_and_take)
        assert not set(range(run.start, run.start + run.length)) & set(range(again.start, again.start + again.length))
        with Transaction(writer.fs) as tx:
            taken = alloc.allocate(tx, 3500, 1)
            alloc.free(tx, taken.start, 1)
            assert alloc.allocate(tx, taken.start, 1) != taken
            raise_if_used = alloc.allocate(tx, run.start, 1)
            assert raise_if_used.start not in range(run.start, run.start + run.length)


def test_batches_on_their_way_keep_what_they_freed() -> None:
    """Batches become durable one after the other; until then nobody gets what they freed."""
    choose = seeded()
    with Writer(image("-t ext4 -b 1024", 2048)) as writer:
        fs = writer.fs
        mine: set[int] = set()
        waiting: list[tuple[Any, set[int]]] = []
        freed: set[int] = set()
        for _ in range(400):
            kind = choose.random()
            if kind < 0.5:
                try:
                    with Transaction(fs) as tx:
                        run = alloc.allocate(tx, choose.randrange(2048), choose.randrange(1, 60))
                        got = set(range(run.start, run.start + run.length))
                except (Refused, CommitFirst):
                    continue
                except BlockMiss as miss:
                    fs.cache.admit(writer.fetch(miss.runs))
                    continue
                held = freed.union(*(blocks for _, blocks in waiting))
                assert not got & (mine | held), "in use, or freed in a batch that is not durable"
                mine |= got
            elif kind < 0.85 and mine:
                start = choose.choice(sorted(mine))
                length = 1
                while start + length in mine and length < 20:
                    length += 1
                writer.change(lambda tx, s=start, n=length: alloc.free(tx, s, n))
                freed |= set(range(start, start + length))
                mine -= freed
            elif kind < 0.93:
                waiting.append((commit.close(fs, 0), freed))
                freed = set()
            elif waiting:
                closed, _ = waiting.pop(0)
                commit.durable(fs, closed)
        for closed, _ in waiting:
            commit.durable(fs, closed)
        commit.durable(fs, commit.close(fs, 0))
        assert fs.writing is not None and fs.writing.held.count == 0 and not fs.writing.held._masks


def test_a_block_goes_home_once_and_newer_ones_stay() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        fs = writer.fs
        writer.change(lambda tx: tx.create(3000) and None)
        first = commit.close(fs, 0)
        writer.change(lambda tx: tx.edit(3000).__setitem__(0, 9))
        second = commit.close(fs, 0)
        commit.home(fs, first.entries)
        assert 3000 in fs.cache._pinned and fs.cache.read(3000)[0] == 9
        writer.change(lambda tx: tx.revoke(3000))
        commit.home(fs, second.entries)
        assert not fs.cache.holds(3000), "freed meanwhile: what was there is nobody's"


# ---- counters and the state of the superblock ------------------------------------------------------------------------

def counters(writer: Writer) -> tuple[int, int, int, int]:
    """(free blocks, free inodes) of the superblock, and the same as the sums over the groups."""
    fs = writer.fs
    blocks = superstore.get(fs, "free_blocks_count_lo")
    if fs.is_64bit:
        blocks |= superstore.get(fs, "free_blocks_count_hi") << 32
    descs = [writer.run(group.load, number) for number in range(fs.geometry.groups)]
    return (blocks, superstore.get(fs, "free_inodes_count"), sum(desc.free_blocks for desc in descs),
            sum(desc.free_inodes for desc in descs))


class Actor:
    """Random operations on names, data and attributes of one file system."""

    def __init__(self, writer: Writer, choose: random.Random) -> None:
        self.writer, self.choose = writer, choose
        self.files: dict[bytes, int] = {}
        self.folders = {b"": 2}

    def step(self) -> None:
        actions = [self.create, self.create, self.mkdir, self.grow, self.grow, self.cut, self.attribute, self.unlink]
        try:
            self.choose.choice(actions)()
        except Refused as error:
            assert error.errno in (errno.ENOSPC, errno.EEXIST, errno.ENOENT, errno.ENODATA, errno.ENOTEMPTY)

    def create(self) -> None:
        folder = self.choose.choice(sorted(self.folders))
        name = b"%d" % self.choose.randrange(1 << 30) * self.choose.randrange(1, 8)
        made = self.writer.change(lambda tx: namestore.create(tx, tx.inode(self.folders[folder]), name, 0o644, ROOT))
        self.files[folder + b"/" + name] = made.number

    def mkdir(self) -> None:
        if len(self.folders) < 30:
            folder, name = self.choose.choice(sorted(self.folders)), b"%d" % self.choose.randrange(1 << 30)
            made = self.writer.change(lambda tx: namestore.mkdir(tx, tx.inode(self.folders[folder]), name, 0o755, ROOT))
            self.folders[folder + b"/" + name] = made.number

    def grow(self) -> None:
        if self.files:
            number, at = self.files[self.choose.choice(sorted(self.files))], self.choose.randrange(2000)
            count = self.choose.choice([1, 1, 3, 50])

            def allocate(tx: Transaction) -> None:
                of = tx.inode(number)
                if iomap.find(tx, of, at).start is None:
                    of, run = mapping.allocate(tx, of, at, count, unwritten=False)
                    inodestore.change(tx, of, size=max(of.size, tx.geometry.byte_of(at + run.length)))

            self.writer.change(allocate)

    def cut(self) -> None:
        if self.files:
            number = self.files[self.choose.choice(sorted(self.files))]
            size = self.choose.randrange(2000 * self.writer.block_bytes)
            if size < self.writer.inode(number).size:
                self.writer.change(lambda tx: truncate.set_size(tx, tx.inode(number), size))
                while not self.writer.change(lambda tx: truncate.shrink(tx, tx.inode(number)))[1]:
                    pass

    def attribute(self) -> None:
        if self.files:
            number, name = self.files[self.choose.choice(sorted(self.files))], b"n%d" % self.choose.randrange(3)
            value = self.choose.choice([None, b"same" * 60, self.choose.randbytes(self.choose.randrange(500))])
            self.writer.change(lambda tx: xattrwrite.put(tx, tx.inode(number), 1, name, value))

    def unlink(self) -> None:
        if self.files:
            path = self.choose.choice(sorted(self.files))
            folder, _, name = path.rpartition(b"/")
            victim = self.writer.change(lambda tx: namestore.unlink(tx, tx.inode(self.folders[folder]), name))
            del self.files[path]
            while not self.writer.change(lambda tx: inodefree.release(tx, tx.inode(victim.number))):
                pass


@pytest.mark.parametrize("form", FORMS)
def test_counters_equal_the_bitmaps_at_each_close(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = seeded()
    with Writer(image(f"{form} -N 600", 6 << 10), batch_blocks=25) as writer:
        actor = Actor(writer, choose)
        for _ in range(4):
            for _ in range(60):
                if choose.random() < 0.2:
                    with injected(choose.randrange(1, 30), monkeypatch):
                        try:
                            actor.step()
                        except Injected:
                            resolve(actor)
                else:
                    actor.step()
            writer.check()
            blocks, inodes, blocks_counted, inodes_counted = counters(writer)
            assert (blocks, inodes) == (blocks_counted, inodes_counted)
            check_views(writer)
        assert writer.closed > 4


def resolve(actor: Actor) -> None:
    """After a failure between two transactions of one action."""
    settle(actor.writer)
    actor.files = {path: number for path, number in actor.files.items() if actor.writer.inode(number).links}


def test_a_second_turn_at_writing_counts_anew() -> None:
    """Read-only again and then writable again (remount): the counters of the first turn are not remembered."""
    with Writer(image("-t ext4", 4096)) as writer:
        writer.change(op_mkdir)
        writer.commit()
        writer.fs.writing = None
        writer.run(commit.start_writing, BatchLimits(1000))
        writer.change(lambda tx: superstore.change(tx, lpf_ino=0))
        writer.check()


def test_a_batch_seals_what_it_holds() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        prepare(writer)
        writer.change(op_mkdir)
        closed = commit.close(writer.fs, 1_700_000_000)
        assert not any(entry.seals for entry in closed.entries.values())
        fs: Ext4 = writer.fs
        assert fs.writing is not None and fs.writing.batch.is_empty
        assert superstore.get(fs, "wtime") == 1_700_000_000
        raw = closed.blocks[1]
        assert struct.unpack_from("<I", raw, 0x10)[0] == fs.writing.free_inodes
        writer.commit()
