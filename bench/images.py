"""What the workloads work on: images made by the kernel's ext4, an archive, a repository; made once and kept."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.repository import git, make_history
from bench.texts import SEED, WORDS, source_text
from tests.mounting import kernel_mount

GIB = 1 << 30
TREE_FILES = 20_000
SMALL_TREE_FILES = 4000
DIRECTORY_FILES = 20_000
SMALL_DIRECTORY_FILES = 3000
LARGE_FILE_BYTES = GIB
DATA_BYTES = GIB // 4
BIG_NAMES, SMALL_NAMES, SMALL_DIRECTORIES = 100_000, 1000, 100
MILLION = 1_000_000
WITH_SBIN = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


def format_image(path: Path, size: int, *arguments: str) -> None:
    """A new ext4 with mke2fs's defaults, sparse."""
    with open(path, "wb") as file:
        file.truncate(size)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", *arguments, path], check=True, env=WITH_SBIN)


def write_tree(root: Path, files: int = TREE_FILES, folders: int = 1300) -> None:
    """Small files in directories below one another, sizes as in a source tree (median 2.5 KiB, some of 100 KiB)."""
    rng = random.Random(SEED)
    directories = [root]
    root.mkdir()
    for index in range(folders):
        parent = directories[min(int(rng.expovariate(1 / 60)), len(directories) - 1)]
        directories.append(parent / f"{rng.choice(WORDS)}-{index}")
        directories[-1].mkdir()
    for index in range(files):
        size = min(int(rng.lognormvariate(7.8, 1.3)), 100_000)
        name = f"{rng.choice(WORDS)}_{index}.{rng.choice(('c', 'h', 'py', 'txt'))}"
        (rng.choice(directories) / name).write_bytes(source_text(rng, size))


def write_directory(root: Path, files: int = DIRECTORY_FILES) -> None:
    """One directory of small files."""
    root.mkdir()
    for index in range(files):
        (root / directory_name(index)).write_bytes(b"%d\n" % index)


def directory_name(index: int) -> str:
    return f"document-{index * 7919 % 1_000_003:07}.json"


def write_large_file(path: Path, size: int = LARGE_FILE_BYTES) -> None:
    with open(path, "wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))


def make_main(path: Path) -> None:
    """``tree``, ``dir`` and ``large`` on one file system."""
    format_image(path, 3 * GIB)
    with kernel_mount(path, "rw,noatime") as mounted:
        write_tree(mounted.root / "tree")
        write_directory(mounted.root / "dir")
        write_large_file(mounted.root / "large")


def make_empty(path: Path) -> None:
    """A new file system of the size that all writing workloads have."""
    format_image(path, 4 * GIB)


def make_tree(path: Path) -> None:
    """``tree`` of 4,000 files, on an else empty file system."""
    make_empty(path)
    with kernel_mount(path, "rw,noatime") as mounted:
        write_tree(mounted.root / "tree", SMALL_TREE_FILES, 260)


def make_archive(path: Path) -> None:
    """An archive of the same tree."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime, entry.mode = 1_700_000_000, 0o755 if entry.isdir() else 0o644
        return entry

    with tempfile.TemporaryDirectory(prefix="fusewire-tree-") as folder, tarfile.open(path, "w") as archive:
        write_tree(Path(folder, "tree"), SMALL_TREE_FILES, 260)
        archive.add(Path(folder, "tree"), "tree", filter=plain)


def make_clone(path: Path) -> None:
    """``clone`` of the repository, its index newer than its files, so that ``git status`` need not read them."""
    make_empty(path)
    with kernel_mount(path, "rw,noatime") as mounted:
        git("clone", "-q", f"file://{cached('history.git', path.parent)}", mounted.root / "clone")
        index = mounted.root / "clone/.git/index"
        os.utime(index, (index.stat().st_atime, index.stat().st_mtime + 60))


def make_names(path: Path) -> None:
    """``dir`` with 3,000 names."""
    format_image(path, GIB)
    with kernel_mount(path, "rw,noatime") as mounted:
        write_directory(mounted.root / "dir", SMALL_DIRECTORY_FILES)


def make_huge(path: Path) -> None:
    """An empty file system of 1 TiB; its file is sparse."""
    format_image(path, 1 << 40, "-E", "lazy_itable_init=1,lazy_journal_init=1")


def make_data(path: Path) -> None:
    """``data`` of 256 MiB, on an else empty file system."""
    make_empty(path)
    with kernel_mount(path, "rw,noatime") as mounted:
        write_large_file(mounted.root / "data", DATA_BYTES)


def make_directories(path: Path) -> None:
    """``big`` of 100,000 empty files and 100 directories ``small-…`` of 1,000."""
    make_empty(path)
    with kernel_mount(path, "rw,noatime") as mounted:
        for name, count in [("big", BIG_NAMES)] + [(f"small-{i:02}", SMALL_NAMES) for i in range(SMALL_DIRECTORIES)]:
            os.mkdir(mounted.root / name)
            for index in range(count):
                os.close(os.open(f"{mounted.root}/{name}/{directory_name(index)}", os.O_CREAT | os.O_WRONLY))


def make_roomy(path: Path) -> None:
    """An empty file system with inodes for a million files."""
    format_image(path, 4 * GIB, "-N", str(MILLION + 20_000))


def make_million(path: Path) -> None:
    """1,000,000 empty files in 1,000 directories."""
    make_roomy(path)
    with kernel_mount(path, "rw,noatime") as mounted:
        write_million(mounted.root)


def write_million(root: Path) -> None:
    """1,000,000 empty files in 1,000 directories."""
    for outer in range(1000):
        directory = os.path.join(root, f"d{outer:03}")
        os.mkdir(directory)
        for inner in range(1000):
            os.close(os.open(f"{directory}/file-{inner:04}", os.O_CREAT | os.O_WRONLY))


MAKERS: dict[str, Callable[[Path], None]] = {
    "main": make_main,
    "names": make_names,
    "huge": make_huge,
    "million": make_million,
    "empty": make_empty,
    "roomy": make_roomy,
    "data": make_data,
    "directories": make_directories,
    "tree": make_tree,
    "tree.tar": make_archive,
    "history.git": make_history,
    "clone": make_clone,
}


def cached(name: str, cache: Path) -> Path:
    """The image, archive or repository called ``name``, made in ``cache`` unless it is there."""
    path = cache / f"bench-{name}{'' if '.' in name else '.img'}"
    if not path.exists():
        print(f"making {path.name} …", file=sys.stderr, flush=True)
        unfinished = path.with_suffix(f".{os.getpid()}.new")
        MAKERS[name](unfinished)
        os.sync()
        unfinished.rename(path)
    return path


@contextmanager
def fresh_copy(image: Path) -> Iterator[Path]:
    """A sparse copy of ``image`` beside it that a workload may write to."""
    copy = image.with_name(f"bench-scratch-{os.getpid()}.img")
    try:
        subprocess.run(["cp", "--sparse=always", image, copy], check=True)
        yield copy
    finally:
        copy.unlink(missing_ok=True)
