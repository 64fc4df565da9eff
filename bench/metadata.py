"""Names: files and directories made, renamed and removed, one by one, in one directory and in many.

Each sample works through three directories of 3,000 names (or the same number of names in 100 directories) after what
it needs was made and synced.  No sync is inside the time: kernel ext4 does these in memory, and so may the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from bench.workload import Sample, Workload, at_most, sync, timed
from tests.mounting import Mount

BATCHES = 3
NAMES = 3000
SPREAD = 100
SMALL = b"0123456789abcdef" * 64  # 1 KiB
MANY = 20_000


def in_one(root: str, names: int = NAMES, batches: int = BATCHES) -> list[str]:
    """The paths of the names of ``batches`` directories."""
    return [f"{root}/one-{batch}/document-{index:05}.json" for batch in range(batches) for index in range(names)]


def in_many(root: str) -> list[str]:
    """As many paths, each in another directory than the one before."""
    return [f"{root}/many-{index % SPREAD}/document-{index:05}.json" for index in range(NAMES * BATCHES)]


def in_one_of_20000(root: str) -> list[str]:
    """The paths of the names of one directory of 20,000."""
    return in_one(root, MANY, 1)


def make_parents(paths: Iterable[str]) -> None:
    """The directories of ``paths``."""
    for path in sorted({os.path.dirname(path) for path in paths}):
        os.mkdir(path)


def make_empty(paths: Iterable[str]) -> None:
    """An empty file at each path."""
    for path in paths:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def write_small(paths: Iterable[str]) -> None:
    """A file of 1 KiB at each path."""
    for path in paths:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, SMALL)
        os.close(fd)


def make_directories(paths: Iterable[str]) -> None:
    """An empty directory at each path."""
    for path in paths:
        os.mkdir(path)


def remove_files(paths: Iterable[str]) -> None:
    """Unlink each path."""
    for path in paths:
        os.unlink(path)


def remove_directories(paths: Iterable[str]) -> None:
    """Remove each empty directory."""
    for path in paths:
        os.rmdir(path)


Act = Callable[[Iterable[str]], None]


def nothing(paths: Iterable[str]) -> None:
    """Leave the directories empty."""


def names(prepare: Act, act: Act, where: Callable[[str], list[str]] = in_one) -> Callable[[Mount], Sample]:
    """The time of ``act`` per path, after ``prepare`` on the same paths [µs]."""

    def measure(mounted: Mount) -> Sample:
        paths = where(str(mounted.root))
        make_parents(paths)
        prepare(paths)
        sync(mounted)
        return timed(mounted, len(paths), lambda: act(paths)).each()

    return measure


def renames(new_path: Callable[[str], str], replace: bool = False) -> Callable[[Mount], Sample]:
    """The time per rename of a file to ``new_path`` of its path, where another file is if ``replace`` [µs]."""

    def measure(mounted: Mount) -> Sample:
        paths = in_one(str(mounted.root))
        pairs = [(path, new_path(path)) for path in paths]
        make_parents(path for pair in pairs for path in pair)
        make_empty(paths)
        if replace:
            make_empty(new for _, new in pairs)
        sync(mounted)

        def run() -> None:
            for old, new in pairs:
                os.rename(old, new)

        return timed(mounted, len(pairs), run).each()

    return measure


def other_name(path: str) -> str:
    """Another name in the same directory."""
    return path.removesuffix("json") + "text"


def other_directory(path: str) -> str:
    """The same name in another directory."""
    return path.replace("/one-", "/other-")


def row(name: str, meaning: str, measure: Callable[[Mount], Sample], bound: float | None = None) -> Workload:
    """A row of this module."""
    target = None if bound is None else at_most(bound)
    return Workload(name, meaning, "µs", measure, target, image="empty", writes=True, per="name")


WORKLOADS = (
    row("create", "create empty files, 3,000 a directory", names(nothing, make_empty), 7),
    row("create-spread", "create empty files, 100 directories in turn", names(nothing, make_empty, in_many)),
    row("small-write", "create and write 1 KiB, 3,000 a directory", names(nothing, write_small)),
    row("small-write-spread", "the same, 100 directories in turn", names(nothing, write_small, in_many)),
    row("unlink", "unlink empty files, 3,000 a directory", names(make_empty, remove_files), 6),
    row("mkdir", "make directories, 3,000 a directory", names(nothing, make_directories), 6),
    row("rmdir", "remove them", names(make_directories, remove_directories)),
    row("rename", "rename within the directory", renames(other_name), 6),
    row("rename-cross", "rename into another directory", renames(other_directory), 6),
    row("rename-replace", "rename onto another file", renames(other_name, replace=True), 6),
    row("create-20000", "create 20,000 empty files in one directory", names(nothing, make_empty, in_one_of_20000)),
    row("unlink-20000", "unlink them", names(make_empty, remove_files, in_one_of_20000)),
)
