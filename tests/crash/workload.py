"""Seeded operations on a ``Machine``, and the model of what they make of the files.

Each operation is done as the server does it: in transactions, with the data written between them.  The model changes
when the transaction that shows the change has applied; a ``Refused`` operation changes nothing.
"""

from __future__ import annotations

import random
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fusewire import filewrite
from fusewire.ext4 import inodefree, iomapwrite, namestore, rename, setattr, truncate
from fusewire.ext4.errors import Refused
from fusewire.ext4.features import Feature
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from fusewire.ext4.units import ROOT_INODE
from tests.crash.machine import Aborted, Machine
from tests.crash.model import Node, Snapshot, walk

ROOT = Caller(0, 0)
NODES_MOST = 60
FILE_MOST_BYTES = 120_000
NAMES_IN_MASS = 40


class Workload:
    """Random operations on a machine; ``chance`` decides all of them."""

    def __init__(self, machine: Machine, chance: random.Random, root: Node | None = None) -> None:
        """``root`` holds what is in the file system already."""
        self.machine, self.chance = machine, chance
        self.root = root or Node(ROOT_INODE, stat.S_IFDIR | 0o755, 3)
        self.nameless: list[Node] = []
        machine.snapshot = lambda: Snapshot(self.root)
        self.done: dict[str, int] = {}
        self.refused = 0
        self.data_events: set[int] = set()      # which of the device's events are writes of file data
        self._names = self._tag = chance.randrange(1 << 30)     # nothing that an earlier workload has used
        self.kinds: list[tuple[Callable[[], None], int]] = [
            (self.create, 8), (self.mkdir, 3), (self.symlink, 3), (self.link, 3), (self.unlink, 5), (self.rmdir, 2),
            (self.rename, 6), (self.append, 10), (self.overwrite, 5), (self.write_far, 3), (self.truncate, 5),
            (self.set_xattr, 5), (self.chmod, 3), (self.tmpfile, 1), (self.crowd, 1), (self.replace, 3),
            (self.remount, 1)]
        self.has_extents = Feature.EXTENTS in machine.fs.superblock.features
        if self.has_extents:
            self.kinds += [(self.reserve, 3), (self.punch, 4), (self.zero, 2)]

    # ---- driving

    def run(self, operations: int, commits: float = 0.08, leisure: float = 0.05) -> None:
        """So many operations, with commits asked for, and the committer's thread going on, in between.

        Ends early, with everything told, if the committer fails.
        """
        try:
            for _ in range(operations):
                self.operate()
                while self.chance.random() < 0.5 and self.machine.step():
                    pass
                if self.chance.random() < commits:
                    self.machine.ask()
                if self.chance.random() < commits / 4:
                    self.machine.sync()
                if self.chance.random() < leisure:
                    self.machine.committer.checkpoint()
        except Aborted:
            pass
        self.machine.settle()

    def operate(self) -> None:
        """One operation."""
        self.clear_due()
        kind = self.chance.choices([kind for kind, _ in self.kinds], [weight for _, weight in self.kinds])[0]
        try:
            kind()
        except Refused:
            self.refused += 1
        else:
            self.done[kind.__name__] = self.done.get(kind.__name__, 0) + 1

    def breathe(self) -> None:
        """A moment within an operation: the committer's thread may get on."""
        while self.chance.random() < 0.3 and self.machine.step():
            pass

    def finish(self) -> None:
        """Close what is open without a name, and put the file system away.  Raises OSError."""
        while self.nameless:
            self._free(self.nameless.pop())
        self.machine.sync()
        self.clear_due()
        self.machine.finish()

    def remount(self) -> None:
        """Read-only and, perhaps when everything for that is done, for writing again."""
        self.machine.rest(True)
        if self.chance.random() < 0.5:
            self.machine.settle()
        self.breathe()
        self.machine.rest(False)

    # ---- choosing

    def some(self, wanted: Callable[[Node], bool]) -> tuple[Node, bytes, Node]:
        """(directory, name, node) of a node that is ``wanted``; ``Refused`` if there is none."""
        parents = [self.root, *(node for _, node in walk(self.root) if node.is_dir)]
        found = [(parent, name, node) for parent in parents for name, node in parent.children.items() if wanted(node)]
        if not found:
            raise Refused(2)
        return self.chance.choice(found)

    def directory(self) -> Node:
        return self.chance.choice([self.root, *(node for _, node in walk(self.root) if node.is_dir)])

    def name(self) -> bytes:
        self._names += 1
        return b"%d" % self._names + b"n" * self.chance.choice((0, 3, 30, 200))

    def fresh_bytes(self, count: int) -> bytes:
        """Bytes that occur nowhere else."""
        self._tag += 1
        return random.Random(self._tag).randbytes(count)

    def file(self) -> Node:
        return self.some(lambda node: node.is_file)[2]

    # ---- names

    def create(self) -> None:
        if sum(1 for _ in walk(self.root)) > NODES_MOST:
            raise Refused(28)
        parent, name, mode = self.directory(), self.name(), stat.S_IFREG | self.chance.choice((0o644, 0o600, 0o755))
        made = self._at(parent, namestore.create, name, mode, ROOT)
        parent.children[name] = Node(made.number, mode)

    def mkdir(self) -> None:
        parent, name = self.directory(), self.name()
        made = self._at(parent, namestore.mkdir, name, 0o755, ROOT)
        parent.children[name] = Node(made.number, stat.S_IFDIR | 0o755, 2)
        parent.links += 1

    def symlink(self) -> None:
        parent, name, target = self.directory(), self.name(), b"t" * self.chance.choice((5, 59, 60, 500))
        made = self._at(parent, namestore.symlink, name, target, ROOT)
        parent.children[name] = Node(made.number, stat.S_IFLNK | 0o777, data=target)

    def link(self) -> None:
        node, parent, name = self.file(), self.directory(), self.name()
        self.machine.change(lambda tx: namestore.link(tx, tx.inode(node.number), tx.inode(parent.number), name))
        node.links += 1
        parent.children[name] = node

    def tmpfile(self) -> None:
        """A file without a name; some get one later, the others stay."""
        parent = self.directory()
        made = self._at(parent, namestore.tmpfile, 0o600, ROOT)
        node = Node(made.number, stat.S_IFREG | 0o600, 0)
        self.nameless.append(node)
        self._write(node, 0, self.fresh_bytes(self.chance.choice((10, 3000))))
        if self.chance.random() < 0.5:
            name = self.name()
            self.machine.change(lambda tx: namestore.link(tx, tx.inode(node.number), tx.inode(parent.number), name))
            self.nameless.remove(node)
            node.links, parent.children[name] = 1, node

    def unlink(self) -> None:
        parent, name, node = self.some(lambda node: not node.is_dir)
        self._at(parent, namestore.unlink, name)
        del parent.children[name]
        self._dropped(node)

    def rmdir(self) -> None:
        parent, name, node = self.some(lambda node: node.is_dir)
        self._at(parent, namestore.rmdir, name)
        del parent.children[name]
        parent.links -= 1
        self._release(node)

    def rename(self) -> None:
        """To a new name, or exchanging two."""
        parent, name, node = self.some(lambda node: True)
        target, new = self.directory(), self.name()
        flags = self.chance.choice((0, 0, rename.NOREPLACE, rename.EXCHANGE))
        if flags == rename.EXCHANGE:
            target, new, other = self.some(lambda other: other.is_dir == node.is_dir)
        self._rename(parent, name, target, new, flags)
        if flags == rename.EXCHANGE:
            parent.children[name], target.children[new] = other, node
            return
        del parent.children[name]
        target.children[new] = node
        if node.is_dir:
            parent.links -= 1
            target.links += 1

    def replace(self) -> None:
        """A new content by the usual steps: write aside, fsync, rename over."""
        parent, name, old = self.some(lambda node: node.is_file)
        aside = self.name()
        made = self._at(parent, namestore.create, aside, stat.S_IFREG | 0o644, ROOT)
        node = parent.children[aside] = Node(made.number, stat.S_IFREG | 0o644)
        self._write(node, 0, self.fresh_bytes(self.chance.choice((100, 5000))))
        self.machine.ask()
        self._rename(parent, aside, parent, name, 0)
        del parent.children[aside]
        parent.children[name] = node
        self._dropped(old)

    def _rename(self, parent: Node, name: bytes, target: Node, new: bytes, flags: int) -> None:
        self.machine.change(lambda tx: rename.rename(tx, tx.inode(parent.number), name, tx.inode(target.number), new,
                                                     flags, ROOT))

    def crowd(self) -> None:
        """Many names in a directory, and away again: blocks of directories come and go."""
        parent, name = self.directory(), self.name()
        made = self._at(parent, namestore.mkdir, name, 0o755, ROOT)
        node = parent.children[name] = Node(made.number, stat.S_IFDIR | 0o755, 2)
        parent.links += 1
        for index in range(NAMES_IN_MASS):
            below = b"%03d" % index + b"m" * 100
            made = self._at(node, namestore.symlink, below, b"x", ROOT)
            node.children[below] = Node(made.number, stat.S_IFLNK | 0o777, data=b"x")
            self.breathe()
        if self.chance.random() < 0.5:
            self.machine.ask()
        for below in list(node.children):
            self._at(node, namestore.unlink, below)
            gone = node.children.pop(below)
            self._dropped(gone)
        self._at(parent, namestore.rmdir, name)
        del parent.children[name]
        parent.links -= 1
        self._release(node)

    def _at(self, parent: Node, operation: Callable[..., Any], *arguments: object) -> Any:
        return self.machine.change(lambda tx: operation(tx, tx.inode(parent.number), *arguments))

    def _dropped(self, node: Node) -> None:
        node.links -= 1
        if not node.links:
            self._release(node)

    def _release(self, node: Node) -> None:
        """Free a node that lost its last name; some stay open, and so orphans."""
        if self.chance.random() < 0.1:
            self.nameless.append(node)
        else:
            self.breathe()
            self._free(node)

    def _free(self, node: Node) -> None:
        while not self.machine.change(lambda tx: inodefree.release(tx, tx.inode(node.number))):
            self.breathe()

    # ---- content

    def append(self) -> None:
        node = self.file()
        if len(node.data) > FILE_MOST_BYTES:
            raise Refused(28)
        self._write(node, len(node.data), self.fresh_bytes(self.chance.choice((1, 100, 1024, 5000, 20_000))))

    def overwrite(self) -> None:
        node = self.file()
        if node.data:
            at = self.chance.randrange(len(node.data))
            self._write(node, at, self.fresh_bytes(self.chance.choice((1, 700, 4096))))

    def write_far(self) -> None:
        """Behind the end, with a hole between."""
        node = self.file()
        if len(node.data) > FILE_MOST_BYTES:
            raise Refused(28)
        self._write(node, len(node.data) + self.chance.choice((10, 3000, 30_000)), self.fresh_bytes(200))

    def truncate(self) -> None:
        node = self.file()
        size = self.chance.choice((0, len(node.data) // 2, len(node.data) + 1000, self.chance.randrange(30_000)))
        self.machine.change(self._resize, node.number, size)
        node.data = node.data[:size].ljust(size, b"\0")
        self._shrink(node)

    def clear_due(self) -> None:
        """Zeroes behind the ends of the files whose cut has become durable."""
        while self.machine.due:
            with suppress(Refused):     # the device failed: recovery clears it
                self.machine.change(self._clear, self.machine.due.pop())

    def _clear(self, tx: Transaction, number: int) -> None:
        found = tx.inode(number)
        assert tx.writing is not None
        if found.is_regular and not tx.writing.cuts.is_open(number):
            for address, pieces in filewrite.plan_clear(tx, found):
                self._device_write(address, pieces)
            truncate.cleared(tx, found)

    def _shrink(self, node: Node) -> None:
        self.breathe()
        while not self.machine.change(lambda tx: truncate.shrink(tx, tx.inode(node.number))[1]):
            self.breathe()

    def reserve(self) -> None:
        """Unwritten blocks behind the end, which stays."""
        node = self.file()
        at, length = len(node.data), self.chance.choice((1000, 50_000))
        reached = at
        while reached < at + length:
            start = reached
            reached = self.machine.change(
                lambda tx: truncate.reserve(tx, tx.inode(node.number), start, at + length - start)[1])  # noqa: B023

    def punch(self) -> None:
        """A hole of whole blocks."""
        node = self.file()
        first, length = self._blocks_of(node)
        while not self.machine.change(lambda tx: truncate.punch(tx, tx.inode(node.number), first, length)[1]):
            pass
        node.data = node.data[:first] + bytes(length) + node.data[first + length:]

    def zero(self) -> None:
        """Whole blocks that read as zeroes from now on, without being freed."""
        node = self.file()
        first, length = self._blocks_of(node)
        self.machine.change(lambda tx: truncate.make_unwritten(tx, tx.inode(node.number), first, length))
        node.data = node.data[:first] + bytes(length) + node.data[first + length:]

    def _blocks_of(self, node: Node) -> tuple[int, int]:
        block_bytes = self.machine.fs.geometry.block_bytes
        blocks = len(node.data) // block_bytes
        if not blocks:
            raise Refused(22)
        first = self.chance.randrange(blocks)
        return first * block_bytes, self.chance.randrange(1, min(blocks - first, 8) + 1) * block_bytes

    def _write(self, node: Node, offset: int, data: bytes) -> None:
        """As the server writes: room for the data, the data, and then they count, all in one transaction.

        What extents map may also be written between two transactions, as a kernel with fuse iomap does.
        """
        after = node.data.ljust(offset, b"\0")[:offset] + data + node.data[offset + len(data):]
        apart = self.has_extents and self.chance.random() < 0.5

        def reserve(tx: Transaction) -> None:
            found, at = tx.inode(node.number), offset
            while at < offset + len(data):
                found, mapping = iomapwrite.begin(tx, found, at, offset + len(data) - at)
                at = mapping.offset + mapping.length

        def move(tx: Transaction) -> None:
            plan = filewrite.plan_write(tx, tx.inode(node.number), offset, memoryview(data))
            node.versions.append((len(self.machine.device.events), after))
            for address, pieces in plan:
                self._device_write(address, pieces)
            if not apart:
                end(tx)

        def end(tx: Transaction) -> None:
            iomapwrite.ioend(tx, tx.inode(node.number), offset, len(data))

        if apart:
            self.machine.change(reserve)
        self.machine.change(move)
        if apart:
            self.breathe()
            self.machine.change(end)
        node.data = after

    def _resize(self, tx: Transaction, number: int, size: int) -> None:
        found = tx.inode(number)
        for address, pieces in filewrite.plan_clear(tx, found) if size > found.size else ():
            self._device_write(address, pieces)
        truncate.set_size(tx, found, size)

    def _device_write(self, address: int, pieces: list[Any]) -> None:
        """A write of data that fails is its caller's error; after a failure of the committer nobody writes any more."""
        if self.machine.committer.failure is not None:
            raise Aborted
        self.data_events.add(len(self.machine.device.events))
        try:
            self.machine.device.write(address, pieces)
        except OSError as error:
            raise Refused(error.errno or 5) from error

    # ---- attributes

    def set_xattr(self) -> None:
        """Small values fit into the inode, large ones need a block."""
        node = self.some(lambda node: node.is_file or node.is_dir)[2]
        name = b"k%d" % self.chance.randrange(3)
        value = self.chance.choice((None, b"v", b"s" * 60, b"l" * 400, self.fresh_bytes(200)))
        if value is None and name not in node.xattrs:
            raise Refused(61)
        self.machine.change(lambda tx: setattr.set_xattr(tx, tx.inode(node.number), b"user." + name, value))
        if value is None:
            del node.xattrs[name]
        else:
            node.xattrs[name] = value

    def chmod(self) -> None:
        node, mode = self.file(), self.chance.choice((0o600, 0o644, 0o4755))

        def change(tx: Transaction) -> None:
            setattr.chmod(tx, tx.inode(node.number), mode)

        self.machine.change(change)
        node.mode = stat.S_IFMT(node.mode) | mode
