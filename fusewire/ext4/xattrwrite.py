"""Setting and removing extended attributes: in the inode while they fit, else in its attribute block.

Kernel documentation, ext4, "Extended Attributes".  Entries stand in front, sorted; values fill from the end.  A block
may be shared by inodes whose attributes are equal; whoever changes his takes a copy.
"""

import errno
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from . import alloc, checksum, inodestore, layout, superstore, xattrstore
from .errors import Refused
from .extentstore import counted
from .features import Feature
from .inode import BASE_BYTES, Inode
from .xattrstore import MAGIC, Entry

if TYPE_CHECKING:
    from .transaction import Transaction

CREATE, REPLACE = 1, 2          # setxattr(2)'s flags
MOST_SHARED = 1024
NAME_BYTES = 255
_MASK = 0xFFFFFFFF
_PAD = 4
_HEADER = layout.XATTR_HEADER
_ENTRY = layout.XATTR_ENTRY


def put(tx: "Transaction", inode: Inode, namespace: int, name: bytes, value: bytes | None, flags: int = 0) -> Inode:
    """Set an attribute to ``value``, or remove it (None); its name is given as on disk.

    What is so already changes nothing: then the very inode is returned, and its times stay.

    Raises ``Refused``: EEXIST and ENODATA by the flags, ERANGE for a long name, ENOSPC where nothing holds the value.
    """
    if len(name) > NAME_BYTES:
        raise Refused(errno.ERANGE)
    inside, outside = list(xattrstore.in_inode(tx, inode)), list(xattrstore.in_block(tx, inode))
    old = next((entry for entry in inside + outside if _is(entry, namespace, name)), None)
    if old is not None and flags & CREATE:
        raise Refused(errno.EEXIST)
    if old is None and (flags & REPLACE or value is None):
        raise Refused(errno.ENODATA)
    if old is not None and old.value_inode:
        raise Refused(errno.EOPNOTSUPP)  # values in inodes of their own are not written yet
    if old is not None and old.value == value:
        return inode
    inside = [entry for entry in inside if not _is(entry, namespace, name)]
    outside = [entry for entry in outside if not _is(entry, namespace, name)]
    if value is not None:
        new = Entry(namespace, name, value, 0, len(value), 0)
        if _fits(inside + [new], room_in_inode(tx, inode)):
            inside.append(new)
        elif _fits(outside + [new], tx.geometry.block_bytes - _HEADER.size):
            outside.append(new)
        else:
            raise Refused(errno.ENOSPC)
    _note_feature(tx)
    return _store(tx, inode, inside, outside)


def drop_all(tx: "Transaction", inode: Inode) -> Inode:
    """Take an inode that is being freed out of its attribute block; what is in the inode itself goes with it.

    Raises ``Corrupt`` if there is no such block.
    """
    if not inode.file_acl:
        return inode
    xattrstore.in_block(tx, inode)
    _leave(tx, inode)
    return counted(tx, inodestore.change(tx, inode, file_acl=0), -1)


def _note_feature(tx: "Transaction") -> None:
    """Say in the superblock that there are attributes, the first time that there are any."""
    if Feature.EXT_ATTR not in tx.superblock.features:
        have = superstore.get(tx, "feature_compat")
        if not have & Feature.EXT_ATTR.mask:
            superstore.change(tx, feature_compat=have | Feature.EXT_ATTR.mask)


def room_in_inode(tx: "Transaction", inode: Inode) -> int:
    """Bytes for entries and values behind the inode's fields."""
    if not inode.extra_isize:
        return 0
    return max(tx.geometry.inode_bytes - BASE_BYTES - inode.extra_isize - _PAD, 0)


def _is(entry: Entry, namespace: int, name: bytes) -> bool:
    return entry.namespace == namespace and entry.name == name


def _padded(length: int) -> int:
    return (length + _PAD - 1) & -_PAD


def _fits(entries: Sequence[Entry], room: int) -> bool:
    used = sum(_padded(_ENTRY.size + len(entry.name)) + _padded(len(entry.value)) for entry in entries)
    return used + _PAD <= room


def _store(tx: "Transaction", inode: Inode, inside: list[Entry], outside: list[Entry]) -> Inode:
    if tuple(inside) != xattrstore.in_inode(tx, inode):
        area = _area(inside, room_in_inode(tx, inode), 0, hashed=False)
        tail = MAGIC.to_bytes(4, "little") + area if inside else bytes(len(area) + 4)
        inode = inodestore.change(tx, inode, tail=tail)
    if tuple(outside) == xattrstore.in_block(tx, inode):
        return inode
    return _store_block(tx, inode, outside)


