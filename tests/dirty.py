"""Images that the kernel left dirty, how they are recovered by it and by us, and what is compared then."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusewire.batchwriter import BatchWriter
from fusewire.ext4 import mountstate
from fusewire.options import parse_options
from fusewire.source import Source, open_file_system
from tests.journals import EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH, opened
from tests.mounting import fusewire_mount, kernel_mount, mount_point, run
from tests.walk import differences, entries

Tree = dict[str, dict[str, str]]
UNCOMPARED = ("atime", "attributes")    # walks move the former, FUSE cannot tell the latter
UNSETTLED = ("blocks", "map")           # not final before data are written back


def tree_of(root: Path, *uncompared: str) -> Tree:
    """The tree without what need not be the same; the times of directories only where they were journaled."""
    shown = {}
    for name, fields in entries(root):
        times = {"mtime", "ctime"} if fields.get("mode", "").startswith("4") else set()
        left_out = {*UNCOMPARED, *uncompared, *times}
        shown[name] = {key: value for key, value in fields.items() if key not in left_out}
    return shown


def write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(root: Path) -> None:
    """Commit what is running: by an fsync, which is a fast commit where that is possible."""
    write(root / "marker", b"m")


class Image:
    """An image that the kernel mounts, changes and leaves dirty."""

    def __init__(self, path: Path, mkfs: str, options: str = "rw,commit=300", mib: int = 48) -> None:
        self.path, self.options, self.open_files = path, options, list[int]()
        path.touch()
        os.truncate(path, mib << 20)
        run("mke2fs", "-q", "-F", "-t", "ext4", *mkfs.split(), path)

    def leave(self, *steps: Callable[[Path], object], last: Callable[[Path], object] = lambda _root: None) -> Tree:
        """Run the steps, note the tree, run ``last``, which need not survive, and shut down; the tree."""
        with mount_point() as target:
            run("mount", "-t", "ext4", "-o", f"loop,{self.options}", self.path, target)
            try:
                for step in steps:
                    step(target)
                tree = tree_of(target, *UNSETTLED)
                last(target)
                root = os.open(target, os.O_RDONLY)
                fcntl.ioctl(root, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
                os.close(root)
            finally:
                for number in self.open_files:
                    os.close(number)
                self.open_files.clear()
                run("umount", target)
        return tree

    def copy(self, name: str) -> Path:
        return Path(shutil.copyfile(self.path, self.path.with_name(f"{self.path.name}.{name}")))


def assert_clean(path: Path) -> None:
    done = run("e2fsck", "-fn", path, check=False)
    assert done.returncode == 0, done.stdout
    features = run("dumpe2fs", "-h", path).stdout
    assert "needs_recovery" not in features and "orphan_present" not in features
    assert "Filesystem state:         clean" in features


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recovered(image: Image, *options: str) -> tuple[Path, Tree]:
    """A copy that a writable mount of ours recovered, and its tree.

    A read-only mount shows the same tree and writes nothing.
    """
    ours, shown = image.copy("ours"), image.copy("shown")
    before = sha(shown)
    with fusewire_mount(shown, "ro,noatime") as mounted:
        in_memory = tree_of(mounted.root)
    assert sha(shown) == before
    shown.unlink()
    with fusewire_mount(ours, ",".join(("rw,noatime", *options))):
        pass
    assert_clean(ours)
    with kernel_mount(ours, "ro,noload,noatime") as mounted:
        tree = tree_of(mounted.root)
    assert_same(in_memory, tree)
    return ours, tree


def recovered_by_kernel(image: Image) -> Tree:
    path = image.copy("kernel")
    with kernel_mount(path, "rw,noatime"):
        pass
    done = run("e2fsck", "-fn", path, check=False)
    assert done.returncode == 0, done.stdout
    with kernel_mount(path, "ro,noatime") as mounted:
        return tree_of(mounted.root)


def assert_same(left: Tree, right: Tree) -> None:
    found = differences(list(left.items()), list(right.items()), {})
    assert not found, "\n".join(found[:30])


def settled(tree: Tree) -> Tree:
    """What of a tree a mount can tell before it has written everything back."""
    return {name: {key: value for key, value in fields.items() if key not in UNSETTLED}
            for name, fields in tree.items()}


def fast_commits(path: Path) -> int:
    with opened(path) as disk:
        found = disk.recover().fast_commits
        return 0 if found is None else found.commits


# ---- workloads ---------------------------------------------------------------------------------------------

FAST = "-O fast_commit,orphan_file"


def first(root: Path) -> None:
    """The full commit that must come before any fast one."""
    for name in ("old", "victim", "cut", "holey", "moved", "gone"):
        write(root / name, name.encode() * 2000)
    (root / "folder").mkdir()
    (root / "empty").mkdir()
    for number in range(12):
        write(root / "folder" / f"f{number}", b"x" * number * 300)
    os.sync()


def files(root: Path) -> None:
    """Everything that one can do to files and that the kernel logs as fast commits."""
    write(root / "new", b"n" * 5000)
    os.link(root / "old", root / "folder" / "linked")
    os.unlink(root / "gone")
    os.rename(root / "moved", root / "folder" / "renamed")
    os.rename(root / "folder" / "f3", root / "victim")
    sync(root)
    os.truncate(root / "cut", 100)
    os.chmod(root / "old", 0o600)
    sync(root)
    subprocess.run(["fallocate", "-p", "-o", "1024", "-l", "5000", root / "holey"], check=True)
    subprocess.run(["fallocate", "-l", "90000", root / "new"], check=True)
    for number in range(5, 9):
        os.unlink(root / "folder" / f"f{number}")
    for number in range(5):
        write(root / "folder" / f"again{number}", b"y" * number * 700)
    write(root / "sparse", b"")
    with open(root / "sparse", "r+b") as file:
        for number in range(30):
            file.seek(number * 16384)
            file.write(b"s" * 900)
        os.fsync(file.fileno())
    os.truncate(root / "sparse", 16384 * 20 + 50)
    sync(root)


def directories(root: Path) -> None:
    (root / "made").mkdir()
    write(root / "made" / "inside", b"i" * 3000)
    (root / "made" / "sub").mkdir()
    (root / "made" / "sub" / "subsub").mkdir()
    (root / "empty").rmdir()
    (root / "made" / "passing").mkdir()
    (root / "made" / "passing").rmdir()
    sync(root)
    for number in range(70):    # more than one block of names
        (root / "made" / f"{number:03d}-{'n' * 40}").touch()
    sync(root)
    (root / "made" / "sub" / "subsub").rmdir()
    sync(root)


# ---- our recovery without a mount --------------------------------------------------------------------------

def open_for_writing(device: Any) -> list[str]:
    """All that a writable mount does before it is mounted, and in the end; what it says."""
    source = Source("image", "image", None, device, False)  # type: ignore[arg-type]
    opened = open_file_system(source, parse_options("rw"))
    writer = BatchWriter(device, opened.fs.geometry, opened.log)
    writer.finish(mountstate.put_away(opened.fs, 1_700_000_000))
    return opened.notes
