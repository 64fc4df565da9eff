"""Inodes: decoded, checked, immutable.  Kernel documentation, ext4, "Index Nodes"."""

import stat
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from . import checksum, group, layout
from .errors import Check, Corrupt
from .features import Feature
from .units import ROOT_INODE, InodeNumber

if TYPE_CHECKING:
    from .filesystem import Ext4

FLAG_SYNC = 0x8
FLAG_IMMUTABLE = 0x10
FLAG_APPEND = 0x20
FLAG_NODUMP = 0x40
FLAG_NOATIME = 0x80
FLAG_ENCRYPT = 0x800
FLAG_INDEX = 0x1000
FLAG_DIRSYNC = 0x10000
FLAG_TOPDIR = 0x20000
FLAG_HUGE_FILE = 0x40000
FLAG_EXTENTS = 0x80000
FLAG_VERITY = 0x100000
FLAG_EA_INODE = 0x200000
FLAG_DAX = 0x2000000
FLAG_INLINE_DATA = 0x10000000
FLAG_PROJINHERIT = 0x20000000
FLAG_CASEFOLD = 0x40000000

BASE_BYTES = 128
READAHEAD_BLOCKS = 32  # as many neighbours of an inode table block as the kernel reads with it
_KNOWN_KINDS = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO,
                          stat.S_IFSOCK))
DEVICES = frozenset((stat.S_IFCHR, stat.S_IFBLK))
_EXTRA_AT = tuple(layout.INODE_EXTRA.offsets[name] for name in layout.INODE_EXTRA.fields)
_CRTIME_AT = layout.INODE_EXTRA.offsets["crtime"]
_NO_EXTRA = (0,) * len(_EXTRA_AT)

Time = tuple[int, int]  # seconds since 1970, nanoseconds
NEVER: Time = (0, 0)


class Inode:
    """One inode as the disk has it.  It lives as long as the block it was decoded from; see ``blocks``.

    ``memo`` is one free slot for the layer above, ``mapping`` and ``attributes`` are for the modules that decode the
    block array and the extended attributes further.
    """

    __slots__ = ("atime", "attributes", "block", "crtime", "ctime", "extra_isize", "file_acl", "flags", "generation",
                 "gid", "kind", "links", "mapping", "memo", "mode", "mtime", "number", "project", "raw", "rdev",
                 "sectors", "size", "uid", "version")

    number: InodeNumber
    raw: bytes                      # the whole on-disk record
    mode: int
    kind: int                       # the S_IFMT bits of mode
    uid: int
    gid: int
    size: int                       # bytes
    links: int
    sectors: int                    # 512-byte units
    flags: int
    generation: int
    block: bytes                    # the 60 bytes of i_block
    file_acl: int                   # block of extended attributes, 0 for none
    extra_isize: int
    atime: Time
    ctime: Time
    mtime: Time
    crtime: Time | None
    rdev: tuple[int, int]           # major, minor
    project: int
    version: int
    memo: Any
    mapping: Any
    attributes: Any

    def clone(self) -> "Inode":
        """A copy to be changed; what was made from the inode by layers above is not copied."""
        new = Inode()
        (new.atime, new.attributes, new.block, new.crtime, new.ctime, new.extra_isize, new.file_acl, new.flags,
         new.generation, new.gid, new.kind, new.links, new.mapping, new.mode, new.mtime, new.number, new.project,
         new.raw, new.rdev, new.sectors, new.size, new.uid, new.version) = _COPIED(self)
        new.memo = None
        return new

    @property
    def is_dir(self) -> bool:
        return self.kind == stat.S_IFDIR

    @property
    def is_regular(self) -> bool:
        return self.kind == stat.S_IFREG

    @property
    def is_symlink(self) -> bool:
        return self.kind == stat.S_IFLNK

    @property
    def is_encrypted(self) -> bool:
        return bool(self.flags & FLAG_ENCRYPT)

    @property
    def is_verity(self) -> bool:
        return bool(self.flags & FLAG_VERITY)

    @property
    def is_inline(self) -> bool:
        return bool(self.flags & FLAG_INLINE_DATA)

    @property
    def is_casefold(self) -> bool:
        return bool(self.flags & FLAG_CASEFOLD)

    @property
    def has_extents(self) -> bool:
        return bool(self.flags & FLAG_EXTENTS)


