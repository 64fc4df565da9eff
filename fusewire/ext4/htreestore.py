"""Changing hash trees: entering names, splitting leaves and nodes, adding levels, and making a directory indexed.

Kernel documentation, ext4, "Hash Tree Directories".

I1  A leaf's names have hashes from its entry's hash on, and below the next entry's; equal hashes that a split tore
    apart are the only exception, and the later leaf's entry says so (``CONTINUED``).
I2  Within a node entries ascend, and the first entry's hash is not stored: it is what the parent says.
"""

import errno
import struct
from bisect import bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from . import checksum, directory, dirhash, dirspace, htree, inodestore, layout
from .dirrecords import Link
from .errors import Check, Corrupt, Refused
from .htree import CONTINUED, ENTRY_BYTES, NODE_ENTRIES_AT, ROOT_ENTRIES_AT, ROOT_INFO_AT, TAIL_BYTES, Node, Root
from .inode import FLAG_INDEX, Inode

if TYPE_CHECKING:
    from .filesystem import Ext4
    from .transaction import EditedBlock, Transaction

DOT_BYTES = 12
_HEAD = struct.Struct("<IHBB")
_COUNTS = struct.Struct("<HHI")
_REMEMBERED = 4096
# One operation hashes a name up to three times, a split each name of its leaf again: 12 µs each in pure Python.
_hash = lru_cache(_REMEMBERED)(dirhash.dirhash)


class Step(NamedTuple):
    """One node on the way to a leaf: its block of the directory, its content, and which entry was taken."""

    file_block: int
    node: Node
    taken: int


def leaves(fs: "Ext4", of: Inode, name: bytes) -> list[int]:
    """The blocks of an indexed directory that can hold a name.  Raises ``Corrupt`` for an index that is broken."""
    top = _root(fs, of)
    return list(htree.leaves(top, lambda block: directory.index_node(fs, of, block), _hash_of(fs, top.version, name)))


def add(tx: "Transaction", of: Inode, link: Link) -> Inode:
    """Enter a name in an indexed directory, which grows if the leaf is full; the directory as it is then.

    Raises ``Refused(ENOSPC)``: no blocks are left, or the tree is full.
    """
    while True:
        top = _root(tx, of)
        path = _path(tx, of, top, _hash_of(tx, top.version, link.name))
        leaf = path[-1].node.blocks[path[-1].taken]
        if dirspace.enter(tx, of, leaf, link):
            return of
        if not _is_full(tx, path[-1]):
            return _split_leaf(tx, of, path[-1], top.version, leaf, link)
        of = _split_node(tx, of, top, path)


def can_index(fs: "Ext4") -> bool:
    """Whether full directories are to be indexed here: the feature is on, and the hash one that can be computed."""
    return fs.has_dir_index and fs.superblock.fields["def_hash_version"] <= dirhash.TEA


def index(tx: "Transaction", of: Inode, link: Link) -> Inode:
    """Turn a full directory of one block into an indexed one and enter a name: a root in block 0, two leaves behind."""
    of, leaf = dirspace.append(tx, of)
    dirspace.move_names(tx, of, leaf)
    parent, file_type = dirspace.names(tx, of, 0).names[b".."].inode, 2 if tx.has_file_types else 0
    of = inodestore.change(tx, of, flags=of.flags | FLAG_INDEX)
    block = dirspace.device_block(tx, of, 0)
    data, size = tx.edit(block), tx.geometry.block_bytes
    data[:] = bytes(size)
    _HEAD.pack_into(data, 0, of.number, DOT_BYTES, 1, file_type)
    data[8:9] = b"."
    _HEAD.pack_into(data, DOT_BYTES, parent, size - DOT_BYTES, 2, file_type)
    data[DOT_BYTES + 8:DOT_BYTES + 10] = b".."
    stored = tx.superblock.fields["def_hash_version"]
    layout.DX_ROOT_INFO.struct.pack_into(data, ROOT_INFO_AT, 0, stored, layout.DX_ROOT_INFO.size, 0, 0)
    root, version = Node([0], [leaf]), tx.superblock.hash_version(stored)
    _store_root(tx, of, Root(root, version, 0))
    return _split_leaf(tx, of, Step(0, root, 0), version, leaf, link)


def _root(fs: "Ext4", of: Inode) -> Root:
    top = directory.index_root(fs, of)
    if top.version not in dirhash.COMPUTABLE:
        raise Corrupt(Check.HTREE_ROOT, inode=of.number, hash_version=top.version)
    return top


def _hash_of(fs: "Ext4", version: int, name: bytes) -> int:
    return _hash(name, version, fs.superblock.hash_seed)[0]


def _path(fs: "Ext4", of: Inode, top: Root, value: int) -> list[Step]:
    """The nodes from the root to the entry of the leaf for a hash."""
    node = top.node
    path = [Step(0, node, bisect_right(node.hashes, value) - 1)]
    for _ in range(top.levels):
        file_block = node.blocks[path[-1].taken]
        node = directory.index_node(fs, of, file_block)
        path.append(Step(file_block, node, bisect_right(node.hashes, value) - 1))
    return path


