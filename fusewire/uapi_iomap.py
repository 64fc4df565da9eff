"""The fuse iomap extension as C declarations, in its three generations. Source: docs of the extension, sections 0.1-8.

G6 (October 2025), G7 (February 2026) and GL (May 2026) all announce minor 99 and yet differ in layouts and numbers, so
each is declared whole. The texts are written with the kernel's names; `GENERATION_TEXTS` appends the generation to each
name (`fuse_iomap_io` becomes `fuse_iomap_io_G7`), which lets all three live beside the ordinary protocol.
"""

import re

IOMAP_COMMON = """
struct fuse_iomap_support { uint64_t flags, padding; };
struct fuse_iomap_io { uint64_t offset, length, addr; uint16_t type, flags; uint32_t dev; };
struct fuse_iomap_begin_in { uint32_t opflags, reserved; uint64_t attr_ino, pos, count; };
struct fuse_iomap_begin_out { struct fuse_iomap_io read, write; };
struct fuse_iomap_end_in {
    uint32_t opflags, reserved;
    uint64_t attr_ino, pos, count;
    int64_t written;
    struct fuse_iomap_io map;
};
struct fuse_freezefs_in { uint64_t unlinked; };
struct fuse_shutdownfs_in { uint64_t flags; };
struct fuse_backing_inval_out { uint32_t dev, reserved; uint64_t offset, length; };
struct fuse_iomap_upsert_mappings_out { uint64_t nodeid, attr_ino; struct fuse_iomap_io read, write; };
struct fuse_iomap_range { uint64_t offset, length; };
struct fuse_iomap_inval_mappings_out { uint64_t nodeid, attr_ino; struct fuse_iomap_range read, write; };
struct fuse_iomap_backing_blocksize { uint32_t backing_id, blocksize; };
struct fuse_iomap_sx_time { int64_t tv_sec; uint32_t tv_nsec; int32_t __reserved; };
struct fuse_statx {
    uint32_t mask, blksize;
    uint64_t attributes;
    uint32_t nlink, uid, gid;
    uint16_t mode, __spare0[1];
    uint64_t ino, size, blocks, attributes_mask;
    struct fuse_iomap_sx_time atime, btime, ctime, mtime;
    uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
    uint64_t mnt_id;
    uint32_t dio_mem_align, dio_offset_align;
    uint64_t subvol;
    uint32_t atomic_write_unit_min, atomic_write_unit_max, atomic_write_segments_max;
    uint32_t dio_read_offset_align, atomic_write_unit_max_opt, __spare2[1];
    uint64_t __spare3[8];
};
enum { FUSE_IOMAP = 1 << 43 };
enum {
    FUSE_FREEZE_FS = 4089, FUSE_UNFREEZE_FS = 4090, FUSE_SHUTDOWN_FS = 4091,
    FUSE_IOMAP_CONFIG = 4092, FUSE_IOMAP_IOEND = 4093, FUSE_IOMAP_BEGIN = 4094, FUSE_IOMAP_END = 4095
};
enum {
    FUSE_NOTIFY_BACKING_INVAL = 99, FUSE_NOTIFY_IOMAP_UPSERT_MAPPINGS = 100, FUSE_NOTIFY_IOMAP_INVAL_MAPPINGS = 101
};
enum { FUSE_IOMAP_SUPPORT_FILEIO = 1 << 0, FUSE_IOMAP_SUPPORT_ATOMIC = 1 << 1 };
enum { FUSE_BACKING_TYPE_MASK = 0xff, FUSE_BACKING_TYPE_PASSTHROUGH = 0, FUSE_BACKING_TYPE_IOMAP = 1 };
enum {
    FUSE_IOMAP_TYPE_HOLE = 0, FUSE_IOMAP_TYPE_DELALLOC = 1, FUSE_IOMAP_TYPE_MAPPED = 2,
    FUSE_IOMAP_TYPE_UNWRITTEN = 3, FUSE_IOMAP_TYPE_INLINE = 4
};
enum { FUSE_IOMAP_DEV_NULL = 0 };
enum { FUSE_IOMAP_NULL_ADDR = 0xffffffffffffffff };
enum {
    FUSE_IOMAP_F_NEW = 1 << 0, FUSE_IOMAP_F_DIRTY = 1 << 1, FUSE_IOMAP_F_SHARED = 1 << 2,
    FUSE_IOMAP_F_MERGED = 1 << 3, FUSE_IOMAP_F_BOUNDARY = 1 << 4, FUSE_IOMAP_F_ANON_WRITE = 1 << 5,
    FUSE_IOMAP_F_ATOMIC_BIO = 1 << 6, FUSE_IOMAP_F_WANT_IOMAP_END = 1 << 7, FUSE_IOMAP_F_SIZE_CHANGED = 1 << 8,
    FUSE_IOMAP_F_STALE = 1 << 9
};
enum {
    FUSE_IOMAP_OP_WRITE = 1 << 0, FUSE_IOMAP_OP_ZERO = 1 << 1, FUSE_IOMAP_OP_REPORT = 1 << 2,
    FUSE_IOMAP_OP_FAULT = 1 << 3, FUSE_IOMAP_OP_DIRECT = 1 << 4, FUSE_IOMAP_OP_NOWAIT = 1 << 5,
    FUSE_IOMAP_OP_OVERWRITE_ONLY = 1 << 6, FUSE_IOMAP_OP_UNSHARE = 1 << 7, FUSE_IOMAP_OP_DAX = 1 << 8,
    FUSE_IOMAP_OP_ATOMIC = 1 << 9, FUSE_IOMAP_OP_DONTCACHE = 1 << 10
};
enum {
    FUSE_IOMAP_IOEND_SHARED = 1 << 0, FUSE_IOMAP_IOEND_UNWRITTEN = 1 << 1, FUSE_IOMAP_IOEND_BOUNDARY = 1 << 2,
    FUSE_IOMAP_IOEND_DIRECT = 1 << 3, FUSE_IOMAP_IOEND_APPEND = 1 << 4, FUSE_IOMAP_IOEND_WRITEBACK = 1 << 5,
    FUSE_IOMAP_IOEND_SWAPOFF = 1 << 6
};
enum {
    FUSE_IOMAP_CONFIG_SID = 1 << 0, FUSE_IOMAP_CONFIG_UUID = 1 << 1, FUSE_IOMAP_CONFIG_BLOCKSIZE = 1 << 2,
    FUSE_IOMAP_CONFIG_MAX_LINKS = 1 << 3, FUSE_IOMAP_CONFIG_TIME = 1 << 4, FUSE_IOMAP_CONFIG_MAXBYTES = 1 << 5
};
"""

