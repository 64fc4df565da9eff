"""Inodes as the protocol describes them: entries, attributes and statx records, packed once and kept in ``Inode.memo``.

Nobody but us changes the file system, so everything is valid for ever.

N1  What a ``Memo`` holds was made from its inode view alone, or names the changes after which it is void.
"""

from typing import TYPE_CHECKING

from fusewire import uapi, wire
from fusewire.ext4 import iomap, namespace, verity
from fusewire.ext4.inode import FLAG_APPEND, FLAG_IMMUTABLE, FLAG_NODUMP, FLAG_VERITY, Inode
from fusewire.session import Session, node_of

if TYPE_CHECKING:
    from fusewire.ext4.filesystem import Ext4

ATTR_AT: int = uapi.entry_out.offsets["attr.ino"]   # where fuse_attr begins in fuse_entry_out

# statx(2), linux/stat.h
STATX_BASIC_AND_BTIME = 0xFFF
STATX_BASIC = 0x7FF
_ATTR_COMPRESSED, _ATTR_IMMUTABLE, _ATTR_APPEND, _ATTR_NODUMP = 0x4, 0x10, 0x20, 0x40
_ATTR_ENCRYPTED, _ATTR_VERITY = 0x800, 0x100000
_ATTRIBUTES = ((FLAG_IMMUTABLE, _ATTR_IMMUTABLE), (FLAG_APPEND, _ATTR_APPEND), (FLAG_NODUMP, _ATTR_NODUMP),
               (FLAG_VERITY, _ATTR_VERITY), (0x800, _ATTR_ENCRYPTED))
_ATTRIBUTES_MASK = sum(bit for _, bit in _ATTRIBUTES)


class Memo:
    """What handlers keep beside an inode view.

    Attributes:
        entry: its packed entry.
        checked: whether it was found to be one that a name may lead to.
        mapping: the one that was used last, and how much had been changed then (``Writing.changes``).
        tree: the Merkle tree of a verity file.
    """

    __slots__ = ("changes", "checked", "entry", "mapping", "tree")

    def __init__(self, entry: bytes) -> None:
        self.entry = entry
        self.checked = False
        self.mapping: iomap.Mapping | None = None
        self.changes = 0
        self.tree: verity.Tree | None = None


def memo(fs: "Ext4", inode: Inode) -> Memo:
    """The memo of an inode, made when it is first asked for.  May miss a block for an encrypted symlink."""
    known: Memo | None = inode.memo
    if known is None:
        number = inode.number
        known = inode.memo = Memo(wire.pack_entry(node_of(number), inode.generation, wire.FOREVER, 0, wire.FOREVER, 0,
                                                  _attr(fs, inode)))
    return known


def mapping(fs: "Ext4", inode: Inode, offset: int, end: int) -> iomap.Mapping:
    """The mapping around a byte: the one that was used last, if it reaches as far as ``end`` (saves 10 µs).

    Errors as ``iomap.begin``.
    """
    known = memo(fs, inode)
    changes = 0 if fs.writing is None else fs.writing.changes
    found = known.mapping
    if found is None or known.changes != changes or not found.offset <= offset or end > found.offset + found.length:
        found = known.mapping = iomap.begin(fs, inode, offset, end - offset)
        known.changes = changes
    return found


def entry(fs: "Ext4", inode: Inode) -> bytes:
    """fuse_entry_out (128 bytes) of an inode; its end is fuse_attr.  Errors as ``memo``."""
    known: Memo | None = inode.memo
    return known.entry if known is not None else memo(fs, inode).entry


def unread_entry(session: Session, number: int, block: int, offset: int) -> bytes | None:
    """The entry of a usual inode that nobody has decoded, at an offset of a block; None for one to be decoded.

    Of the 20 µs that a name of READDIRPLUS takes in a cold directory, this saves 15 where compiled code is available.
    """
    if session.attributes is None:
        return None
    found = session.fs.cache.entry(block)
    if number in found.views or found.seals:
        return None
    unread = session.attributes.read(found.data, offset, number)
    if unread is None:
        return None
    generation, attr = unread
    return wire.pack_entry(node_of(number), generation, wire.FOREVER, 0, wire.FOREVER, 0, attr)


def shown_size(fs: "Ext4", inode: Inode) -> int:
    """The size that stat(2) shows: that of the target as readlink(2) gives it for an encrypted symbolic link."""
    if inode.is_encrypted and inode.is_symlink:
        return len(namespace.readlink(fs, inode))
    return inode.size


def shown_sectors(inode: Inode) -> int:
    """The 512-byte blocks that stat(2) shows; data that a file keeps in its inode count as if they had some."""
    if inode.is_inline and inode.is_regular:
        return inode.sectors + -(-inode.size // 512)
    return inode.sectors


def _attr(fs: "Ext4", inode: Inode) -> bytes:
    return wire.pack_attr(
        inode.number, shown_size(fs, inode), shown_sectors(inode), inode.atime[0], inode.mtime[0], inode.ctime[0],
        inode.atime[1], inode.mtime[1], inode.ctime[1], inode.mode, inode.links, inode.uid, inode.gid,
        _device(*inode.rdev), fs.geometry.block_bytes, 0,
    )


def _device(major: int, minor: int) -> int:
    """A device number as the kernel's new_encode_dev writes it."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def statx(fs: "Ext4", inode: Inode) -> bytes:
    """fuse_statx of an inode, with the time of its creation if the disk has it."""
    mask = STATX_BASIC if inode.crtime is None else STATX_BASIC_AND_BTIME
    attributes = sum(bit for flag, bit in _ATTRIBUTES if inode.flags & flag)
    return wire.pack_statx(
        mask, fs.geometry.block_bytes, attributes, inode.links, inode.uid, inode.gid, inode.mode, inode.number,
        shown_size(fs, inode), shown_sectors(inode), _ATTRIBUTES_MASK, *inode.atime, *(inode.crtime or (0, 0)),
        *inode.ctime, *inode.mtime, *inode.rdev, 0, 0,
    )
