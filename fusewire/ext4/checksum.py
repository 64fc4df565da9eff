"""Every checksum formula of ext4 and of its journal, and no other module knows one.

Each structure has ``…_ok(raw, …)``, which says whether the checksum stored in ``raw`` is right, and ``seal_…(raw, …)``,
which stores the right one in a ``bytearray``.  All are pure and total: bytes of any length and content give a ``bool``.
A checksum field counts as zero bytes while it is computed.  ``seed`` is the file system's (``seed_of`` its UUID, or the
superblock's ``checksum_seed`` with the feature metadata_csum_seed); ``inode_seed`` adds the owner to it, so that a
block of another file, or of an earlier user of the inode, never passes.

Source: kernel documentation, ext4, "Checksums"; for the journal "Journal (jbd2)".
"""

from struct import Struct
from zlib import crc32 as _zlib_crc32

from crc32c import crc32c as _library_crc32c

Bytes = bytes | bytearray | memoryview

_ALL_ONES = 0xFFFFFFFF
_LE16, _LE32, _LE64, _BE32 = Struct("<H"), Struct("<I"), Struct("<Q"), Struct(">I")
_OWNER = Struct("<II")
_ZERO2, _ZERO4 = bytes(2), bytes(4)


# ---- the sums themselves -----------------------------------------------------------------------------------

def crc32c(seed: int, data: Bytes) -> int:
    """CRC-32C of ``data`` from the register ``seed``, the register itself: neither end is inverted, as ext4 has it.

    The published CRC-32C inverts both ends, and so does the library; sums chain here by passing the last as seed.
    """
    inverted: int = _library_crc32c(data, seed ^ _ALL_ONES)
    return inverted ^ _ALL_ONES


def _crc16_table() -> tuple[int, ...]:
    rows = list(range(256))
    for _ in range(8):
        rows = [(row >> 1) ^ (0xA001 if row & 1 else 0) for row in rows]
    return tuple(rows)


_CRC16 = _crc16_table()


def crc16_python(seed: int, data: Bytes) -> int:
    """CRC-16 (polynomial 0x8005, reflected) of ``data`` from the register ``seed``, not inverted at the end."""
    register = seed
    for byte in bytes(data):
        register = (register >> 8) ^ _CRC16[(register ^ byte) & 0xFF]
    return register


crc16 = crc16_python  # ``fusewire.accel`` puts its compiled twin here

_MIRROR = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def crc32_be(seed: int, data: Bytes) -> int:
    """CRC-32 with the most significant bit first, neither end inverted; the journal's oldest checksum.

    It is zlib's sum seen in a mirror: bits of each byte, of the register and of the result reversed.
    """
    register = _mirror32(seed) ^ _ALL_ONES
    return _mirror32(_zlib_crc32(bytes(data).translate(_MIRROR), register) ^ _ALL_ONES)


def _mirror32(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "big").translate(_MIRROR), "little")


def _u16(raw: Bytes, offset: int) -> int:
    return int(_LE16.unpack_from(raw, offset)[0])


def _u32(raw: Bytes, offset: int) -> int:
    return int(_LE32.unpack_from(raw, offset)[0])


# ---- seeds -------------------------------------------------------------------------------------------------

def seed_of(uuid: bytes) -> int:
    """The file system's seed when it keeps none in its superblock; also a journal's, from the journal's UUID."""
    return crc32c(_ALL_ONES, uuid)


def inode_seed(seed: int, number: int, generation: int) -> int:
    """The seed of everything that belongs to one inode."""
    return crc32c(seed, _OWNER.pack(number, generation))


# ---- superblock and multiple mount protection: the last word of 1024 bytes ---------------------------------

_SUPER_AT = 1020


def superblock_ok(raw: bytes) -> bool:
    """Whether the 1024 bytes of a superblock (metadata_csum) match their last word."""
    return len(raw) >= 1024 and crc32c(_ALL_ONES, raw[:_SUPER_AT]) == _u32(raw, _SUPER_AT)


def seal_superblock(raw: bytearray) -> None:
    """Store the checksum of a superblock."""
    _LE32.pack_into(raw, _SUPER_AT, crc32c(_ALL_ONES, raw[:_SUPER_AT]))


def mmp_ok(raw: bytes, seed: int) -> bool:
    """Whether a multiple mount protection block matches."""
    return len(raw) >= 1024 and crc32c(seed, raw[:_SUPER_AT]) == _u32(raw, _SUPER_AT)


def seal_mmp(raw: bytearray, seed: int) -> None:
    """Store the checksum of a multiple mount protection block."""
    _LE32.pack_into(raw, _SUPER_AT, crc32c(seed, raw[:_SUPER_AT]))


