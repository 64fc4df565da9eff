"""Two trees that went through the same operations: what must be equal, and by which rule the rest is compared.

R1  Inode numbers and generations are each file system's own choice; which names are links of one inode is compared.
R2  A time is compared as the number of the operation that stamped it, or, outside of the sequence, as it is.  With
    inodes of 128 bytes there are only seconds, so any two during the sequence are equal; and what comes after the last
    that such an inode can hold (2038) is as good as that, as FUSE cannot be told of an end of time.
R3  ``st_blocks`` may differ by the blocks of the trees that map them: where extents were split differently.
R4  SEEK_DATA: kernel ext4 writes zeroes into the unwritten neighbourhood of a small write instead of splitting the
    extent (mount option ``max_zeroout_kb``), so it may show data where there are only zeroes.  The contents are equal.
R5  FUSE writes whole pages back.  Where blocks are smaller, it fills the holes in a page that was written to, so data
    ranges are compared in pages, and ``st_blocks`` may differ by those.
R6  FUSE with the writeback cache keeps the times of regular files itself: it stamps ctime at every setxattr(2) and
    removexattr(2), ext4 only where that changes something; and it does not see that an ioctl has stamped it.  It
    never stamps a pipe that is written to.
R7  copy_file_range(2) of ext4 copies zeroes where the source has holes; fusewire leaves holes.  So files may use fewer
    blocks of ours once a sequence has copied.
R8  ext4 stamps the directory when a rename with RENAME_WHITEOUT fails late (it has made the whiteout, and takes it
    back); here what fails leaves no trace.
R9  A disk of ours is full where the kernel's is, to the block, as long as both have as many blocks free.  They may
    not (R3): a sequence ends where that decides.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.walk import Fields, differences, entries, statfs_fields

COARSE = 5  # CLOCK_REALTIME_COARSE: what files are stamped with
TIMES = ("atime", "mtime", "ctime", "btime")
SECOND = 10**9
LAST_SECOND = (2**31 - 1) * SECOND
PAGE = 4096

OWN = {
    "ino": "R1", "d_ino": "R1", "dots": "R1", "generation": "R1",
    "attributes": "fs/fuse takes only the basic fields and btime from a STATX reply, so stx_attributes never pass",
}
LIVE = {
    "map": "R4; a mounted file may have pages that are not written yet",
    "blocks": "R3 and R5",
}
WHITEOUT = 4
FIFO_DIGITS = 5             # of its mode in octal; that of a regular file has six
MANY_RUNS = 100             # as many as there may be in a file whose ranges are not shown
ROOT_EXTENTS = 4            # what needs no more than these has no tree
MAPPING_BLOCKS = 6          # index blocks by which two trees of one file may differ here
OWN_STATFS = {
    "type": "names the driver", "fsid": "ext4 gives its UUID; FUSE has no field for it",
    "bfree": "R3, compared by its own rule", "bavail": "R3, compared by its own rule",
}


class Clock:
    """When each operation began, on the clock that stamps files."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def tick(self) -> None:
        """Begin an operation: none before it was stamped with this time."""
        before = now = time.clock_gettime_ns(COARSE)
        while now == before:
            time.sleep(0)
            now = time.clock_gettime_ns(COARSE)
        self.starts.append(now)

    def name_of(self, stamp: str, whole_seconds: bool) -> str:
        """What a time of a file stands for (R2)."""
        if stamp == "-" or not self.starts:
            return stamp
        value = min(int(stamp), LAST_SECOND) if whole_seconds else int(stamp)
        margin = SECOND if whole_seconds else 0
        if self.starts[0] - margin <= value <= self.starts[-1] + 60 * SECOND:
            return "now" if whole_seconds else f"operation {bisect.bisect_right(self.starts, value) - 1}"
        return "before" if value > self.starts[0] - 3600 * SECOND and value < self.starts[0] else str(value)


def agree(operation: tuple[Any, ...], wanted: Any, got: Any) -> bool:
    """Whether two answers to one operation are the same, by R4 for data ranges."""
    if operation[0] == "by":
        return agree(operation[2], wanted, got)
    if operation[0] == "runs":
        return not _map_rule("", {"map": wanted}, {"map": got})
    return bool(wanted == got)


def tree(root: Path, clock: Clock, whole_seconds: bool) -> list[tuple[str, Fields]]:
    """The tree at ``root`` with its times named."""
    return [(path, fields | {name: clock.name_of(fields[name], whole_seconds) for name in TIMES if name in fields})
            for path, fields in entries(root)]