def blank(number: InodeNumber, extra_isize: int) -> Inode:
    """An inode of which nothing is known but how far its fields reach behind the first 128 bytes."""
    new = _BLANK.clone()
    new.number, new.extra_isize = number, extra_isize
    return new


def _blank() -> Inode:
    new = Inode()
    for name in Inode.__slots__:
        setattr(new, name, 0)
    new.raw, new.block = b"", bytes(60)
    new.atime = new.ctime = new.mtime = NEVER
    new.crtime = None
    new.rdev = (0, 0)
    new.memo = new.mapping = new.attributes = None
    return new


_COPIED = attrgetter(*(name for name in Inode.__slots__ if name != "memo"))
_BLANK = _blank()


def load(fs: "Ext4", number: int) -> Inode:
    """The inode of a number that anything may have named.

    Raises:
        Corrupt: the number is out of range, or the inode on disk breaks a rule.
        BlockMiss: for its block and the neighbours that are likely to be wanted next.
    """
    geometry = fs.geometry
    if not 1 <= number <= geometry.inodes:
        raise Corrupt(Check.INODE_NUMBER, inode=number)
    in_group, index = geometry.group_of_inode(number)
    table = fs.tables.get(in_group)
    if table is None:
        table = fs.tables[in_group] = group.load(fs, in_group).inode_table
    block, offset = geometry.inode_place(index)
    cache = fs.cache
    if not cache.holds(table + block):
        _read_ahead(fs, table, block)
    entry = cache.entry(table + block)
    found: Inode | None = entry.views.get(number)
    if found is None:
        raw = bytes(entry.data[offset:offset + geometry.inode_bytes])
        if number not in entry.seals:
            _verify(fs, number, raw)
        found = entry.views[number] = decode(fs, InodeNumber(number), raw)
    return found


def places(fs: "Ext4", numbers: list[int]) -> list[tuple[int, int] | None]:
    """(block of the inode table, byte offset in it) of each inode, None for one that has no place; no inode is read.

    So their blocks can be wanted together.  Raises ``BlockMiss`` for group descriptors.
    """
    geometry, tables, found = fs.geometry, fs.tables, list[tuple[int, int] | None]()
    for number in numbers:
        in_group, index = geometry.group_of_inode(number)
        table = tables.get(in_group)
        if table is None or not 1 <= number <= geometry.inodes:
            found.append(_place(fs, number))
        else:
            block, offset = geometry.inode_place(index)
            found.append((table + block, offset))
    return found


def _place(fs: "Ext4", number: int) -> tuple[int, int] | None:
    if not 1 <= number <= fs.geometry.inodes:
        return None
    in_group, index = fs.geometry.group_of_inode(number)
    try:
        table = fs.tables[in_group] = group.load(fs, in_group).inode_table
    except Corrupt:
        return None
    block, offset = fs.geometry.inode_place(index)
    return table + block, offset


def _read_ahead(fs: "Ext4", table: int, block: int) -> None:
    first = block - block % READAHEAD_BLOCKS
    last = min(first + READAHEAD_BLOCKS, fs.geometry.inode_table_blocks())
    fs.cache.want(range(table + first, table + last))


def decode(fs: "Ext4", number: InodeNumber, raw: bytes) -> Inode:
    """The inode in a raw record, not verified.  Raises ``Corrupt(INODE_EXTRA_SIZE)``."""
    inode = Inode()
    inode.number, inode.raw, inode.memo, inode.mapping, inode.attributes = number, raw, None, None, None
    (inode.mode, uid_lo, size_lo, atime, ctime, mtime, _, gid_lo, inode.links, blocks_lo, inode.flags, version_lo,
     inode.block, inode.generation, acl_lo, size_hi, _, blocks_hi, acl_hi, uid_hi, gid_hi,
     _, _) = layout.INODE.unpack(raw)
    inode.kind = inode.mode & 0o170000
    inode.uid, inode.gid = uid_lo | uid_hi << 16, gid_lo | gid_hi << 16
    inode.file_acl = acl_lo | (acl_hi << 32 if fs.is_64bit else 0)
    _decode_extra(fs, inode, raw, (atime, ctime, mtime), version_lo)
    inode.size = size_lo | (size_hi << 32 if inode.is_regular or fs.has_large_dir else 0)
    inode.sectors = _sectors(fs, inode.flags, blocks_lo, blocks_hi)
    inode.rdev = device_of(inode.block) if inode.kind in DEVICES else (0, 0)
    return inode