# ---- group descriptors and bitmaps -------------------------------------------------------------------------

_GROUP_AT = 0x1E
_BLOCK_BITMAP_AT, _INODE_BITMAP_AT = (0x18, 0x38), (0x1A, 0x3A)  # low and high halves; the high one only from 64 bytes


def _group_desc(raw: Bytes, group: int, seed: int) -> int:
    body = _LE32.pack(group) + raw[:_GROUP_AT] + _ZERO2 + raw[_GROUP_AT + 2:]
    return crc32c(seed, body) & 0xFFFF


def group_desc_ok(raw: Bytes, group: int, seed: int) -> bool:
    """Whether a whole descriptor (32 bytes, or ``desc_size`` with 64bit) matches under metadata_csum."""
    return len(raw) >= 32 and _group_desc(raw, group, seed) == _u16(raw, _GROUP_AT)


def seal_group_desc(raw: bytearray, group: int, seed: int) -> None:
    """Store a descriptor's checksum under metadata_csum."""
    _LE16.pack_into(raw, _GROUP_AT, _group_desc(raw, group, seed))


def _group_desc_crc16(raw: Bytes, group: int, uuid: bytes) -> int:
    return crc16(0xFFFF, uuid + _LE32.pack(group) + raw[:_GROUP_AT] + raw[_GROUP_AT + 2:])


def group_desc_crc16_ok(raw: Bytes, group: int, uuid: bytes) -> bool:
    """Whether a whole descriptor matches under gdt_csum (uninit_bg), where the field itself is left out."""
    return len(raw) >= 32 and _group_desc_crc16(raw, group, uuid) == _u16(raw, _GROUP_AT)


def seal_group_desc_crc16(raw: bytearray, group: int, uuid: bytes) -> None:
    """Store a descriptor's checksum under gdt_csum."""
    _LE16.pack_into(raw, _GROUP_AT, _group_desc_crc16(raw, group, uuid))


def _bitmap_ok(bitmap: Bytes, places: tuple[int, int], desc: Bytes, seed: int) -> bool:
    low, high = places
    value = crc32c(seed, bitmap)
    if len(desc) < 64:
        return len(desc) >= 32 and value & 0xFFFF == _u16(desc, low)
    return value == _u16(desc, low) | _u16(desc, high) << 16


def _seal_bitmap(bitmap: Bytes, places: tuple[int, int], desc: bytearray, seed: int) -> None:
    low, high = places
    value = crc32c(seed, bitmap)
    _LE16.pack_into(desc, low, value & 0xFFFF)
    if len(desc) >= 64:
        _LE16.pack_into(desc, high, value >> 16)