_CONFIG_OUT = """
struct fuse_iomap_config_out {
    uint64_t flags;
    char s_id[32];
    uint8_t s_uuid[16], s_uuid_len, s_pad[3];
    uint32_t s_blocksize, s_max_links, s_time_gran;
    int64_t s_time_min, s_time_max, s_maxbytes;
"""

ONLY_G6 = f"""
struct fuse_iomap_ioend_in {{
    uint32_t flags; int32_t error;
    uint64_t attr_ino, pos, new_addr;
    uint32_t written, reserved;
}};
struct fuse_iomap_config_in {{ uint64_t flags; int64_t maxbytes; uint64_t padding[6]; }};
{_CONFIG_OUT} }};
enum {{
    FUSE_ATTR_IOMAP = 1 << 2, FUSE_ATTR_ATOMIC = 1 << 3, FUSE_ATTR_SYNC = 1 << 4, FUSE_ATTR_IMMUTABLE = 1 << 5,
    FUSE_ATTR_APPEND = 1 << 6
}};
"""

_SINCE_G7 = f"""
struct fuse_iomap_ioend_in {{
    uint32_t flags; int32_t error;
    uint64_t attr_ino, pos, new_addr, written;
    uint32_t dev, padding;
}};
struct fuse_iomap_ioend_out {{ uint64_t newsize; }};
struct fuse_iomap_config_in {{
    uint64_t flags; int64_t maxbytes; uint32_t cache_maxbytes, zero; uint64_t padding[5];
}};
{_CONFIG_OUT} uint32_t cache_maxbytes, padding; }};
enum {{ FUSE_IOMAP_CONFIG_CACHE_MAXBYTES = 1 << 6 }};
enum {{
    FUSE_ATTR_EXCLUSIVE = 1 << 2, FUSE_ATTR_ATOMIC = 1 << 4, FUSE_ATTR_SYNC = 1 << 5,
    FUSE_ATTR_IMMUTABLE = 1 << 6, FUSE_ATTR_APPEND = 1 << 7
}};
"""

_NUMBERS_TO_G7 = """
enum {
    FUSE_IOMAP_TYPE_PURE_OVERWRITE = 255, FUSE_IOMAP_TYPE_RETRY_CACHE = 254, FUSE_IOMAP_TYPE_NOCACHE = 253
};
enum { FUSE_IOMAP_OP_WRITEBACK = 1 << 31, FUSE_IOMAP_OP_SWAPFILE = 1 << 30 };
"""

ONLY_G7 = "enum { FUSE_ATTR_IOMAP = 1 << 3 };\n"

ONLY_GL = """
struct fuse_iomap_stripe_config { uint16_t nr_strips; uint8_t reserved[6]; uint64_t strip_width; };
struct fuse_iomap_strip { uint32_t dev, reserved; uint64_t addr; };
enum { FUSE_ATTR_IOMAP = 0xc };
enum {
    FUSE_IOMAP_TYPE_PURE_OVERWRITE = 65535, FUSE_IOMAP_TYPE_RETRY_CACHE = 65534, FUSE_IOMAP_TYPE_NOCACHE = 65533,
    FUSE_IOMAP_TYPE_MAPPED_STRIPE = 65532, FUSE_IOMAP_TYPE_UNWRITTEN_STRIPE = 65531
};
enum { FUSE_IOMAP_OP_WRITEBACK = 1 << 11, FUSE_IOMAP_OP_SWAPFILE = 1 << 31 };
"""


def _name_for(generation: str, text: str) -> str:
    """`text` with the generation appended to each name that it declares or uses."""
    return re.sub(r"\b(?:fuse|FUSE)_\w+", rf"\g<0>_{generation}", text)


GENERATION_TEXTS = {
    "G6": _name_for("G6", IOMAP_COMMON + ONLY_G6 + _NUMBERS_TO_G7),
    "G7": _name_for("G7", IOMAP_COMMON + _SINCE_G7 + _NUMBERS_TO_G7 + ONLY_G7),
    "GL": _name_for("GL", IOMAP_COMMON + _SINCE_G7 + ONLY_GL),
}
"""Generation → its declarations, each name with the generation as suffix."""
