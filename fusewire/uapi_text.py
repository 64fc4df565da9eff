"""The kernel's FUSE interface, protocol 7.46, as C declarations for cffi. Source: <linux/fuse.h>, kernel 7.3.

Only names, types, order and values: what a server and the kernel have to agree on. The flags that the header writes as
macros stand in enumerations here, since cffi evaluates constant expressions only there. This module is read both by the
build script, which turns it into fusewire/_uapi.py, and at run time, to find out whether that file is up to date.
"""

import zlib

from fusewire.uapi_iomap import GENERATION_TEXTS

STRUCTS = """
struct fuse_attr {
    uint64_t ino, size, blocks, atime, mtime, ctime;
    uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags;
};
struct fuse_sx_time { int64_t tv_sec; uint32_t tv_nsec; int32_t __reserved; };
struct fuse_statx {
    uint32_t mask, blksize;
    uint64_t attributes;
    uint32_t nlink, uid, gid;
    uint16_t mode, __spare0[1];
    uint64_t ino, size, blocks, attributes_mask;
    struct fuse_sx_time atime, btime, ctime, mtime;
    uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
    uint64_t __spare2[14];
};
struct fuse_kstatfs {
    uint64_t blocks, bfree, bavail, files, ffree;
    uint32_t bsize, namelen, frsize, padding, spare[6];
};
struct fuse_file_lock { uint64_t start, end; uint32_t type, pid; };

struct fuse_in_header {
    uint32_t len, opcode;
    uint64_t unique, nodeid;
    uint32_t uid, gid, pid;
    uint16_t total_extlen, padding;
};
struct fuse_out_header { uint32_t len; int32_t error; uint64_t unique; };

struct fuse_entry_out {
    uint64_t nodeid, generation, entry_valid, attr_valid;
    uint32_t entry_valid_nsec, attr_valid_nsec;
    struct fuse_attr attr;
};
struct fuse_forget_in { uint64_t nlookup; };
struct fuse_forget_one { uint64_t nodeid, nlookup; };
struct fuse_batch_forget_in { uint32_t count, dummy; };
struct fuse_getattr_in { uint32_t getattr_flags, dummy; uint64_t fh; };
struct fuse_attr_out { uint64_t attr_valid; uint32_t attr_valid_nsec, dummy; struct fuse_attr attr; };
struct fuse_statx_in { uint32_t getattr_flags, reserved; uint64_t fh; uint32_t sx_flags, sx_mask; };
struct fuse_statx_out {
    uint64_t attr_valid;
    uint32_t attr_valid_nsec, flags;
    uint64_t spare[2];
    struct fuse_statx stat;
};
struct fuse_mknod_in { uint32_t mode, rdev, umask, padding; };
struct fuse_mkdir_in { uint32_t mode, umask; };
struct fuse_rename_in { uint64_t newdir; };
struct fuse_rename2_in { uint64_t newdir; uint32_t flags, padding; };
struct fuse_link_in { uint64_t oldnodeid; };
struct fuse_setattr_in {
    uint32_t valid, padding;
    uint64_t fh, size, lock_owner, atime, mtime, ctime;
    uint32_t atimensec, mtimensec, ctimensec, mode, unused4, uid, gid, unused5;
};
struct fuse_open_in { uint32_t flags, open_flags; };
struct fuse_create_in { uint32_t flags, mode, umask, open_flags; };
struct fuse_open_out { uint64_t fh; uint32_t open_flags; int32_t backing_id; };
struct fuse_release_in { uint64_t fh; uint32_t flags, release_flags; uint64_t lock_owner; };
struct fuse_flush_in { uint64_t fh; uint32_t unused, padding; uint64_t lock_owner; };
struct fuse_read_in {
    uint64_t fh, offset;
    uint32_t size, read_flags;
    uint64_t lock_owner;
    uint32_t flags, padding;
};
struct fuse_write_in {
    uint64_t fh, offset;
    uint32_t size, write_flags;
    uint64_t lock_owner;
    uint32_t flags, padding;
};
struct fuse_write_out { uint32_t size, padding; };
struct fuse_statfs_out { struct fuse_kstatfs st; };
struct fuse_fsync_in { uint64_t fh; uint32_t fsync_flags, padding; };
struct fuse_setxattr_in { uint32_t size, flags, setxattr_flags, padding; };
struct fuse_getxattr_in { uint32_t size, padding; };
struct fuse_getxattr_out { uint32_t size, padding; };
struct fuse_lk_in { uint64_t fh, owner; struct fuse_file_lock lk; uint32_t lk_flags, padding; };
struct fuse_lk_out { struct fuse_file_lock lk; };
struct fuse_access_in { uint32_t mask, padding; };
struct fuse_init_in { uint32_t major, minor, max_readahead, flags, flags2, unused[11]; };
struct fuse_init_out {
    uint32_t major, minor, max_readahead, flags;
    uint16_t max_background, congestion_threshold;
    uint32_t max_write, time_gran;
    uint16_t max_pages, map_alignment;
    uint32_t flags2, max_stack_depth;
    uint16_t request_timeout, unused[11];
};
struct cuse_init_in { uint32_t major, minor, unused, flags; };
struct cuse_init_out {
    uint32_t major, minor, unused, flags, max_read, max_write, dev_major, dev_minor, spare[10];
};
struct fuse_interrupt_in { uint64_t unique; };
struct fuse_bmap_in { uint64_t block; uint32_t blocksize, padding; };
struct fuse_bmap_out { uint64_t block; };
struct fuse_ioctl_in { uint64_t fh; uint32_t flags, cmd; uint64_t arg; uint32_t in_size, out_size; };
struct fuse_ioctl_iovec { uint64_t base, len; };
struct fuse_ioctl_out { int32_t result; uint32_t flags, in_iovs, out_iovs; };
struct fuse_poll_in { uint64_t fh, kh; uint32_t flags, events; };
struct fuse_poll_out { uint32_t revents, padding; };
struct fuse_notify_poll_wakeup_out { uint64_t kh; };
struct fuse_fallocate_in { uint64_t fh, offset, length; uint32_t mode, padding; };
struct fuse_dirent { uint64_t ino, off; uint32_t namelen, type; char name[]; };
struct fuse_direntplus { struct fuse_entry_out entry_out; struct fuse_dirent dirent; };
struct fuse_lseek_in { uint64_t fh, offset; uint32_t whence, padding; };
struct fuse_lseek_out { uint64_t offset; };
struct fuse_copy_file_range_in { uint64_t fh_in, off_in, nodeid_out, fh_out, off_out, len, flags; };
struct fuse_copy_file_range_out { uint64_t bytes_copied; };
struct fuse_setupmapping_in { uint64_t fh, foffset, len, flags, moffset; };
struct fuse_removemapping_in { uint32_t count; };
struct fuse_removemapping_one { uint64_t moffset, len; };
struct fuse_syncfs_in { uint64_t padding; };
struct fuse_secctx { uint32_t size, padding; };
struct fuse_secctx_header { uint32_t size, nr_secctx; };
struct fuse_ext_header { uint32_t size, type; };
struct fuse_supp_groups { uint32_t nr_groups, groups[]; };

struct fuse_notify_inval_inode_out { uint64_t ino; int64_t off, len; };
struct fuse_notify_inval_entry_out { uint64_t parent; uint32_t namelen, flags; };
struct fuse_notify_delete_out { uint64_t parent, child; uint32_t namelen, padding; };
struct fuse_notify_store_out { uint64_t nodeid, offset; uint32_t size, padding; };
struct fuse_notify_retrieve_out { uint64_t notify_unique, nodeid, offset; uint32_t size, padding; };
struct fuse_notify_retrieve_in {
    uint64_t dummy1, offset;
    uint32_t size, dummy2;
    uint64_t dummy3, dummy4;
};
struct fuse_notify_prune_out { uint32_t count, padding; uint64_t spare; };
struct fuse_backing_map { int32_t fd; uint32_t flags; uint64_t padding; };

struct fuse_uring_ent_in_out { uint64_t flags, commit_id; uint32_t payload_sz, offset; uint64_t reserved; };
struct fuse_uring_req_header { char in_out[128], op_in[128]; struct fuse_uring_ent_in_out ring_ent_in_out; };
struct fuse_uring_cmd_req {
    uint64_t flags, commit_id;
    uint16_t qid;
    uint8_t padding[6];
    union {
        struct { uint64_t uaddr; uint32_t len, reserved; } bufpool;
        uint16_t ent_zero_copy_buf_index;
    };
};
"""