def block_bitmap_ok(bitmap: Bytes, clusters_per_group: int, desc: Bytes, seed: int) -> bool:
    """Whether a block bitmap matches its group descriptor; only the bits of clusters count, not the block's rest."""
    return _bitmap_ok(bitmap[:clusters_per_group // 8], _BLOCK_BITMAP_AT, desc, seed)


def seal_block_bitmap(bitmap: Bytes, clusters_per_group: int, desc: bytearray, seed: int) -> None:
    """Store a block bitmap's checksum in its group descriptor (to be sealed next)."""
    _seal_bitmap(bitmap[:clusters_per_group // 8], _BLOCK_BITMAP_AT, desc, seed)


def inode_bitmap_ok(bitmap: Bytes, inodes_per_group: int, desc: Bytes, seed: int) -> bool:
    """Whether an inode bitmap matches its group descriptor; only the bits of inodes count."""
    return _bitmap_ok(bitmap[:(inodes_per_group + 7) // 8], _INODE_BITMAP_AT, desc, seed)


def seal_inode_bitmap(bitmap: Bytes, inodes_per_group: int, desc: bytearray, seed: int) -> None:
    """Store an inode bitmap's checksum in its group descriptor (to be sealed next)."""
    _seal_bitmap(bitmap[:(inodes_per_group + 7) // 8], _INODE_BITMAP_AT, desc, seed)


# ---- inodes ------------------------------------------------------------------------------------------------

_GENERATION_AT, _INODE_LOW_AT, _EXTRA_AT, _INODE_HIGH_AT = 0x64, 0x7C, 0x80, 0x82
_EXTRA_WITH_HIGH = 4  # extra_isize from which the fields reach the end of checksum_hi


def _has_high_half(raw: Bytes) -> bool:
    return len(raw) >= 0x84 and _u16(raw, _EXTRA_AT) >= _EXTRA_WITH_HIGH


def _inode(raw: Bytes, number: int, seed: int) -> int:
    body = _LE32.pack(number) + raw[_GENERATION_AT:_GENERATION_AT + 4] + raw[:_INODE_LOW_AT] + _ZERO2
    if _has_high_half(raw):
        return crc32c(seed, body + raw[0x7E:_INODE_HIGH_AT] + _ZERO2 + raw[0x84:])
    return crc32c(seed, body + raw[0x7E:])


def inode_ok(raw: Bytes, number: int, seed: int) -> bool:
    """Whether a whole on-disk inode (``inode_size`` bytes) matches; 16 bits where it has no room for 32."""
    if len(raw) < 128:
        return False
    value = _inode(raw, number, seed)
    if _has_high_half(raw):
        return value == _u16(raw, _INODE_LOW_AT) | _u16(raw, _INODE_HIGH_AT) << 16
    return value & 0xFFFF == _u16(raw, _INODE_LOW_AT)


def seal_inode(raw: bytearray, number: int, seed: int) -> None:
    """Store an inode's checksum."""
    value = _inode(raw, number, seed)
    _LE16.pack_into(raw, _INODE_LOW_AT, value & 0xFFFF)
    if _has_high_half(raw):
        _LE16.pack_into(raw, _INODE_HIGH_AT, value >> 16)


# ---- blocks of one inode: extents, directories, hash trees, orphans; ``inode_seed`` is the owner's ---------

def _extent_tail(raw: Bytes) -> int | None:
    """Where an extent block keeps its checksum: after the last entry that would fit; None when outside the block."""
    if len(raw) < 12:
        return None
    offset = 12 + 12 * _u16(raw, 4)
    return offset if offset + 4 <= len(raw) else None


def extent_block_ok(raw: Bytes, inode_seed: int) -> bool:
    """Whether a block of an extent tree (not the root in the inode) matches."""
    at = _extent_tail(raw)
    return at is not None and crc32c(inode_seed, raw[:at]) == _u32(raw, at)


def seal_extent_block(raw: bytearray, inode_seed: int) -> None:
    """Store the checksum of a block of an extent tree, whose header is ours and right."""
    at = _extent_tail(raw)
    assert at is not None
    _LE32.pack_into(raw, at, crc32c(inode_seed, raw[:at]))


_DIR_TAIL = b"\0\0\0\0\x0c\0\0\xde"  # an unused entry of 12 bytes whose file type no other entry has
_DIR_TAIL_BYTES = 12


def dir_block_has_tail(raw: Bytes) -> bool:
    """Whether a linear directory block ends in the fake entry that holds a checksum."""
    return len(raw) >= _DIR_TAIL_BYTES and raw[-_DIR_TAIL_BYTES:-4] == _DIR_TAIL


def dir_block_ok(raw: Bytes, inode_seed: int) -> bool:
    """Whether a linear directory block (also a leaf of a hash tree) has its tail and matches."""
    return dir_block_has_tail(raw) and crc32c(inode_seed, raw[:-_DIR_TAIL_BYTES]) == _u32(raw, len(raw) - 4)


def seal_dir_block(raw: bytearray, inode_seed: int) -> None:
    """Store the tail of a linear directory block; its entries must leave the last 12 bytes free."""
    value = crc32c(inode_seed, raw[:-_DIR_TAIL_BYTES])
    raw[-_DIR_TAIL_BYTES:] = _DIR_TAIL + _LE32.pack(value)


def _htree_tail(raw: Bytes, count_offset: int) -> tuple[int, int] | None:
    """(end of the entries in use, place of the tail) of a hash tree node; None when they cannot be right."""
    if count_offset < 0 or count_offset + 4 > len(raw):
        return None
    limit, count = _u16(raw, count_offset), _u16(raw, count_offset + 2)
    tail = count_offset + 8 * limit
    return (count_offset + 8 * count, tail) if count <= limit and tail + 8 <= len(raw) else None


def _htree_node(raw: Bytes, inode_seed: int, end: int, tail: int) -> int:
    return crc32c(inode_seed, bytes(raw[:end]) + raw[tail:tail + 4] + _ZERO4)


def htree_node_ok(raw: Bytes, inode_seed: int, count_offset: int) -> bool:
    """Whether a node of a hash tree matches; its limit and count stand at ``count_offset`` (root 32, others 8).

    Only the entries in use count, then the tail, which follows the last entry that would fit.
    """
    places = _htree_tail(raw, count_offset)
    return places is not None and _htree_node(raw, inode_seed, *places) == _u32(raw, places[1] + 4)


def seal_htree_node(raw: bytearray, inode_seed: int, count_offset: int) -> None:
    """Store the checksum of a node of a hash tree, whose limit and count are ours and right."""
    places = _htree_tail(raw, count_offset)
    assert places is not None
    _LE32.pack_into(raw, places[1] + 4, _htree_node(raw, inode_seed, *places))


_ORPHAN_MAGIC = 0x0B10CA04


def orphan_block_ok(raw: Bytes, block: int, inode_seed: int) -> bool:
    """Whether a block of the orphan file has its magic number and matches; ``block`` is its place on the device."""
    if len(raw) < 8 or _u32(raw, len(raw) - 8) != _ORPHAN_MAGIC:
        return False
    return crc32c(inode_seed, _LE64.pack(block) + raw[:-8]) == _u32(raw, len(raw) - 4)


def seal_orphan_block(raw: bytearray, block: int, inode_seed: int) -> None:
    """Store magic number and checksum of a block of the orphan file."""
    value = crc32c(inode_seed, _LE64.pack(block) + raw[:-8])
    _OWNER.pack_into(raw, len(raw) - 8, _ORPHAN_MAGIC, value)


# ---- extended attribute blocks: shared between inodes, so bound to their place -----------------------------

_XATTR_AT = 16


def _xattr_block(raw: Bytes, block: int, seed: int) -> int:
    return crc32c(seed, _LE64.pack(block) + raw[:_XATTR_AT] + _ZERO4 + raw[_XATTR_AT + 4:])


def xattr_block_ok(raw: Bytes, block: int, seed: int) -> bool:
    """Whether a block of extended attributes matches; ``block`` is its place on the device."""
    return len(raw) >= 32 and _xattr_block(raw, block, seed) == _u32(raw, _XATTR_AT)


def seal_xattr_block(raw: bytearray, block: int, seed: int) -> None:
    """Store the checksum of a block of extended attributes."""
    _LE32.pack_into(raw, _XATTR_AT, _xattr_block(raw, block, seed))


# ---- the journal (big-endian); ``journal_seed`` is ``seed_of`` the journal's UUID --------------------------

_JOURNAL_SUPER_AT = 0xFC
_COMMIT_AT = 0x10


def _be32_ok(raw: Bytes, at: int, seed: int) -> bool:
    return len(raw) >= at + 4 and crc32c(seed, bytes(raw[:at]) + _ZERO4 + raw[at + 4:]) == _BE32.unpack_from(raw, at)[0]


def _seal_be32(raw: bytearray, at: int, seed: int) -> None:
    raw[at:at + 4] = _ZERO4
    _BE32.pack_into(raw, at, crc32c(seed, raw))


def journal_superblock_ok(raw: Bytes) -> bool:
    """Whether the 1024 bytes of a journal's superblock match (checksum version 2 or 3)."""
    return len(raw) >= 1024 and _be32_ok(raw[:1024], _JOURNAL_SUPER_AT, _ALL_ONES)


def seal_journal_superblock(raw: bytearray) -> None:
    """Store the checksum in the 1024 bytes of a journal's superblock."""
    _seal_be32(raw, _JOURNAL_SUPER_AT, _ALL_ONES)


def journal_tail_ok(raw: Bytes, journal_seed: int) -> bool:
    """Whether a descriptor or revocation block matches its last word (checksum version 2 or 3)."""
    return len(raw) >= 16 and _be32_ok(raw, len(raw) - 4, journal_seed)


def seal_journal_tail(raw: bytearray, journal_seed: int) -> None:
    """Store the last word of a descriptor or revocation block."""
    _seal_be32(raw, len(raw) - 4, journal_seed)


def journal_commit_ok(raw: Bytes, journal_seed: int) -> bool:
    """Whether a commit block matches (checksum version 2 or 3)."""
    return _be32_ok(raw, _COMMIT_AT, journal_seed)


def seal_journal_commit(raw: bytearray, journal_seed: int) -> None:
    """Store the checksum of a commit block."""
    _seal_be32(raw, _COMMIT_AT, journal_seed)


def journal_data(block: Bytes, sequence: int, journal_seed: int) -> int:
    """What the tag of a logged block holds in version 3; version 2 keeps the low 16 bits.

    ``block`` is as it stands in the journal: with its first word zeroed where the tag says it was escaped.
    """
    return crc32c(crc32c(journal_seed, _BE32.pack(sequence)), block)


def journal_commit_v1(blocks_before: int, block: Bytes) -> int:
    """The running sum of version 1 (start: all ones) after one more descriptor or data block of the transaction."""
    return crc32_be(blocks_before, block)


def fast_commit(before: int, tags: Bytes) -> int:
    """The running sum of a fast commit (start: 0) after more of its tags, the last of them the tail up to its sum."""
    return crc32c(before, tags)