def tree_differences(kernel: list[tuple[str, Fields]], ours: list[tuple[str, Fields]], block_bytes: int,
                     operations: Sequence[tuple[Any, ...]], live: bool) -> list[str]:
    """One line per difference; ``live``: the mounts are still in use."""
    left, right = dict(kernel), dict(ours)
    copied = any(operation[0] == "copy_range" for operation in operations)
    for path in left.keys() & right.keys():
        _times_rule(left[path], right[path], operations)
    found = differences(left.items(), right.items(), OWN | LIVE)
    for path in sorted(left.keys() & right.keys()):
        found += _blocks_rule(path, left[path], right[path], block_bytes, copied)
        if not live:
            found += _map_rule(path, left[path], right[path])
    return found


def _times_rule(kernel: Fields, ours: Fields, operations: Sequence[tuple[Any, ...]]) -> None:
    """R6 and R8: make the times the same where they may differ."""
    mode = ours.get("mode", "")
    if mode.startswith("1") and len(mode) == FIFO_DIGITS:
        kernel["ctime"], kernel["mtime"] = ours["ctime"], ours["mtime"]
    elif mode.startswith("10") and (_stamped_by(ours["ctime"], operations) in ("setxattr", "setacl", "removexattr")
                                    or _stamped_by(kernel["ctime"], operations) == "chattr"):
        kernel["ctime"] = ours["ctime"]
    elif mode.startswith("4") and kernel["mtime"] != ours["mtime"] \
            and _stamped_by(kernel["mtime"], operations) == "whiteout":
        kernel["ctime"], kernel["mtime"] = ours["ctime"], ours["mtime"]


def _stamped_by(stamp: str, operations: Sequence[tuple[Any, ...]]) -> str:
    """The kind of the operation that a named time stands for, "" if it stands for none."""
    if not stamp.startswith("operation "):
        return ""
    operation = operations[int(stamp.removeprefix("operation "))]
    kind, *arguments = operation[2] if operation[0] == "by" else operation
    return "whiteout" if kind == "rename" and arguments[2] & WHITEOUT else str(kind)


def _blocks_rule(path: str, kernel: Fields, ours: Fields, block_bytes: int, copied: bool) -> list[str]:
    """R3, R5, R7."""
    if "blocks" not in kernel or "blocks" not in ours or "link" in kernel:
        return []
    apart = int(ours["blocks"]) - int(kernel["blocks"])
    if apart < 0 and not (copied and "data" in kernel):
        apart = -apart
    allowed = MAPPING_BLOCKS * block_bytes // 512 if int(kernel["size"]) > ROOT_EXTENTS * block_bytes else 0
    if "data" in kernel:
        edges = 2 * len(runs_of(kernel.get("map")) or [(0, 0)] * MANY_RUNS)
        allowed = (MAPPING_BLOCKS * block_bytes + edges * max(PAGE - block_bytes, 0)) // 512
    return [f"{path}: blocks: expected {kernel['blocks']}, found {ours['blocks']}"] if apart > allowed else []


def _map_rule(path: str, kernel: Fields, ours: Fields) -> list[str]:
    """R4: what we call data, the kernel calls data."""
    wanted, got = runs_of(kernel.get("map")), runs_of(ours.get("map"))
    if wanted is None or got is None:
        apart = (wanted is None) != (got is None) and "runs" not in f"{kernel.get('map')}{ours.get('map')}"
        return [f"{path}: map: expected {kernel.get('map')}, found {ours.get('map')}"] if apart else []
    pages = [(start & -PAGE, -(-end // PAGE) * PAGE) for start, end in wanted]
    lacking = [run for run in got if not _inside(run, pages)]
    return [f"{path}: map: expected {kernel['map']}, found {ours['map']}"] if lacking else []


def _inside(run: tuple[int, int], ranges: list[tuple[int, int]]) -> bool:
    """Whether a range lies in the union of sorted ones."""
    at = run[0]
    for start, end in ranges:
        if start <= at < end:
            at = end
    return at >= run[1]


def runs_of(text: str | None) -> list[tuple[int, int]] | None:
    """The ranges in a ``map`` field, None if it only has their number, or is no such field."""
    if text is None or text.strip("0123456789-,"):
        return None
    pairs = (piece.split("-") for piece in text.split(",") if piece)
    return [(int(start), int(end)) for start, end in pairs]


def statfs_differences(kernel: Path, ours: Path, slack_blocks: int) -> list[str]:
    """Differences of statfs(2); free blocks may differ by ``slack_blocks`` (R3)."""
    left, right = statfs_fields(kernel), statfs_fields(ours)
    found = differences([("statfs", left)], [("statfs", right)], OWN_STATFS)
    for name in ("bfree", "bavail"):
        if abs(int(left[name]) - int(right[name])) > slack_blocks:
            found.append(f"statfs: {name}: expected {left[name]}, found {right[name]}")
    return found


def used_blocks(shown: Iterable[tuple[str, Fields]]) -> int:
    """512-byte sectors that the files of a tree use, each inode once."""
    return sum(int(fields["blocks"]) for _, fields in shown if "blocks" in fields and "link" not in fields)
