"""One open file system: its superblock, its geometry, its block cache and the options it is read with.

``Ext4`` is a context that the modules of operations take first, not a switchboard: callers go to ``namespace``,
``directory``, ``iomap`` and ``xattr`` themselves.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

from . import checksum, group, inode
from .batch import Writing
from .blocks import BlockCache
from .errors import Check, Corrupt, Unsupported
from .features import Feature
from .inode import Inode
from .superblock import Superblock
from .units import ROOT_INODE, FsBlock

DEFAULT_CACHE_BYTES = 64 << 20
MAX_BYTES = (1 << 63) - 1
WAITING_SEARCHES = 1024


class Options(NamedTuple):
    """How a file system is to be read and changed; the names are ext4(5)'s."""

    noload: bool = False        # read it as it stands although its journal holds more
    minixdf: bool = False       # statfs counts the overhead as blocks of the file system
    user_xattr: bool = True
    acl: bool = True
    grpid: bool = False         # new files get the group of their directory
    resuid: int | None = None   # the user, and the group, who may use the reserved blocks; None: as the superblock says
    resgid: int | None = None
    max_dir_size_kb: int = 0    # a directory of so many KiB gets no further block; 0: no limit


class Ext4:
    """An open file system.  Reading anything may raise ``BlockMiss`` (fetch, admit, run again) or ``Corrupt``."""

    def __init__(self, superblock: Superblock, cache: BlockCache | None = None, options: Options | None = None) -> None:
        geometry = superblock.geometry
        self.superblock = superblock
        self.geometry = geometry
        self.options = options or Options()
        self.cache = cache or BlockCache(geometry.block_bytes, geometry.blocks, DEFAULT_CACHE_BYTES)
        self.most_readahead = self.cache.generation_blocks // 4  # blocks; an operation needs others beside them
        self.tables: dict[int, FsBlock] = {}  # group → first block of its inode table; fixed when the disk was made
        features = superblock.features
        self.is_64bit = Feature.BIT64 in features
        self.has_large_dir = Feature.LARGE_DIR in features
        self.has_huge_file = Feature.HUGE_FILE in features
        self.has_project = Feature.PROJECT in features
        self.has_file_types = Feature.FILETYPE in features
        self.has_dir_index = Feature.DIR_INDEX in features
        self.free_counts: tuple[int, int] | None = None  # free blocks and inodes, once they were summed
        self.scans: dict[Hashable, Any] = {}  # how far searches that wait for blocks have come; see ``remember``
        self.has_checksums = superblock.has_checksums
        self.writing: Writing | None = None             # set while the file system may be changed
        self._largest = {mapped: _largest_file(superblock, mapped) for mapped in (False, True)}
        if superblock.needs_recovery and not self.options.noload:
            raise Unsupported("the journal holds changes that are not replayed yet; mount it once with the kernel or "
                              "run e2fsck, or read it as it stands with -o noload")

    def check(self) -> Inode:
        """The root directory, with everything between the superblock and it verified."""
        group.load(self, 0)
        root = inode.load(self, ROOT_INODE)
        if not root.is_dir:
            raise Corrupt(Check.INODE_MODE, inode=ROOT_INODE, mode=f"{root.mode:#o}")
        return inode.check_in_use(self, root)

    def inode(self, number: int) -> Inode:
        """The inode of a number; see ``inode.load``."""
        return inode.load(self, number)

    def seed_of(self, of: Inode) -> int:
        """The checksum seed of the blocks that belong to an inode."""
        return checksum.inode_seed(self.superblock.seed, of.number, of.generation)

    def remember(self, search: Hashable, place: object) -> None:
        """Keep how far a search has come that must wait, so that it ends even if its blocks do not fit into the cache.

        Whoever goes on with the search takes the place out of ``scans``.  What is not fetched again is forgotten.
        """
        if len(self.scans) >= WAITING_SEARCHES:
            del self.scans[next(iter(self.scans))]
        self.scans[search] = place

    def max_file_bytes(self, of: Inode) -> int:
        """The largest size that a file of this kind of mapping can have."""
        return self._largest[of.has_extents]

    def largest_file(self, *, extents: bool) -> int:
        """The largest size of a file that extents, or the older block map, can map."""
        return self._largest[extents]


def _largest_file(superblock: Superblock, extents: bool) -> int:
    """What the mapping can address, and what i_blocks can count: 32 bits of sectors without huge_file, else 48."""
    bits = superblock.geometry.block_bits
    counted = (1 << 48) - 1 if Feature.HUGE_FILE in superblock.features else (1 << 32) - 1 >> bits - 9
    if extents:
        return min(min((1 << 32) - 1, counted) << bits, MAX_BYTES)
    return min(_largest_map(superblock.geometry.block_bytes // 4, counted) << bits, MAX_BYTES)


def _largest_map(pointers: int, counted: int) -> int:
    """Blocks of the largest dense file that a block map with so many pointers in a block maps, if it and its pointer
    blocks may be ``counted`` blocks together."""
    direct, double = 12, pointers ** 2
    most = direct + pointers + double + pointers ** 3
    if most + 1 + 1 + pointers + 1 + pointers + double <= counted:
        return most
    beyond = counted - direct - pointers
    if beyond < double:
        return counted - 1 - 1 - -(-beyond // pointers)
    beyond -= double
    return counted - 1 - 1 - pointers - 1 - -(-beyond // pointers) - -(-beyond // double)
