"""Makes ``fusewire._accel``: the loops of the ext4 core whose twins in C are worth having (``accel`` says how much).

Every function is total: it takes any bytes, reads inside the lengths given and writes inside the room given.  There is
no state and no allocation, and nothing here decides anything that the Python twin would decide otherwise.
"""

import zlib
from pathlib import Path

from cffi import FFI

DIGEST = zlib.crc32(Path(__file__).read_bytes())
"""Compiled in, so that ``accel`` leaves alone what was built from another version of this file."""

DECLARATIONS = """
    uint64_t fw_dirhash(const uint8_t *name, size_t length, int version,
                        uint32_t s0, uint32_t s1, uint32_t s2, uint32_t s3);
    uint32_t fw_crc16(uint32_t seed, const uint8_t *data, size_t length);

    typedef struct { uint32_t end, inode, kind, name, name_end; } fw_entry;
    int32_t fw_entries(const uint8_t *block, size_t size, uint32_t inodes, int any_name, fw_entry *out, size_t room);

    typedef struct {
        uint32_t inode_bytes, block_bytes, seed, flags, checksums, huge_files, large_directories;
        uint64_t largest_directory, largest_mapped, largest_extents;
    } fw_inodes;
    int fw_inode_ok(const uint8_t *raw, size_t size, uint32_t number, uint32_t seed);
    int64_t fw_attributes(const uint8_t *block, size_t size, size_t at, uint32_t number, const fw_inodes *how,
                          uint8_t *out);
"""


def _crc32c_tables() -> str:
    """Four tables of CRC-32C, for four bytes a step, as the initialiser of an array."""
    first = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901 - the register, shifted
        first.append(value)
    tables = [first]
    for _ in range(3):
        tables.append([value >> 8 ^ first[value & 255] for value in tables[-1]])
    rows = ("{" + ",".join(f"{value}u" for value in table) + "}" for table in tables)
    return "{" + ",".join(rows) + "}"


SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { uint32_t end, inode, kind, name, name_end; } fw_entry;

/* ---- directory hashes; the twin is fusewire/ext4/dirhash.py ---- */

enum { LEGACY, HALF_MD4, TEA };

static uint32_t character(uint8_t byte, int is_signed)
{
    return is_signed && byte > 127 ? (uint32_t)byte - 256u : byte;
}

static uint32_t legacy(const uint8_t *name, size_t length, int is_signed)
{
    uint32_t older = 0x37abe8f9u, newer = 0x12a3fe2du;
    for (size_t at = 0; at < length; at++) {
        uint32_t value = older + (newer ^ character(name[at], is_signed) * 7152373u);
        if (value & 0x80000000u)
            value -= 0x7fffffffu;
        older = newer;
        newer = value;
    }
    return newer << 1;
}

/* count words of the name from its start on, filled up with the length of what is left of it */
static void words(const uint8_t *name, size_t left, size_t count, int is_signed, uint32_t *out)
{
    uint32_t filler = (uint32_t)(left & 0xff) * 0x01010101u;
    size_t at = 0, used = left < 4 * count ? left : 4 * count;
    for (size_t word = 0; word < count; word++) {
        uint32_t value = filler;
        for (int step = 0; step < 4 && at < used; step++, at++)
            value = (value << 8) + character(name[at], is_signed);
        out[word] = value;
    }
}

static uint32_t rotate(uint32_t value, int bits)
{
    return value << bits | value >> (32 - bits);
}

static void half_md4(uint32_t state[4], const uint32_t in[8])
{
    static const uint8_t order[3][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 3, 5, 7, 0, 2, 4, 6}, {3, 7, 2, 6, 1, 5, 0, 4}};
    static const uint8_t shifts[3][4] = {{3, 7, 11, 19}, {3, 5, 9, 13}, {3, 9, 11, 15}};
    static const uint32_t constants[3] = {0, 0x5a827999u, 0x6ed9eba1u};
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    for (int round = 0; round < 3; round++) {
        for (int step = 0; step < 8; step++) {
            uint32_t mixed = round == 0 ? d ^ (b & (c ^ d)) : round == 1 ? (b & c) + ((b ^ c) & d) : b ^ c ^ d;
            uint32_t turned = rotate(a + mixed + in[order[round][step]] + constants[round], shifts[round][step & 3]);
            a = d;
            d = c;
            c = b;
            b = turned;
        }
    }
    state[0] += a;
    state[1] += b;
    state[2] += c;
    state[3] += d;
}

