"""Hash trees of indexed directories: from a name's hash to the leaf blocks that can hold it.

Kernel documentation, ext4, "Hash Tree Directories".  The root lies in block 0 behind the entries "." and "..", inner
nodes in blocks of their own behind one unused entry as long as the block.
"""

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from . import checksum, dirhash, layout
from .errors import Check, Corrupt
from .inode import Inode

if TYPE_CHECKING:
    from .filesystem import Ext4

ROOT_INFO_AT = 24
ROOT_ENTRIES_AT = 32
NODE_ENTRIES_AT = 8
ENTRY_BYTES = 8
TAIL_BYTES = 8
MAX_LEVELS = 2
MAX_LEVELS_LARGE_DIR = 3
MAX_CONTINUED = 64           # leaves with one hash; where names collide more often, a search from end to end is right
VERSIONS = (dirhash.LEGACY, dirhash.HALF_MD4, dirhash.TEA, dirhash.SIPHASH)  # on disk; the superblock has the sign
CONTINUED = 1                # lowest bit of an entry's hash: the hash of the leaf before goes on in this one
_ENTRY = struct.Struct("<II")
_LIMIT_COUNT = struct.Struct("<HH")


class Node(NamedTuple):
    """One decoded node: entry i leads to file block ``blocks[i]`` for hashes from ``hashes[i]`` on."""

    hashes: list[int]
    blocks: list[int]


class Root(NamedTuple):
    """The root node and what it says of the tree; ``version`` is the hash function, ``levels`` the inner levels."""

    node: Node
    version: int
    levels: int


InnerNode = Callable[[int], Node]  # the inner node at a file block


def root(fs: "Ext4", directory: Inode, data: bytes) -> Root:
    """The root in a directory's block 0.  Raises ``Corrupt`` (HTREE_ROOT, HTREE_DEPTH, HTREE_NODE, HTREE_CHECKSUM)."""
    zero, version, info_length, levels, flags = layout.DX_ROOT_INFO.unpack(data, ROOT_INFO_AT)
    if zero or info_length != layout.DX_ROOT_INFO.size or flags & 1 or version not in VERSIONS:
        raise Corrupt(Check.HTREE_ROOT, inode=directory.number, version=version, info_length=info_length, flags=flags)
    most = MAX_LEVELS_LARGE_DIR if fs.has_large_dir else MAX_LEVELS
    if levels >= most:
        raise Corrupt(Check.HTREE_DEPTH, inode=directory.number, levels=levels)
    node = _node(fs, directory, data, 0, ROOT_ENTRIES_AT)
    return Root(node, fs.superblock.hash_version(version), levels)


def inner(fs: "Ext4", directory: Inode, data: bytes, file_block: int) -> Node:
    """The inner node in a block of its own."""
    return _node(fs, directory, data, file_block, NODE_ENTRIES_AT)


def check_node(fs: "Ext4", directory: Inode, data: bytes, file_block: int) -> None:
    """Raise ``Corrupt(HTREE_CHECKSUM)`` if the node's checksum does not match."""
    at = NODE_ENTRIES_AT if file_block else ROOT_ENTRIES_AT
    if fs.has_checksums and not checksum.htree_node_ok(data, fs.seed_of(directory), at):
        raise Corrupt(Check.HTREE_CHECKSUM, inode=directory.number, file_block=file_block)


def _node(fs: "Ext4", directory: Inode, data: bytes, file_block: int, at: int) -> Node:
    limit, count = _LIMIT_COUNT.unpack_from(data, at)
    fits = (len(data) - at - (TAIL_BYTES if fs.has_checksums else 0)) // ENTRY_BYTES
    if limit != fits or not 0 < count <= limit:
        raise Corrupt(Check.HTREE_NODE, inode=directory.number, file_block=file_block, limit=limit, count=count)
    rows = list(_ENTRY.iter_unpack(data[at:at + count * ENTRY_BYTES]))
    hashes = [0] + [row[0] for row in rows[1:]]
    blocks = [row[1] & 0x0FFFFFFF for row in rows]
    if any(later < earlier for earlier, later in pairwise(hashes)):
        raise Corrupt(Check.HTREE_NODE, inode=directory.number, file_block=file_block, hashes="not ascending")
    most = fs.geometry.blocks_for(directory.size)
    if any(not 0 < block < most for block in blocks):
        raise Corrupt(Check.HTREE_NODE, inode=directory.number, file_block=file_block, blocks=most)
    return Node(hashes, blocks)


def leaves(top: Root, inner_node: InnerNode, hash_value: int) -> Iterable[int]:
    """The file blocks of the leaves that can hold names of a hash: one, and those in which the same hash goes on."""
    path = descend(top, inner_node, hash_value)
    node, index = path[-1]
    if index + 1 < len(node.hashes) and node.hashes[index + 1] & ~CONTINUED != hash_value:
        return (node.blocks[index],)
    return _leaves_from(path, inner_node, hash_value)


def _leaves_from(path: list[tuple[Node, int]], inner_node: InnerNode, hash_value: int) -> Iterator[int]:
    for _ in range(MAX_CONTINUED):
        node, index = path[-1]
        yield node.blocks[index]
        following = advance(path, inner_node)
        if following is None or not following & CONTINUED or following & ~CONTINUED != hash_value:
            return
    raise Corrupt(Check.HTREE_DEPTH, hash=f"{hash_value:#x}", leaves=MAX_CONTINUED)


def descend(top: Root, inner_node: InnerNode, hash_value: int) -> list[tuple[Node, int]]:
    """The path from the root to the entry for a hash: (node, index) per level."""
    node = top.node
    path = [(node, bisect_right(node.hashes, hash_value) - 1)]
    for _ in range(top.levels):
        node = inner_node(node.blocks[path[-1][1]])
        path.append((node, bisect_right(node.hashes, hash_value) - 1))
    return path


def advance(path: list[tuple[Node, int]], inner_node: InnerNode) -> int | None:
    """Move the path to the next leaf; the hash that leads there, None at the end."""
    depth = len(path) - 1
    while depth >= 0 and path[depth][1] + 1 >= len(path[depth][0].blocks):
        depth -= 1
    if depth < 0:
        return None
    node, index = path[depth][0], path[depth][1] + 1
    path[depth] = (node, index)
    following = node.hashes[index]
    for level in range(depth + 1, len(path)):
        node = inner_node(node.blocks[path[level - 1][1]])
        path[level] = (node, 0)
    return following
