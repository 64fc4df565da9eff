"""The hashes that order a hashed directory: legacy, half MD4 and TEA, each over signed or unsigned characters.

A name hashes to (major, minor).  The tree is ordered by major; its lowest bit is always 0 there, because a tree entry
uses it to say that a run of equal hashes continues in the next leaf.  Names with bytes ≥ 0x80 hash differently where
``char`` is signed, so the superblock's ``flags`` say which machine made the file system.
Source: kernel documentation, ext4, "Hash Tree Directories"; RFC 1320 (MD4); Wheeler and Needham, TEA.
"""

from functools import lru_cache
from struct import Struct

LEGACY, HALF_MD4, TEA, LEGACY_UNSIGNED, HALF_MD4_UNSIGNED, TEA_UNSIGNED, SIPHASH = range(7)
# SIPHASH orders directories that are both encrypted and casefolded, under a key derived from the encryption key:
# without that key it cannot be computed, and such a directory can only be searched from end to end.

COMPUTABLE = frozenset(range(SIPHASH))
EOF_HASH = 0x7FFFFFFF << 1  # a reader at the end of a directory; no name may have it

_MASK = 0xFFFFFFFF
_SEED = Struct("<4I")
_MD4_START = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
_SQRT2, _SQRT3 = 0x5A827999, 0x6ED9EBA1  # MD4's constants of rounds 2 and 3
_TEA_DELTA = 0x9E3779B9

Four = tuple[int, int, int, int]


def unsigned_version(version: int, flags: int) -> int:
    """The hash version to use where a superblock with ``flags`` (bit 1: unsigned characters) names ``version``."""
    return version + LEGACY_UNSIGNED if flags & 2 and version <= TEA else version


@lru_cache(maxsize=16)
def seed_words(seed: Four | bytes) -> Four:
    """The four words that a hash starts from; a superblock's all-zero seed means MD4's own."""
    one, two, three, four = _SEED.unpack(seed) if isinstance(seed, bytes) else seed
    return (one, two, three, four) if one or two or three or four else _MD4_START


def dirhash(name: bytes, version: int, seed: Four | bytes) -> tuple[int, int]:
    """(major, minor) of a name; ``version`` is one of ``COMPUTABLE``, anything else a ValueError.

    ``name`` is what the directory orders by: the folded name where it is casefolded, the ciphertext where encrypted.
    """
    if not LEGACY <= version < SIPHASH:
        raise ValueError(f"hash version {version} cannot be computed")
    major, minor = compute(name, version, seed_words(seed))
    major &= ~1
    return (EOF_HASH - 2 if major == EOF_HASH else major), minor


def compute_python(name: bytes, version: int, start: Four) -> tuple[int, int]:
    """(hash, minor hash) before the lowest bit and the end mark are taken away from it."""
    signed = version <= TEA and not name.isascii()
    kind = version if version <= TEA else version - LEGACY_UNSIGNED
    if kind == LEGACY:
        return _legacy(name, signed), 0
    state = start
    if kind == TEA:
        for at in range(0, len(name), 16):
            state = _tea(state, _words(name, at, 4, signed))
        return state[0], state[1]
    for at in range(0, len(name), 32):
        state = _half_md4(state, _words(name, at, 8, signed))
    return state[1], state[2]


compute = compute_python  # ``fusewire.accel`` puts its compiled twin here


def _legacy(name: bytes, signed: bool) -> int:
    older, newer = 0x37ABE8F9, 0x12A3FE2D
    for byte in name:
        character = byte - 256 if signed and byte > 127 else byte
        value = (older + (newer ^ (character * 7152373 & _MASK))) & _MASK
        if value & 0x80000000:
            value -= 0x7FFFFFFF
        older, newer = newer, value
    return newer << 1 & _MASK


def _words(name: bytes, at: int, count: int, signed: bool) -> list[int]:
    """``count`` words of the name from byte ``at`` on, filled up with the length of what is left of the name."""
    left = len(name) - at
    filler = (left & 0xFF) * 0x01010101
    chunk = name[at:at + 4 * count]
    words = []
    for start in range(0, len(chunk), 4):
        four = chunk[start:start + 4]
        characters = int.from_bytes(four, "big")
        value = (filler << 8 * len(four)) + characters
        if signed:
            value -= (characters & 0x80808080) << 1  # 256 less for each character that is negative
        words.append(value & _MASK)
    return words + [filler] * (count - len(words))


_FIRST = tuple(zip((0, 1, 2, 3, 4, 5, 6, 7), (3, 7, 11, 19) * 2, strict=True))  # (word, bits to rotate by) of each step
_SECOND = tuple(zip((1, 3, 5, 7, 0, 2, 4, 6), (3, 5, 9, 13) * 2, strict=True))
_THIRD = tuple(zip((3, 7, 2, 6, 1, 5, 0, 4), (3, 9, 11, 15) * 2, strict=True))


def _half_md4(state: Four, words: list[int]) -> Four:
    """MD4's compression with half the steps: 8 words in 3 rounds of 8."""
    a, b, c, d = state
    for index, bits in _FIRST:
        value = a + (d ^ (b & (c ^ d))) + words[index] & _MASK
        a, b, c, d = d, (value << bits | value >> 32 - bits) & _MASK, b, c
    for index, bits in _SECOND:
        value = a + (b & c) + ((b ^ c) & d) + words[index] + _SQRT2 & _MASK
        a, b, c, d = d, (value << bits | value >> 32 - bits) & _MASK, b, c
    for index, bits in _THIRD:
        value = a + (b ^ c ^ d) + words[index] + _SQRT3 & _MASK
        a, b, c, d = d, (value << bits | value >> 32 - bits) & _MASK, b, c
    return (state[0] + a & _MASK, state[1] + b & _MASK, state[2] + c & _MASK, state[3] + d & _MASK)


def _tea(state: Four, words: list[int]) -> Four:
    """Tiny Encryption Algorithm, 16 cycles, the words of the name being its key."""
    (left, right), total = state[:2], 0
    k0, k1, k2, k3 = words
    for _ in range(16):
        total = total + _TEA_DELTA & _MASK
        left = left + ((right << 4) + k0 & _MASK ^ (right + total & _MASK) ^ ((right >> 5) + k1 & _MASK)) & _MASK
        right = right + ((left << 4) + k2 & _MASK ^ (left + total & _MASK) ^ ((left >> 5) + k3 & _MASK)) & _MASK
    return (state[0] + left & _MASK, state[1] + right & _MASK, state[2], state[3])
