"""Makes ``fusewire._accel``: the loops of the ext4 core whose twins in C are worth having (``accel`` says how much).

Every function is total: it takes any bytes, reads inside the lengths given and writes inside the room given.  There is
no state and no allocation, and nothing here decides anything that the Python twin would decide otherwise.
"""

from cffi import FFI

DECLARATIONS = """
    uint64_t fw_dirhash(const uint8_t *name, size_t length, int version,
                        uint32_t s0, uint32_t s1, uint32_t s2, uint32_t s3);
    uint32_t fw_crc16(uint32_t seed, const uint8_t *data, size_t length);

    typedef struct { uint32_t end, inode, kind, name, name_end; } fw_entry;
    int32_t fw_entries(const uint8_t *block, size_t size, uint32_t inodes, int any_name, fw_entry *out, size_t room);
"""

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
"""

ffi = FFI()
ffi.cdef(DECLARATIONS)
ffi.set_source("fusewire._accel", SOURCE, extra_compile_args=["-O2"])

if __name__ == "__main__":
    ffi.compile(verbose=True)