def _decode_extra(fs: "Ext4", inode: Inode, raw: bytes, times: tuple[int, int, int], version_lo: int) -> None:
    """The fields after the first 128 bytes, each only if ``extra_isize`` reaches over it (0: it was never set)."""
    reach, values = 0, _NO_EXTRA
    inode.extra_isize = 0
    if len(raw) > BASE_BYTES:
        values = layout.INODE_EXTRA.unpack(raw, BASE_BYTES)
        inode.extra_isize = reach = values[0]
        if reach % 4 or BASE_BYTES + reach > len(raw):
            raise Corrupt(Check.INODE_EXTRA_SIZE, inode=inode.number, extra_isize=reach)
        reach = reach or layout.INODE_EXTRA.size
        if reach < layout.INODE_EXTRA.size:
            values = tuple(value if at + 4 <= reach else 0 for at, value in zip(_EXTRA_AT, values, strict=True))
    _, _, ctime, mtime, atime, crtime, crtime_extra, version_hi, project = values
    inode.atime = _time(times[0], atime)
    inode.ctime = _time(times[1], ctime)
    inode.mtime = _time(times[2], mtime)
    inode.crtime = _time(crtime, crtime_extra) if reach > _CRTIME_AT else None
    inode.version = version_lo | version_hi << 32
    inode.project = project if fs.has_project else 0


def _verify(fs: "Ext4", number: int, raw: bytes) -> None:
    if fs.has_checksums and not checksum.inode_ok(raw, number, fs.superblock.seed):
        raise Corrupt(Check.INODE_CHECKSUM, inode=number)


def _time(seconds: int, extra: int) -> Time:
    """Signed 32-bit seconds, moved on by the two epoch bits, with nanoseconds; "Inode Timestamps"."""
    signed = seconds - (1 << 32) if seconds & 0x80000000 else seconds
    return signed + ((extra & 3) << 32), min(extra >> 2, 999_999_999)


def _sectors(fs: "Ext4", flags: int, low: int, high: int) -> int:
    if not fs.has_huge_file:
        return low
    count = low | high << 32
    return count << (fs.geometry.block_bits - 9) if flags & FLAG_HUGE_FILE else count


def device_of(block: bytes) -> tuple[int, int]:
    """(major, minor): 8 and 8 bits in the first word if it is not 0, else 12 and 20 bits in the second."""
    old, new = int.from_bytes(block[0:4], "little"), int.from_bytes(block[4:8], "little")
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xFFF00


def check_in_use(fs: "Ext4", inode: Inode) -> Inode:
    """The inode, if a directory entry may name it.

    Raises ``Corrupt``: it is free, of no known kind, reserved for the file system itself, or its flags and size
    contradict each other.
    """
    number = inode.number
    if (number < fs.superblock.first_inode and number != ROOT_INODE) or number in fs.superblock.special_inodes:
        raise Corrupt(Check.DIRENT_INODE, inode=number)
    if inode.links == 0:
        raise Corrupt(Check.INODE_FREE, inode=number)
    if inode.kind not in _KNOWN_KINDS:
        raise Corrupt(Check.INODE_MODE, inode=number, mode=f"{inode.mode:#o}")
    if inode.size > (fs.geometry.byte_of(fs.geometry.blocks) if inode.is_dir else fs.max_file_bytes(inode)):
        raise Corrupt(Check.INODE_SIZE, inode=number, size=inode.size)
    _check_flags(fs, inode)
    return inode


def _check_flags(fs: "Ext4", inode: Inode) -> None:
    features, flags = fs.superblock.features, inode.flags
    for flag, feature in ((FLAG_EXTENTS, Feature.EXTENTS), (FLAG_INLINE_DATA, Feature.INLINE_DATA),
                          (FLAG_ENCRYPT, Feature.ENCRYPT), (FLAG_CASEFOLD, Feature.CASEFOLD)):
        if flags & flag and feature not in features:
            raise Corrupt(Check.INODE_FLAGS, inode=inode.number, flags=f"{flags:#x}", without=feature.title)
    if flags & FLAG_EA_INODE or (flags & FLAG_VERITY and not inode.is_regular):
        raise Corrupt(Check.INODE_FLAGS, inode=inode.number, flags=f"{flags:#x}")
