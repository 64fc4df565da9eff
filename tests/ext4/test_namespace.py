"""Looking names up and reading links: POSIX answers, links of every length, and entries that lead back."""

import errno
import os
import struct
from functools import cache
from pathlib import Path

import pytest

from fusewire.ext4 import namespace
from fusewire.ext4.errors import Check, Corrupt, Refused, errno_of
from fusewire.ext4.inode import FLAG_EXTENTS
from tests import populate
from tests.ext4.driver import Core, Editor, copied, image, new_path
from tests.mounting import kernel_mount

LENGTHS = (1, 58, 59, 60, 61, 255, 1000)


@cache
def tree() -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "dir" / "inner").mkdir(parents=True)
    (root / "dir" / "file").write_bytes(b"x")
    for length in LENGTHS:
        os.symlink("t" * length, root / f"to-{length}")
    return root


@cache
def small(features: str = "") -> Path:
    return image(f"-t ext4 -b 1024 -O ^has_journal,^resize_inode {features}", 2048, tree())


def refused(core: Core, path: str, name: bytes) -> int:
    with pytest.raises(Refused) as caught:
        core.run(namespace.lookup, core.at(path), name)
    return caught.value.errno


# ---- looking up ------------------------------------------------------------------------------------------------

def test_names_lead_where_they_should() -> None:
    with Core(small()) as core:
        root, parent = core.root(), core.at("/dir")
        assert core.run(namespace.lookup, parent, b".") == parent.number
        assert core.run(namespace.lookup, parent, b"..") == root.number
        assert core.run(namespace.lookup, root, b"..") == root.number
        assert core.run(namespace.lookup, core.at("/dir/inner"), b"..") == parent.number
        assert core.run(namespace.lookup_inode, parent, b"file").is_regular


def test_the_posix_answers() -> None:
    with Core(small()) as core:
        assert refused(core, "/dir", b"missing") == errno.ENOENT
        assert refused(core, "/dir", b"File") == errno.ENOENT
        assert refused(core, "/dir", b"file ") == errno.ENOENT
        assert refused(core, "/dir/file", b"x") == errno.ENOTDIR
        assert refused(core, "/to-1", b"x") == errno.ENOTDIR
        assert refused(core, "/dir", b"n" * 256) == errno.ENAMETOOLONG
        assert refused(core, "/dir", b"n" * 255) == errno.ENOENT


@pytest.mark.parametrize("path", ["/dir", "/dir/inner"])
@pytest.mark.parametrize("leads", ["itself", "the root"])
def test_a_name_that_leads_back(path: str, leads: str) -> None:
    """A directory inside itself would make every walk endless."""
    editor = Editor(small())
    number = editor.number(path)
    target = number if leads == "itself" else 2
    entry = struct.pack("<IHBB", target, 12, 1, 2) + b"x\0\0\0"
    with editor.dir_block(number) as raw:
        raw[:len(entry)] = entry
        struct.pack_into("<IH", raw, 12, 0, 1024 - 12 - 12)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(namespace.lookup, core.inode(number), b"x")
    assert caught.value.check is Check.DIRENT_INODE
    assert caught.value.where == {"inode": number, "name": b"x", "inode_named": target}
    assert errno_of(caught.value) == errno.EUCLEAN


def test_a_name_of_an_inode_that_is_broken() -> None:
    editor = Editor(small())
    number = editor.number("/dir/file")
    editor.put_inode(number, links_count=0)
    core = Core(editor.data)
    parent = core.at("/dir")
    assert core.run(namespace.lookup, parent, b"file") == number
    with pytest.raises(Corrupt) as caught:
        core.run(namespace.lookup_inode, parent, b"file")
    assert caught.value.check is Check.INODE_FREE


# ---- links -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("features", ["", "-O ^extent,^64bit", "-O inline_data", "-O ea_inode", "-O bigalloc -C 4096"])
def test_links_of_every_length(features: str) -> None:
    with Core(small(features)) as core:
        for length in LENGTHS:
            assert core.run(namespace.readlink, core.at(f"/to-{length}")) == b"t" * length


@pytest.mark.parametrize("arguments", [
    "-t ext4 -b 4096", "-t ext3 -b 4096", "-t ext2 -b 1024", "-t ext4 -O ea_inode -b 4096",
    "-t ext4 -O ea_inode -b 1024", "-t ext4 -O bigalloc -C 16384", "-t ext4 -b 1024 -I 128"])
