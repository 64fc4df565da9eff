"""The Merkle tree of a verity file as it stands in the file's own blocks, behind its data.  See ``verity``."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import iomap, verity
from .errors import Check, Corrupt
from .inode import Inode

if TYPE_CHECKING:
    from .filesystem import Ext4

RUNS_MOST = 1 << 16     # runs of blocks behind the data: a tree that is more scattered was made to keep us busy


def tree_of(fs: "Ext4", inode: Inode) -> verity.Tree:
    """The tree of a verity file, its descriptor read and checked; nothing of the tree itself is read yet.

    Raises ``Corrupt(VERITY_DESCRIPTOR)``, and what mapping the file raises; ``BlockMiss``.
    """
    geometry = fs.geometry
    end_bytes = geometry.byte_of(_end_block(fs, inode))
    size_word = _read(fs, inode, end_bytes - verity.SIZE_WORD_BYTES, verity.SIZE_WORD_BYTES)
    offset, size = verity.descriptor_place(end_bytes, size_word, inode.size, geometry.block_bytes)
    return verity.Tree(verity.parse_descriptor(_read(fs, inode, offset, size), inode.size, geometry.block_bits))


def tree_blocks(fs: "Ext4", inode: Inode, tree: verity.Tree, first: int, last: int) -> dict[int, bytes]:
    """The tree blocks, by number, that vouch for data blocks ``first`` to ``last``; all are missed at once."""
    numbers = tree.vouchers(first, last)
    size = tree.descriptor.block_bytes
    places = [tree.offset_bytes(number) for number in numbers]
    fs.cache.want(block for place in places for block in _blocks(fs, inode, place, size) if block is not None)
    return {number: _read(fs, inode, place, size) for number, place in zip(numbers, places, strict=True)}


def verifier(tree: verity.Tree, first: int, blocks: dict[int, bytes]) -> Callable[[memoryview], None]:
    """A function that checks data which begin at data block ``first``; it needs nothing but ``tree_blocks``."""
    return lambda data: tree.verify_range(first, data, blocks.__getitem__)


def _end_block(fs: "Ext4", inode: Inode) -> int:
    """The file block behind the last mapped one: there the metadata of verity end."""
    if not inode.has_extents:
        raise Corrupt(Check.VERITY_DESCRIPTOR, inode=inode.number, extents=False)
    at = fs.geometry.block_of(verity.metadata_offset_bytes(inode.size))
    limit, end = fs.geometry.block_of(fs.max_file_bytes(inode)), 0
    for _ in range(RUNS_MOST):
        run = iomap.find(fs, inode, at)
        at = run.file_block + run.length
        if run.start is not None:
            end = at
        if at >= limit:
            break
    if not end:
        raise Corrupt(Check.VERITY_DESCRIPTOR, inode=inode.number, end_block=end)
    return end


def _blocks(fs: "Ext4", inode: Inode, offset: int, length: int) -> list[int | None]:
    """The device blocks that hold bytes of the file, None for those in holes."""
    block_of = fs.geometry.block_of
    found: list[int | None] = []
    for file_block in range(block_of(offset), block_of(offset + length - 1) + 1):
        run = iomap.find(fs, inode, file_block)
        is_hole = run.start is None or run.unwritten
        found.append(None if is_hole else (run.start or 0) + file_block - run.file_block)
    return found


def _read(fs: "Ext4", inode: Inode, offset: int, length: int) -> bytes:
    blocks, hole = _blocks(fs, inode, offset, length), bytes(fs.geometry.block_bytes)
    fs.cache.want(block for block in blocks if block is not None)
    start = fs.geometry.within_block(offset)
    return b"".join(hole if block is None else fs.cache.read(block) for block in blocks)[start:start + length]
