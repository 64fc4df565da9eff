"""The file systems that the workloads run on: made by the kernel's ext4 once, kept in a cache folder."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.mounting import kernel_mount

SEED = 20_240_229
GIB = 1 << 30
TREE_FILES = 20_000
DIRECTORY_FILES = 20_000
LARGE_FILE_BYTES = GIB
MILLION = 1_000_000

WORDS = (
    *("alpha", "beta", "config", "data", "engine", "filter", "graph", "handle", "index"),
    *("journal", "kernel", "linker", "module", "network", "object", "parser"),
)


def format_image(path: Path, size: int, *arguments: str) -> None:
    """A new ext4 with mke2fs's defaults, sparse."""
    with open(path, "wb") as file:
        file.truncate(size)
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", *arguments, path], check=True, env=environment)


def source_text(rng: random.Random, size: int) -> bytes:
    """``size`` bytes that look like program text."""
    words = rng.choices(WORDS, k=size // 5 + 8)
    return (" ".join(words)).encode().replace(b"parser ", b"parser\n")[:size]


def write_tree(root: Path) -> None:
    """20,000 small files in about 1,300 directories, sizes as in a source tree (median 2.5 KiB, some of 100 KiB)."""
    rng = random.Random(SEED)
    directories = [root]
    root.mkdir()
    for index in range(1300):
        parent = directories[min(int(rng.expovariate(1 / 60)), len(directories) - 1)]
        directories.append(parent / f"{rng.choice(WORDS)}-{index}")
        directories[-1].mkdir()
    for index in range(TREE_FILES):
        size = min(int(rng.lognormvariate(7.8, 1.3)), 100_000)
        name = f"{rng.choice(WORDS)}_{index}.{rng.choice(('c', 'h', 'py', 'txt'))}"
        (rng.choice(directories) / name).write_bytes(source_text(rng, size))


def write_directory(root: Path) -> None:
    """One directory of 20,000 small files."""
    root.mkdir()
    for index in range(DIRECTORY_FILES):
        (root / directory_name(index)).write_bytes(b"%d\n" % index)


def directory_name(index: int) -> str:
    return f"document-{index * 7919 % 1_000_003:07}.json"


def write_large_file(path: Path) -> None:
    with open(path, "wb") as file:
        for _ in range(LARGE_FILE_BYTES >> 20):
            file.write(os.urandom(1 << 20))


def make_main(path: Path) -> None:
    """``tree``, ``dir`` and ``large`` on one file system."""
    format_image(path, 3 * GIB)
    with kernel_mount(path, "rw,noatime") as mounted:
        write_tree(mounted.root / "tree")
        write_directory(mounted.root / "dir")
        write_large_file(mounted.root / "large")


def make_huge(path: Path) -> None:
    """An empty file system of 1 TiB; its file is sparse."""
    format_image(path, 1 << 40, "-E", "lazy_itable_init=1,lazy_journal_init=1")


def make_million(path: Path) -> None:
    """1,000,000 empty files in 1,000 directories."""
    format_image(path, 4 * GIB, "-N", str(MILLION + 20_000))
    with kernel_mount(path, "rw,noatime") as mounted:
        for outer in range(1000):
            directory = os.path.join(mounted.root, f"d{outer:03}")
            os.mkdir(directory)
            for inner in range(1000):
                os.close(os.open(f"{directory}/file-{inner:04}", os.O_CREAT | os.O_WRONLY))


MAKERS: dict[str, Callable[[Path], None]] = {"main": make_main, "huge": make_huge, "million": make_million}


def cached(name: str, cache: Path) -> Path:
    """The image called ``name``, made in ``cache`` unless it is there."""
    path = cache / f"bench-{name}.img"
    if not path.exists():
        print(f"making the image {name} …", flush=True)
        unfinished = path.with_suffix(".new")
        MAKERS[name](unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
    return path