NUMBERS = """
enum {
    FUSE_KERNEL_VERSION = 7, FUSE_KERNEL_MINOR_VERSION = 46, FUSE_ROOT_ID = 1, FUSE_MIN_READ_BUFFER = 8192,
    FUSE_COMPAT_ENTRY_OUT_SIZE = 120, FUSE_COMPAT_ATTR_OUT_SIZE = 96, FUSE_COMPAT_MKNOD_IN_SIZE = 8,
    FUSE_COMPAT_WRITE_IN_SIZE = 24, FUSE_COMPAT_STATFS_SIZE = 48, FUSE_COMPAT_SETXATTR_IN_SIZE = 8,
    FUSE_COMPAT_INIT_OUT_SIZE = 8, FUSE_COMPAT_22_INIT_OUT_SIZE = 24, CUSE_INIT_INFO_MAX = 4096,
    FUSE_IOCTL_MAX_IOV = 256, FUSE_DEV_IOC_MAGIC = 229,
    FUSE_URING_IN_OUT_HEADER_SZ = 128, FUSE_URING_OP_IN_OUT_SZ = 128
};
enum {
    FATTR_MODE = 1 << 0, FATTR_UID = 1 << 1, FATTR_GID = 1 << 2, FATTR_SIZE = 1 << 3, FATTR_ATIME = 1 << 4,
    FATTR_MTIME = 1 << 5, FATTR_FH = 1 << 6, FATTR_ATIME_NOW = 1 << 7, FATTR_MTIME_NOW = 1 << 8,
    FATTR_LOCKOWNER = 1 << 9, FATTR_CTIME = 1 << 10, FATTR_KILL_SUIDGID = 1 << 11
};
enum {
    FOPEN_DIRECT_IO = 1 << 0, FOPEN_KEEP_CACHE = 1 << 1, FOPEN_NONSEEKABLE = 1 << 2, FOPEN_CACHE_DIR = 1 << 3,
    FOPEN_STREAM = 1 << 4, FOPEN_NOFLUSH = 1 << 5, FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6,
    FOPEN_PASSTHROUGH = 1 << 7, FOPEN_IO_URING_ZERO_COPY = 1 << 8
};
enum fuse_init_flag {
    FUSE_ASYNC_READ = 1 << 0, FUSE_POSIX_LOCKS = 1 << 1, FUSE_FILE_OPS = 1 << 2, FUSE_ATOMIC_O_TRUNC = 1 << 3,
    FUSE_EXPORT_SUPPORT = 1 << 4, FUSE_BIG_WRITES = 1 << 5, FUSE_DONT_MASK = 1 << 6, FUSE_SPLICE_WRITE = 1 << 7,
    FUSE_SPLICE_MOVE = 1 << 8, FUSE_SPLICE_READ = 1 << 9, FUSE_FLOCK_LOCKS = 1 << 10, FUSE_HAS_IOCTL_DIR = 1 << 11,
    FUSE_AUTO_INVAL_DATA = 1 << 12, FUSE_DO_READDIRPLUS = 1 << 13, FUSE_READDIRPLUS_AUTO = 1 << 14,
    FUSE_ASYNC_DIO = 1 << 15, FUSE_WRITEBACK_CACHE = 1 << 16, FUSE_NO_OPEN_SUPPORT = 1 << 17,
    FUSE_PARALLEL_DIROPS = 1 << 18, FUSE_HANDLE_KILLPRIV = 1 << 19, FUSE_POSIX_ACL = 1 << 20,
    FUSE_ABORT_ERROR = 1 << 21, FUSE_MAX_PAGES = 1 << 22, FUSE_CACHE_SYMLINKS = 1 << 23,
    FUSE_NO_OPENDIR_SUPPORT = 1 << 24, FUSE_EXPLICIT_INVAL_DATA = 1 << 25, FUSE_MAP_ALIGNMENT = 1 << 26,
    FUSE_SUBMOUNTS = 1 << 27, FUSE_HANDLE_KILLPRIV_V2 = 1 << 28, FUSE_SETXATTR_EXT = 1 << 29,
    FUSE_INIT_EXT = 1 << 30, FUSE_INIT_RESERVED = 1 << 31, FUSE_SECURITY_CTX = 1 << 32,
    FUSE_HAS_INODE_DAX = 1 << 33, FUSE_CREATE_SUPP_GROUP = 1 << 34, FUSE_HAS_EXPIRE_ONLY = 1 << 35,
    FUSE_DIRECT_IO_ALLOW_MMAP = 1 << 36, FUSE_PASSTHROUGH = 1 << 37, FUSE_NO_EXPORT_SUPPORT = 1 << 38,
    FUSE_HAS_RESEND = 1 << 39, FUSE_ALLOW_IDMAP = 1 << 40, FUSE_OVER_IO_URING = 1 << 41,
    FUSE_REQUEST_TIMEOUT = 1 << 42, FUSE_HAS_IO_URING_BUFPOOL = 1 << 43
};
enum { FUSE_DIRECT_IO_RELAX = 1 << 36 };
enum {
    CUSE_UNRESTRICTED_IOCTL = 1 << 0, FUSE_RELEASE_FLUSH = 1 << 0, FUSE_RELEASE_FLOCK_UNLOCK = 1 << 1,
    FUSE_GETATTR_FH = 1 << 0, FUSE_LK_FLOCK = 1 << 0, FUSE_WRITE_CACHE = 1 << 0, FUSE_WRITE_LOCKOWNER = 1 << 1,
    FUSE_WRITE_KILL_SUIDGID = 1 << 2, FUSE_WRITE_KILL_PRIV = 1 << 2, FUSE_READ_LOCKOWNER = 1 << 1,
    FUSE_IOCTL_COMPAT = 1 << 0, FUSE_IOCTL_UNRESTRICTED = 1 << 1, FUSE_IOCTL_RETRY = 1 << 2,
    FUSE_IOCTL_32BIT = 1 << 3, FUSE_IOCTL_DIR = 1 << 4, FUSE_IOCTL_COMPAT_X32 = 1 << 5,
    FUSE_POLL_SCHEDULE_NOTIFY = 1 << 0, FUSE_FSYNC_FDATASYNC = 1 << 0, FUSE_ATTR_SUBMOUNT = 1 << 0,
    FUSE_ATTR_DAX = 1 << 1, FUSE_OPEN_KILL_SUIDGID = 1 << 0, FUSE_SETXATTR_ACL_KILL_SGID = 1 << 0,
    FUSE_EXPIRE_ONLY = 1 << 0, FUSE_SETUPMAPPING_FLAG_WRITE = 1 << 0, FUSE_SETUPMAPPING_FLAG_READ = 1 << 1,
    FUSE_URING_ENT_ZERO_COPY = 1 << 0, FUSE_URING_ZERO_COPY = 1 << 0
};
enum { FUSE_INVALID_UIDGID = 0xffffffff };
enum { FUSE_UNIQUE_RESEND = 1 << 63 };
enum fuse_ext_type { FUSE_MAX_NR_SECCTX = 31, FUSE_EXT_GROUPS = 32 };
enum fuse_opcode {
    FUSE_LOOKUP = 1, FUSE_FORGET = 2, FUSE_GETATTR = 3, FUSE_SETATTR = 4, FUSE_READLINK = 5, FUSE_SYMLINK = 6,
    FUSE_MKNOD = 8, FUSE_MKDIR = 9, FUSE_UNLINK = 10, FUSE_RMDIR = 11, FUSE_RENAME = 12, FUSE_LINK = 13,
    FUSE_OPEN = 14, FUSE_READ = 15, FUSE_WRITE = 16, FUSE_STATFS = 17, FUSE_RELEASE = 18, FUSE_FSYNC = 20,
    FUSE_SETXATTR = 21, FUSE_GETXATTR = 22, FUSE_LISTXATTR = 23, FUSE_REMOVEXATTR = 24, FUSE_FLUSH = 25,
    FUSE_INIT = 26, FUSE_OPENDIR = 27, FUSE_READDIR = 28, FUSE_RELEASEDIR = 29, FUSE_FSYNCDIR = 30,
    FUSE_GETLK = 31, FUSE_SETLK = 32, FUSE_SETLKW = 33, FUSE_ACCESS = 34, FUSE_CREATE = 35, FUSE_INTERRUPT = 36,
    FUSE_BMAP = 37, FUSE_DESTROY = 38, FUSE_IOCTL = 39, FUSE_POLL = 40, FUSE_NOTIFY_REPLY = 41,
    FUSE_BATCH_FORGET = 42, FUSE_FALLOCATE = 43, FUSE_READDIRPLUS = 44, FUSE_RENAME2 = 45, FUSE_LSEEK = 46,
    FUSE_COPY_FILE_RANGE = 47, FUSE_SETUPMAPPING = 48, FUSE_REMOVEMAPPING = 49, FUSE_SYNCFS = 50,
    FUSE_TMPFILE = 51, FUSE_STATX = 52, FUSE_COPY_FILE_RANGE_64 = 53,
    CUSE_INIT = 4096, CUSE_INIT_BSWAP_RESERVED = 1048576, FUSE_INIT_BSWAP_RESERVED = 436207616
};
enum fuse_notify_code {
    FUSE_NOTIFY_POLL = 1, FUSE_NOTIFY_INVAL_INODE = 2, FUSE_NOTIFY_INVAL_ENTRY = 3, FUSE_NOTIFY_STORE = 4,
    FUSE_NOTIFY_RETRIEVE = 5, FUSE_NOTIFY_DELETE = 6, FUSE_NOTIFY_RESEND = 7, FUSE_NOTIFY_INC_EPOCH = 8,
    FUSE_NOTIFY_PRUNE = 9
};
enum fuse_uring_cmd {
    FUSE_IO_URING_CMD_INVALID = 0, FUSE_IO_URING_CMD_REGISTER = 1, FUSE_IO_URING_CMD_COMMIT_AND_FETCH = 2,
    FUSE_IO_URING_CMD_ADD_QUEUE = 3, FUSE_IO_URING_CMD_ADD_BUFPOOL = 4
};
"""

_DECLARATIONS = STRUCTS + NUMBERS + "".join(GENERATION_TEXTS.values())

DIGEST = zlib.crc32(_DECLARATIONS.encode())
"""Identifies these declarations; the module generated from them carries it."""

TEXT = _DECLARATIONS + f"enum {{ FUSEWIRE_DIGEST = {DIGEST} }};\n"
"""Everything that cffi parses."""
