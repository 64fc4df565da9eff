"""What outlives a request: the file system, what was negotiated, and how often the kernel knows each inode.

S1  A node id is an inode number, except that the root is node 1 and inode 2.  (Inode 1, the list of bad blocks, is
    never shown, so nothing else needs node 1; node 2 does not exist.)
S2  A lookup count rises by one for each entry that names a node in a reply, and falls by what FORGET says.
"""

import errno
from array import array
from collections.abc import Callable
from typing import Any

from fusewire import accel
from fusewire.ext4 import units
from fusewire.ext4.errors import Refused
from fusewire.ext4.features import Feature
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.inode import Inode
from fusewire.remount import AS_USUAL, MountFlags
from fusewire.wire import Negotiated

ROOT_NODE = 1
ROOT_INODE = int(units.ROOT_INODE)

PAGE_BITS = 8
PAGE_COUNTS = 1 << PAGE_BITS
_PAGE_MASK = PAGE_COUNTS - 1


class LookupCounts:
    """Lookup counts by inode number: pages of 256, made when needed and dropped when all zero.

    2 KiB a page: a walk of a million files costs 8 MB, where a dict of a million ints would take 100.
    """

    def __init__(self) -> None:
        self._pages: dict[int, array[int]] = {}

    def add(self, number: int) -> None:
        """The kernel was told of this inode once more."""
        page = self._pages.get(number >> PAGE_BITS)
        if page is None:  # the last element counts those that are not zero
            page = self._pages[number >> PAGE_BITS] = array("Q", bytes(8 * (PAGE_COUNTS + 1)))
        index = number & _PAGE_MASK
        if not page[index]:
            page[PAGE_COUNTS] += 1
        page[index] += 1

    def forget(self, number: int, times: int) -> int:
        """The count that is left after the kernel forgot so many; a kernel that forgets too much leaves 0."""
        page = self._pages.get(number >> PAGE_BITS)
        index = number & _PAGE_MASK
        if page is None or not page[index] or not times:
            return page[index] if page is not None else 0
        page[index] = left = max(page[index] - times, 0)
        if not left:
            page[PAGE_COUNTS] -= 1
            if not page[PAGE_COUNTS]:
                del self._pages[number >> PAGE_BITS]
        return left

    def count(self, number: int) -> int:
        """How often the kernel knows this inode."""
        page = self._pages.get(number >> PAGE_BITS)
        return 0 if page is None else page[number & _PAGE_MASK]

    def clear(self) -> None:
        """The connection is gone, and all that the kernel knew with it."""
        self._pages.clear()

    def __len__(self) -> int:
        """How many inodes the kernel knows."""
        return sum(page[PAGE_COUNTS] for page in self._pages.values())


class Durable:
    """A reply that waits until all that was done before it is durable.

    ``only_data``: all but times.  ``settled``: what was freed may be used again, too, so that FITRIM finds it.
    """

    __slots__ = ("only_data", "reply", "settled")

    def __init__(self, reply: bytes, only_data: bool = False, settled: bool = False) -> None:
        self.reply, self.only_data, self.settled = reply, only_data, settled


class WrittenBack:
    """A reply that waits until the kernel has written back what it holds of a file from ``offset`` on."""

    __slots__ = ("node", "offset", "then")

    def __init__(self, node: int, offset: int, then: Callable[[], Any]) -> None:
        self.node, self.offset, self.then = node, offset, then


class Shutdown:
    """A reply after which no access succeeds any more; before it, unless ``at_once``, all that was done is durable."""

    __slots__ = ("at_once", "reply")

    def __init__(self, at_once: bool, reply: Any) -> None:
        self.at_once, self.reply = at_once, reply


class Final:
    """The reply to the last request: sent when the file system has been put away."""

    __slots__ = ("reply",)

    def __init__(self, reply: bytes) -> None:
        self.reply = reply


class Session:
    """One mounted file system as its handlers see it.

    Attributes:
        negotiated: what INIT agreed on; None until then.
        asks_open: whether the kernel shall send OPEN: only then can the open of a file without its key fail.
        read_only: whether changes are refused: from the start, or since one could not be made durable.
        shut: whether every access is refused (EXT4_IOC_SHUTDOWN).
        mounted: how the kernel has it mounted; with ``read_only`` there, it sends no changes but by IOCTL.
        attributes: reads attributes straight from inode tables, where compiled code is available.
        target: where it is mounted, for the superblock.
        unused: inodes without names that the kernel has forgotten; the server has them freed.
        outdated: inodes whose attributes have changed without the kernel's knowing; the server tells it.
    """

    def __init__(self, fs: Ext4, read_only: bool = True, target: bytes = b"",
                 mounted: MountFlags = AS_USUAL) -> None:
        self.target = target
        self.unused: list[int] = []
        self.outdated: set[int] = set()
        self.fs = fs
        self.attributes = accel.Attributes(fs) if accel.AVAILABLE else None
        self.read_only = read_only
        self.shut = False
        self.mounted = mounted
        self.lookups = LookupCounts()
        self.negotiated: Negotiated | None = None
        self.asks_open = Feature.ENCRYPT in fs.superblock.features

    def number_of(self, node: int) -> int:
        """The inode number of a node id.  Refused(ESTALE) for node 2, which is never given out."""
        if node == ROOT_NODE:
            return ROOT_INODE
        if node == ROOT_INODE:
            raise Refused(errno.ESTALE)
        return node

    def inode(self, node: int) -> Inode:
        """The inode of a node id.  Refused(ESTALE) for node 2, which is never given out."""
        if node == ROOT_NODE:
            return self.fs.inode(ROOT_INODE)
        if node == ROOT_INODE:
            raise Refused(errno.ESTALE)
        return self.fs.inode(node)


def node_of(number: int) -> int:
    """The node id of an inode number."""
    return ROOT_NODE if number == ROOT_INODE else number
