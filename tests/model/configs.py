"""The kinds of file systems that the model is run on."""

from __future__ import annotations

from dataclasses import replace

from tests.images import MIB
from tests.model.generate import only
from tests.model.run import Config

NAMES = only({"create": 10, "burst": 6, "thin": 4, "mkdir": 10, "rmdir": 5, "mknod": 4, "symlink": 6, "link": 8,
              "unlink": 10, "rename": 20, "listdir": 6, "stat": 6, "open": 3, "tmpfile": 3, "link_slot": 3, "fstat": 3,
              "close": 3, "umask": 1, "by": 8})
DATA = only({"create": 2, "open": 12, "close": 4, "tmpfile": 1, "write": 6, "pwrite": 14, "pread": 8, "map_write": 8,
             "ftruncate": 6, "fallocate": 12, "copy_range": 5, "fsync": 5, "syncfs": 1, "write_file": 5,
             "write_direct": 6, "read_file": 8, "runs": 3, "truncate": 5, "unlink": 3, "fstat": 4})
ATTRIBUTES = only({"create": 8, "mkdir": 5, "symlink": 2, "unlink": 3, "chmod": 8, "chown": 8, "utimens": 5, "touch": 2,
                   "setxattr": 20, "removexattr": 8, "getxattr": 4, "listxattr": 4, "setacl": 12, "umask": 2, "by": 12,
                   "stat": 4, "link": 2, "rename": 2, "mknod": 2, "write_file": 3})

_FORMS = {
    "4k": ("-t ext4", {}),
    "2k": ("-t ext4", {"block_bytes": 2048}),
    "1k": ("-t ext4", {"block_bytes": 1024}),
    "orphan-file": ("-t ext4 -O orphan_file", {}),
    "no-journal": ("-t ext4 -O ^has_journal", {}),
    "no-csum": ("-t ext4 -O ^metadata_csum,^64bit", {"block_bytes": 1024}),
    "ext3": ("-t ext3", {"whole_seconds": True}),
    "ext3-1k": ("-t ext3", {"whole_seconds": True, "block_bytes": 1024}),
    "ext2": ("-t ext2 -I 128", {"whole_seconds": True}),
    "inode-128": ("-t ext4 -I 128", {"whole_seconds": True}),
}
_PROFILES: dict[str, dict[str, int]] = {"mixed": {}, "names": NAMES, "data": DATA, "attributes": ATTRIBUTES}

CONFIGS = {f"{form}-{profile}": Config(f"{form}-{profile}", text, weights=weights, size=64 * MIB, **more)
           for form, (text, more) in _FORMS.items() for profile, weights in _PROFILES.items()}

FILL = only({"create": 10, "burst": 6, "thin": 3, "mkdir": 6, "rmdir": 2, "symlink": 6, "link": 2, "unlink": 8,
             "rename": 4, "setxattr": 6, "setacl": 2, "fill_file": 16, "fill_room": 8, "truncate": 3, "stat": 2,
             "syncfs": 1, "removexattr": 1, "write_direct": 1, "tmpfile": 1, "close": 1})
_SMALL = {
    "full-4k": ("-t ext4 -J size=4", {}),
    "full-1k": ("-t ext4 -J size=1", {"block_bytes": 1024, "size": 8 * MIB}),
    "full-2k": ("-t ext4 -J size=4 -m 20", {"block_bytes": 2048}),
    "full-no-journal": ("-t ext4 -O ^has_journal", {}),
    "full-ext3": ("-t ext3 -J size=4", {"whole_seconds": True}),
    "full-ext2-1k": ("-t ext2 -I 128", {"whole_seconds": True, "block_bytes": 1024, "size": 8 * MIB}),
    "full-inodes": ("-t ext4 -J size=4 -N 100", {}),
}
FULL = {name: Config(name, text, weights=FILL, fills=True, **{"size": 16 * MIB, **more})
        for name, (text, more) in _SMALL.items()}
"""Disks small enough to be filled up."""

_MIXED_1K = CONFIGS["1k-mixed"]
SERVED = {
    "small-cache": replace(_MIXED_1K, name="small-cache", our_options=",cache_size=1"),     # blocks are missing often
    "no-loop": replace(_MIXED_1K, name="no-loop", our_options=",noloop"),
}
"""Other ways to serve."""

CONFIGS |= FULL | SERVED