static void tea(uint32_t state[4], const uint32_t key[4])
{
    uint32_t left = state[0], right = state[1], total = 0;
    for (int cycle = 0; cycle < 16; cycle++) {
        total += 0x9e3779b9u;
        left += ((right << 4) + key[0]) ^ (right + total) ^ ((right >> 5) + key[1]);
        right += ((left << 4) + key[2]) ^ (left + total) ^ ((left >> 5) + key[3]);
    }
    state[0] += left;
    state[1] += right;
}

/* hash << 32 | minor hash; version 0 to 5, others like version 5 */
uint64_t fw_dirhash(const uint8_t *name, size_t length, int version,
                    uint32_t s0, uint32_t s1, uint32_t s2, uint32_t s3)
{
    uint32_t state[4] = {s0, s1, s2, s3}, in[8];
    int is_signed = version <= TEA, kind = is_signed ? version : version - 3;
    if (kind == LEGACY)
        return (uint64_t)legacy(name, length, is_signed) << 32;
    size_t count = kind == HALF_MD4 ? 8 : 4;
    for (size_t at = 0; at < length; at += 4 * count) {
        words(name + at, length - at, count, is_signed, in);
        if (kind == HALF_MD4)
            half_md4(state, in);
        else
            tea(state, in);
    }
    return kind == HALF_MD4 ? (uint64_t)state[1] << 32 | state[2] : (uint64_t)state[0] << 32 | state[1];
}

/* ---- CRC-16 of group descriptors; the twin is fusewire/ext4/checksum.py ---- */

uint32_t fw_crc16(uint32_t seed, const uint8_t *data, size_t length)
{
    uint32_t value = seed & 0xffffu;
    for (size_t at = 0; at < length; at++) {
        value ^= data[at];
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xa001u : 0);
    }
    return value;
}

/* ---- a block of directory entries; the twin is fusewire/ext4/dirblock.py ---- */

static uint32_t le16(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8;
}

static uint32_t le32(const uint8_t *at)
{
    return le16(at) | le16(at + 2) << 16;
}

/* a record length in a 64 KiB block: its two lowest bits are bits 16 and 17, and 0 and 65535 mean the whole block */
static uint32_t long_record(uint32_t length)
{
    return length == 0 || length == 65535 ? 65536 : (length & 0xfffcu) | (length & 3) << 16;
}

/* Entries in use, or -1 if anything is wrong or does not fit into out: the twin then says what. */
int32_t fw_entries(const uint8_t *block, size_t size, uint32_t inodes, int any_name, fw_entry *out, size_t room)
{
    size_t at = 0, found = 0;
    if (size > 65536)
        return -1;
    while (at < size) {
        if (size - at < 8)
            return -1;
        uint32_t inode = le32(block + at), length = le16(block + at + 4), name_length = block[at + 6];
        const uint8_t *name = block + at + 8;
        if (size == 65536)
            length = long_record(length);
        if (length < 12 || length % 4 || length > size - at || name_length + 8 > length)
            return -1;
        if (inode) {
            if (inode > inodes || name_length == 0 || found == room)
                return -1;
            if (!any_name && (memchr(name, '/', name_length) || memchr(name, 0, name_length)))
                return -1;
            out[found++] = (fw_entry){(uint32_t)(at + length), inode, block[at + 7], (uint32_t)(at + 8),
                                      (uint32_t)(at + 8 + name_length)};
        }
        at += length;
    }
    return (int32_t)found;
}

/* ---- attributes of an inode; the twins are inode.load, inode.check_in_use and handlers/nodes.py ---- */

typedef struct {
    uint32_t inode_bytes, block_bytes, seed, flags, checksums, huge_files, large_directories;
    uint64_t largest_directory, largest_mapped, largest_extents;
} fw_inodes;

static const uint32_t crc_table[4][256] = CRC32C_TABLES;

static uint32_t crc32c(uint32_t crc, const uint8_t *data, size_t length)
{
    for (; length >= 4; data += 4, length -= 4) {
        crc ^= le32(data);
        crc = crc_table[3][crc & 255] ^ crc_table[2][crc >> 8 & 255] ^ crc_table[1][crc >> 16 & 255] ^
              crc_table[0][crc >> 24];
    }
    while (length--)
        crc = crc_table[0][(crc ^ *data++) & 255] ^ crc >> 8;
    return crc;
}