def test_links_with_attributes_are_the_kernels(mounts: None, arguments: str) -> None:
    """An attribute block, or a value in an inode of its own, counts as blocks of a link that needs none itself."""
    path = copied(image(arguments, 65536))
    with kernel_mount(path, "rw") as mounted:
        populate.symlinks(mounted.root)
        links = [entry.name for entry in os.scandir(mounted.root / "links")]
        sizes = {"none": 0, "small": 20, "block": 600, "inode": 3000 if "ea_inode" in arguments else 600}
        for kind, size in sizes.items():
            for length in (10, 59, 60, 500):
                name = f"{kind}-{length}"
                os.symlink("x" * length, mounted.root / "links" / name)
                links.append(name)
                if size:
                    os.setxattr(mounted.root / "links" / name, "trusted.t", b"v" * size, follow_symlinks=False)
        targets = {name: os.fsencode(os.readlink(mounted.root / "links" / name)) for name in links}
    with Core(path) as core:
        for name, target in targets.items():
            assert core.run(namespace.readlink, core.at(os.path.join("/links", name))) == target, name


def test_only_links_have_targets() -> None:
    with Core(small()) as core:
        for path in ("/dir", "/dir/file"):
            with pytest.raises(Refused) as caught:
                core.run(namespace.readlink, core.at(path))
            assert caught.value.errno == errno.EINVAL


def corrupt_link(path: str, features: str = "", /, **fields: int | bytes) -> Corrupt:
    editor = Editor(small(features))
    number = editor.number(path)
    editor.put_inode(number, **fields)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(namespace.readlink, core.at(path))
    assert caught.value.where["inode"] == number
    return caught.value


@pytest.mark.parametrize(("path", "features", "fields"), [
    ("/to-1", "", {"size_lo": 0}), ("/to-1", "", {"size_lo": 60}), ("/to-1", "", {"size_lo": 4000}),
    ("/to-59", "", {"block": b"nul\0inside", "size_lo": 8}), ("/to-60", "", {"size_lo": 0}),
    ("/to-60", "", {"size_lo": 1025}), ("/to-1000", "", {"size_lo": 0xFFFFFFFF}),
    ("/to-1000", "", {"size_lo": 1024}), ("/to-60", "", {"block": b"\x0a\xf3\0\0\4\0\0\0"}),
    ("/to-60", "-O ea_inode", {"size_lo": 0}), ("/to-1", "-O ea_inode", {"size_lo": 0}),
    ("/to-60", "-O inline_data", {"size_lo": 0}),
], ids=["empty", "60 bytes in place", "4000 in place", "NUL", "empty block", "more than a block", "huge",
        "NUL in the block", "a hole", "empty with ea_inode", "fast and empty with ea_inode", "inline and empty"])
def test_a_link_of_impossible_length(path: str, features: str, fields: dict[str, int | bytes]) -> None:
    error = corrupt_link(path, features, **fields)
    assert error.check is Check.SYMLINK_SIZE


def test_a_target_longer_than_any_path() -> None:
    """Blocks of 16 KiB would have room for it."""
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    os.symlink("t" * 4095, root / "link")
    editor = Editor(image("-t ext4 -b 16384 -O ^has_journal,^resize_inode", 16384, root))
    number = editor.number("/link")
    assert editor.core.run(namespace.readlink, editor.core.inode(number)) == b"t" * 4095
    with editor.block(editor.device_block(number, 0)) as raw:
        raw[:4096] = b"t" * 4096
    editor.put_inode(number, size_lo=4096)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(namespace.readlink, core.inode(number))
    assert caught.value.check is Check.SYMLINK_SIZE


def test_an_encrypted_link_that_is_too_short() -> None:
    error = corrupt_encrypted(struct.pack("<H", 8) + bytes(8))
    assert error.check is Check.SYMLINK_SIZE


def corrupt_encrypted(raw: bytes) -> Corrupt:
    editor = Editor(small("-O encrypt"))
    number = editor.number("/to-1")
    editor.put_inode(number, block=raw, size_lo=len(raw), flags=0x800)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(namespace.readlink, core.inode(number))
    return caught.value


def test_a_link_with_extents_has_no_target_in_place() -> None:
    assert corrupt_link("/to-1", "", flags=FLAG_EXTENTS).check is Check.EXTENT_MAGIC
