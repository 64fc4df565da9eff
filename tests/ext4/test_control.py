"""Inode flags and struct fsxattr as the kernel's ioctls give them, for every flag on files and directories."""

import os
from functools import cache
from pathlib import Path

import pytest

from fusewire.ext4 import control
from fusewire.ext4.inode import FLAG_EXTENTS
from tests import populate
from tests.ext4.driver import Core, Editor, copied, image, new_path, stored
from tests.mounting import kernel_mount
from tests.walk import ioctl_fields

# Flags that a kernel without the feature, or without the disk contents behind them, does not let an inode have.
IMPOSSIBLE = {
    0x1000: "a file with an index",
    0x10000000: "inline data without the feature",
    0x800: "encryption without the feature",
    0x40000000: "casefolding without the feature",
    0x200000: "value inodes are not opened by name",
    0x100000: "verity without the feature",
}
FLAGS = [1 << bit for bit in range(32) if 1 << bit not in IMPOSSIBLE and 1 << bit != FLAG_EXTENTS]


@cache
def tree() -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "file").write_bytes(b"x" * 100)
    (root / "dir").mkdir()
    return root


def compare(path: Path, names: list[str]) -> None:
    with kernel_mount(path, "ro,noatime") as mounted, Core(path) as core:
        for name in names:
            fd = os.open(mounted.root / name.lstrip("/"), os.O_RDONLY)
            try:
                shown = ioctl_fields(fd)
            finally:
                os.close(fd)
            found = core.at(name)
            assert shown["flags"] == f"{control.getflags(found):x}", (name, f"{found.flags:x}")
            words = ",".join(f"{word:x}" for word in control.fsxattr(found))
            assert shown["fsxattr"] == words, (name, f"{found.flags:x}")
            assert shown["generation"] == f"{found.generation:x}"


def test_what_chattr_can_set(mounts: None) -> None:
    path = copied(image("-t ext4 -b 1024", 8192, tree()))
    with kernel_mount(path, "rw") as mounted:
        populate.inode_flags(mounted.root)
    with Core(path) as core:
        names = [os.fsdecode(name) for name, found in core.tree() if found.is_regular or found.is_dir]
    compare(path, names)


@pytest.mark.parametrize("name", ["/file", "/dir"])
def test_every_flag_alone(mounts: None, name: str) -> None:
    editor = Editor(image("-t ext4 -b 1024 -O ^has_journal,^resize_inode", 2048, tree()))
    for flag in FLAGS:
        editor.put_inode(editor.number(name), flags=FLAG_EXTENTS | flag, generation=flag & 0x7FFFFFFF)
        path = stored(editor.data)
        compare(path, [name])
        path.unlink()


def test_project_ids(mounts: None) -> None:
    editor = Editor(image("-t ext4 -b 1024 -I 256 -O ^has_journal,^resize_inode,project,quota", 4096, tree()))
    for name, project in (("/file", 5), ("/dir", 0xFFFFFFFE)):
        editor.put_inode(editor.number(name), projid=project, flags=FLAG_EXTENTS | 0x20000000)
    core = Core(editor.data)
    assert control.fsxattr(core.at("/file")) == (0, 0, 0, 5, 0)
    assert control.fsxattr(core.at("/dir")) == (0x200, 0, 0, 0xFFFFFFFE, 0)
    assert control.getflags(core.at("/file")) == FLAG_EXTENTS
    assert control.getflags(core.at("/dir")) == FLAG_EXTENTS | 0x20000000