static int checksum_matches(const uint8_t *raw, uint32_t number, const fw_inodes *how)
{
    static const uint8_t zero[2];
    uint8_t owner[4] = {(uint8_t)number, (uint8_t)(number >> 8), (uint8_t)(number >> 16), (uint8_t)(number >> 24)};
    uint32_t crc = crc32c(how->seed, owner, 4);
    crc = crc32c(crc, raw + 0x64, 4);
    crc = crc32c(crc, raw, 0x7C);
    crc = crc32c(crc, zero, 2);
    if (how->inode_bytes < 0x84 || le16(raw + 0x80) < 4)
        return (crc32c(crc, raw + 0x7E, how->inode_bytes - 0x7E) & 0xFFFF) == le16(raw + 0x7C);
    crc = crc32c(crc, raw + 0x7E, 4);
    crc = crc32c(crc, zero, 2);
    return crc32c(crc, raw + 0x84, how->inode_bytes - 0x84) == (le16(raw + 0x7C) | le16(raw + 0x82) << 16);
}

/* checksum.inode_ok of a whole inode */
int fw_inode_ok(const uint8_t *raw, size_t size, uint32_t number, uint32_t seed)
{
    fw_inodes how = {.inode_bytes = (uint32_t)size, .seed = seed};
    return size >= 128 && size <= 65536 && checksum_matches(raw, number, &how);
}

/* seconds since 1970 at out[0], nanoseconds at out[1] */
static void moment(uint32_t seconds, uint32_t extra, int64_t *whole, uint32_t *part)
{
    *whole = (int64_t)(int32_t)seconds + ((int64_t)(extra & 3) << 32);
    *part = extra >> 2 > 999999999u ? 999999999u : extra >> 2;
}

/* The inode's generation, and its attributes in out (88 bytes: ino size blocks atime mtime ctime, 8 each; atimensec
   mtimensec ctimensec mode nlink uid gid rdev blksize flags, 4 each); -1 if it is not sound and of the usual kind. */
int64_t fw_attributes(const uint8_t *block, size_t size, size_t at, uint32_t number, const fw_inodes *how, uint8_t *out)
{
    const uint8_t *raw = block + at;
    if (how->inode_bytes < 128 || at > size || size - at < how->inode_bytes)
        return -1;
    uint32_t mode = le16(raw), kind = mode & 0170000, links = le16(raw + 0x1A), flags = le32(raw + 0x20), reach = 0;
    if ((kind != 0100000 && kind != 0040000 && kind != 0120000) || links == 0 || (flags & ~how->flags))
        return -1;
    if (how->inode_bytes > 128) {
        reach = le16(raw + 0x80);
        if (reach % 4 || 128 + reach > how->inode_bytes)
            return -1;
        if (reach == 0)
            reach = 32;
    }
    if (how->checksums && !checksum_matches(raw, number, how))
        return -1;
    uint64_t wide[6] = {number, le32(raw + 4), le32(raw + 0x1C)};
    if (kind == 0100000 || how->large_directories)
        wide[1] |= (uint64_t)le32(raw + 0x6C) << 32;
    if (how->huge_files)
        wide[2] |= (uint64_t)le16(raw + 0x74) << 32;
    if (wide[1] > (kind == 0040000 ? how->largest_directory
                   : flags & 0x80000 ? how->largest_extents : how->largest_mapped))
        return -1;
    uint32_t narrow[10] = {0, 0, 0, mode, links, le16(raw + 2) | le16(raw + 0x78) << 16,
                           le16(raw + 0x18) | le16(raw + 0x7A) << 16, 0, how->block_bytes, 0};
    moment(le32(raw + 0x08), reach >= 16 ? le32(raw + 0x8C) : 0, (int64_t *)&wide[3], &narrow[0]);
    moment(le32(raw + 0x10), reach >= 12 ? le32(raw + 0x88) : 0, (int64_t *)&wide[4], &narrow[1]);
    moment(le32(raw + 0x0C), reach >= 8 ? le32(raw + 0x84) : 0, (int64_t *)&wide[5], &narrow[2]);
    memcpy(out, wide, 48);
    memcpy(out + 48, narrow, 40);
    return le32(raw + 0x64);
}
""".replace("CRC32C_TABLES", _crc32c_tables())

ffi = FFI()
ffi.cdef(DECLARATIONS + "static const uint32_t FW_DIGEST;")
ffi.set_source("fusewire._accel", SOURCE + f"static const uint32_t FW_DIGEST = {DIGEST}u;\n",
               extra_compile_args=["-O2"])

if __name__ == "__main__":
    ffi.compile(verbose=True)