def _area(entries: list[Entry], size: int, start: int, *, hashed: bool) -> bytearray:
    """``size`` bytes of entries and values; value offsets count from ``start`` bytes before the first entry."""
    area, at, end = bytearray(size), 0, size
    for entry in sorted(entries, key=lambda entry: (entry.namespace, len(entry.name), entry.name)):
        value = entry.value.ljust(_padded(len(entry.value)), b"\0")
        end -= len(value)
        area[end:end + len(value)] = value
        if entry.value_inode:
            row = (len(entry.name), entry.namespace, 0, entry.value_inode, entry.value_bytes, entry.hash)
        else:
            row = (len(entry.name), entry.namespace, start + end if value else 0, 0, len(entry.value),
                   entry_hash(entry.name, value) if hashed else 0)
        _ENTRY.struct.pack_into(area, at, *row)
        area[at + _ENTRY.size:at + _ENTRY.size + len(entry.name)] = entry.name
        at += _padded(_ENTRY.size + len(entry.name))
    return area


def entry_hash(name: bytes, value: bytes) -> int:
    """The hash of an attribute in a block: of its name, then of its padded value in words."""
    result = 0
    for byte in name:
        result = ((result << 5) ^ (result >> 27) ^ byte) & _MASK
    for at in range(0, len(value), 4):
        result = ((result << 16) ^ (result >> 16) ^ int.from_bytes(value[at:at + 4], "little")) & _MASK
    return result


def _block_hash(hashes: list[int]) -> int:
    result = 0
    for value in hashes:
        if not value:
            return 0
        result = ((result << 16) ^ (result >> 16) ^ value) & _MASK
    return result


def _store_block(tx: "Transaction", inode: Inode, entries: list[Entry]) -> Inode:
    """Give the inode a block with these entries: none, a shared one that is equal, its own, or a new one."""
    if not entries:
        _leave(tx, inode)
        return counted(tx, inodestore.change(tx, inode, file_acl=0), -1)
    content = bytes(_area(entries, tx.geometry.block_bytes - _HEADER.size, _HEADER.size, hashed=True))
    shared = _shared(tx, content, inode.file_acl)
    if shared is not None:
        _set_references(tx, shared, _references(tx, shared) + 1)
        block = shared
    elif inode.file_acl and _references(tx, inode.file_acl) == 1:
        _write(tx, inode.file_acl, content)
        return inodestore.change(tx, inode)     # another view: this one is not the inode as it was
    else:
        goal = tx.geometry.first_block_of(tx.geometry.group_of_inode(inode.number)[0])
        block = alloc.allocate(tx, goal, 1).start
        tx.create(block)
        _write(tx, block, content)
    had = bool(inode.file_acl)
    if had:
        _leave(tx, inode)
    return counted(tx, inodestore.change(tx, inode, file_acl=block), 0 if had else 1)


def _shared(tx: "Transaction", content: bytes, own: int) -> int | None:
    """A block with the same entries that more inodes may join: looked up by content, checked before it is used."""
    assert tx.writing is not None
    block = tx.writing.shared_attributes.get(content)
    if block is None or block == own or tx.is_revoked(block) or not tx.cache.holds(block):
        return None
    data = tx.cache.read(block)
    fits = data[_HEADER.size:] == content and int.from_bytes(data[:4], "little") == MAGIC
    return block if fits and 0 < _references(tx, block) < MOST_SHARED else None


def _leave(tx: "Transaction", inode: Inode) -> None:
    """Take one reference from the inode's block, and free it with the last; nobody joins it then."""
    block = inode.file_acl
    left = _references(tx, block) - 1
    if left > 0:
        _set_references(tx, block, left)
        return
    content = tx.cache.read(block)[_HEADER.size:]
    alloc.free(tx, block, 1, metadata=True)
    assert tx.writing is not None
    tx.after_commit(partial(tx.writing.forget_attributes, content, block))


def _references(tx: "Transaction", block: int) -> int:
    return int.from_bytes(tx.cache.entry(block).data[4:8], "little")


def _set_references(tx: "Transaction", block: int, count: int) -> None:
    tx.edit(block)[4:8] = count.to_bytes(4, "little")
    _seal(tx, block)


def _write(tx: "Transaction", block: int, content: bytes) -> None:
    """Fill a block that only this inode refers to, and remember it as one that others may join."""
    hashes, at = [], 0
    while content[at:at + _PAD] != bytes(_PAD):
        row = _ENTRY.unpack(content, at)
        hashes.append(row[5])
        at += _padded(_ENTRY.size + row[0])
    header = _HEADER.struct.pack(MAGIC, 1, 1, _block_hash(hashes), 0, bytes(12))
    tx.edit(block)[:] = header + content
    _seal(tx, block)
    assert tx.writing is not None
    tx.after_commit(partial(tx.writing.remember_attributes, content, block))


def _seal(tx: "Transaction", block: int) -> None:
    if tx.has_checksums:
        seed = tx.superblock.seed
        tx.seal(block, "xattrs", lambda raw, _read: checksum.seal_xattr_block(raw, block, seed))
