"""What fuse4fs took, to compare with: it is not in Debian 12, so its figures are constants.

Measured once, on its ordinary path (no iomap), on a quiet machine with two processors and Linux 6.18, with small
workloads of the same kinds as the rows here: time relative to kernel ext4 in the same run, also for rates.
"""

from __future__ import annotations

FUSE4FS = {
    "seq-read-cold": 1.7,
    "mmap-read-cold": 2.1,
    "random-read": 1.1,
    "direct-4k": 3.4,
    "find-cold": 1.9,
    "find-warm": 2.6,
    "grep-cold": 1.3,
    "grep-warm": 2.6,
    "list-stat-cold": 1.9,
    "random-stat-cold": 30.0,
    "small-stat-cold": 11.0,
    "small-absent-cold": 21.0,
    "create": 6.8,
    "create-spread": 7.7,
    "small-write": 8.3,
    "small-write-spread": 9.1,
    "unlink": 9.7,
    "mkdir": 5.2,
    "rmdir": 5.1,
    "rename": 15.0,
    "rename-cross": 10.0,
    "rename-replace": 15.0,
    "create-20000": 70.0,
    "unlink-20000": 82.0,
    "seq-write": 4.1,
    "random-write": 17.0,
    "direct-4k-write": 5.6,
    "append-fsync": 1.1,  # without a journal, and nothing ordered
    "truncate-shrink": 24.0,
    "punch": 12.0,
    "untar": 7.3,
    "cp-a": 3.7,
    "rm-rf-cold": 4.0,
    "git-clone": 1.5,
    "git-status-cold": 1.6,
    "git-checkout": 0.9,
    "sqlite-wal": 2.0,
    "sqlite-delete": 2.7,
    "mount-rw": 1.9,
}