def _split_leaf(tx: "Transaction", of: Inode, step: Step, version: int, leaf: int, link: Link) -> Inode:
    """Move the names with the higher hashes to a new leaf, and enter the name on its side.

    ``step`` is the node above the leaf, which has room for another.
    """
    content = dirspace.links(tx, of, leaf)
    rows = sorted((_hash_of(tx, version, old.name), place) for place, (old, _) in enumerate(content))
    if len(rows) < 2:
        dirspace.fill(tx, of, leaf, [old for old, _ in content])
        entered = dirspace.enter(tx, of, leaf, link)
        assert entered, "a block with one name has room for another"
        return of
    split = _middle(tx, [content[place][1] for _, place in rows])
    of, new = dirspace.append(tx, of)
    dirspace.fill(tx, of, leaf, [content[place][0] for place in sorted(place for _, place in rows[:split])])
    dirspace.fill(tx, of, new, [content[place][0] for _, place in rows[split:]])
    border = rows[split][0]
    entered = dirspace.enter(tx, of, new if _hash_of(tx, version, link.name) >= border else leaf, link)
    assert entered, "each side of a split has room for any name"
    continued = CONTINUED if rows[split - 1][0] == border else 0
    _enter_node(tx, of, step, border | continued, new)
    return of


def _middle(tx: "Transaction", lengths: list[int]) -> int:
    """How many of a leaf's names (with records of these lengths) stay, so that neither side is over half full."""
    half, moved, split = tx.geometry.block_bytes // 2, 0, len(lengths)
    while split and moved + lengths[split - 1] // 2 <= half:
        split -= 1
        moved += lengths[split]
    return split or len(lengths) // 2


def _enter_node(tx: "Transaction", of: Inode, step: Step, value: int, block: int) -> None:
    """Enter a new leaf or node behind the entry that a path has taken in a node with room."""
    hashes, blocks = step.node.hashes.copy(), step.node.blocks.copy()
    hashes.insert(step.taken + 1, value)
    blocks.insert(step.taken + 1, block)
    _store(tx, of, step.file_block, Node(hashes, blocks))


def _is_full(tx: "Transaction", step: Step) -> bool:
    return len(step.node.blocks) >= _limit(tx, step.file_block)


def _split_node(tx: "Transaction", of: Inode, top: Root, path: list[Step]) -> Inode:
    """Split the highest node above a leaf that is full and has a parent with room; raise the root if all are full."""
    depth = len(path) - 1
    while depth and _is_full(tx, path[depth - 1]):
        depth -= 1
    node = path[depth].node
    if not depth:
        return _raise_root(tx, of, top)
    half = len(node.blocks) // 2
    of, new = dirspace.append(tx, of)
    _store(tx, of, path[depth].file_block, Node(node.hashes[:half], node.blocks[:half]))
    _start_node(tx, of, new, Node([0, *node.hashes[half + 1:]], node.blocks[half:]))
    _enter_node(tx, of, path[depth - 1], node.hashes[half], new)
    return of


def _raise_root(tx: "Transaction", of: Inode, top: Root) -> Inode:
    """Put the root's entries into a new node below it.  ``Refused(ENOSPC)`` if that is one too deep."""
    most = htree.MAX_LEVELS_LARGE_DIR if tx.has_large_dir else htree.MAX_LEVELS
    if top.levels + 1 >= most:
        raise Refused(errno.ENOSPC)
    of, new = dirspace.append(tx, of)
    _start_node(tx, of, new, top.node)
    _store_root(tx, of, Root(Node([0], [new]), top.version, top.levels + 1))
    return of


def _limit(tx: "Transaction", file_block: int) -> int:
    """How many entries a node has room for; the root (block 0) for fewer."""
    at = NODE_ENTRIES_AT if file_block else ROOT_ENTRIES_AT
    return (tx.geometry.block_bytes - at - (TAIL_BYTES if tx.has_checksums else 0)) // ENTRY_BYTES


def _start_node(tx: "Transaction", of: Inode, file_block: int, node: Node) -> None:
    """Make a new block of the directory a node: behind one unused record as long as the block."""
    block = dirspace.device_block(tx, of, file_block)
    _HEAD.pack_into(tx.edit(block), 0, 0, tx.geometry.block_bytes & 0xFFFF, 0, 0)
    _store(tx, of, file_block, node)


def _store(tx: "Transaction", of: Inode, file_block: int, node: Node) -> None:
    if file_block:
        key = ("htree", of.number, of.generation)
        _store_entries(tx, of, file_block, node).views[key] = node
    else:
        _store_root(tx, of, _root(tx, of)._replace(node=node))


def _store_root(tx: "Transaction", of: Inode, top: Root) -> None:
    entry = _store_entries(tx, of, 0, top.node)
    entry.data[ROOT_INFO_AT + layout.DX_ROOT_INFO.offsets["indirect_levels"]] = top.levels
    entry.views["htree root", of.number, of.generation] = top


def _store_entries(tx: "Transaction", of: Inode, file_block: int, node: Node) -> "EditedBlock":
    """Write a node's entries; its block, whose view the caller replaces."""
    at = NODE_ENTRIES_AT if file_block else ROOT_ENTRIES_AT
    block = dirspace.device_block(tx, of, file_block)
    entry = tx.edit_keeping(block)
    _COUNTS.pack_into(entry.data, at, _limit(tx, file_block), len(node.blocks), node.blocks[0])
    rows = [word for row in zip(node.hashes[1:], node.blocks[1:], strict=True) for word in row]
    struct.pack_into(f"<{len(rows)}I", entry.data, at + ENTRY_BYTES, *rows)
    if tx.has_checksums:
        seed = tx.seed_of(of)
        tx.seal(block, "directory", lambda raw, _read: checksum.seal_htree_node(raw, seed, at))
    return entry
