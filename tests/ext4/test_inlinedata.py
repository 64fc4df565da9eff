"""Inline files, directories and links, as the kernel and mke2fs make them, and sizes that no inode could hold."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire.ext4 import directory, inlinedata, iomap, namespace, xattrstore
from fusewire.ext4.errors import Check, Corrupt, Refused
from tests import populate
from tests.ext4.driver import Core, Editor, copied, image, new_path
from tests.mounting import kernel_mount

Shown = dict[str, tuple[list[bytes] | bytes, int]]


@pytest.fixture(scope="module", params=["-b 1024 -I 256", "-b 4096 -I 1024", "-b 1024 -I 256 -O ^metadata_csum"])
def written(request: pytest.FixtureRequest, mounts: None) -> Iterator[tuple[Core, Shown]]:
    """An image whose inline contents the kernel wrote, and what it shows: names or bytes, and the size."""
    path, shown = copied(image(f"-t ext4 -O inline_data {request.param}", 16384)), {}
    with kernel_mount(path, "rw") as mounted:
        populate.inline_data(mounted.root)
        for folder, folders, files in os.walk(mounted.root):
            for name in folders + files:
                full = os.path.join(folder, name)
                place = "/" + os.path.relpath(full, mounted.root)
                if os.path.isdir(full):
                    what: list[bytes] | bytes = sorted(os.fsencode(entry) for entry in os.listdir(full))
                else:
                    what = os.fsencode(os.readlink(full)) if os.path.islink(full) else Path(full).read_bytes()
                shown[place] = (what, os.lstat(full).st_size)
    with Core(path) as core:
        yield core, shown
    path.unlink()


def test_contents_are_the_kernels(written: tuple[Core, Shown]) -> None:
    core, shown = written
    inline = 0
    for place, (what, size) in shown.items():
        found = core.at(place)
        inline += found.is_inline
        if found.is_dir:
            assert core.names(place) == what
        else:
            content = core.run(namespace.readlink, found) if found.is_symlink else core.content(found)
            assert content == what
        assert found.size == size
    assert inline > 15


def test_every_name_of_an_inline_directory_is_found(written: tuple[Core, Shown]) -> None:
    core, shown = written
    for place, (what, _) in shown.items():
        found = core.at(place)
        if not found.is_dir or not found.is_inline:
            continue
        names = core.read_directory(found)
        assert [name.name for name in names[:2]] == [b".", b".."]
        assert names[0].inode == found.number and names[1].inode == core.at(os.path.dirname(place)).number
        assert isinstance(what, list)
        for name in what:
            assert core.run(directory.find, found, name)
        assert core.run(namespace.lookup, found, b"..") == names[1].inode
        with pytest.raises(Refused):
            core.run(directory.find, found, b"missing")


def test_reading_goes_on_after_every_cookie(written: tuple[Core, Shown]) -> None:
    core, shown = written
    for place in shown:
        found = core.at(place)
        if found.is_dir and found.is_inline:
            names = core.read_directory(found)
            assert [name.cookie for name in names] == sorted({name.cookie for name in names})
            for batch in (1, 2, 3):
                assert core.read_directory(found, batch=batch) == names


def test_inline_files_map_inline(written: tuple[Core, Shown]) -> None:
    core, shown = written
    for place in shown:
        found = core.at(place)
        if found.is_regular and found.is_inline:
            mapping = core.run(iomap.begin, found, 0, 1)
            assert mapping == iomap.Mapping(0, core.block_bytes, iomap.NULL_ADDR, iomap.INLINE)
            beyond = core.run(iomap.begin, found, 3 * core.block_bytes + 1, 1)
            assert beyond == iomap.Mapping(3 * core.block_bytes, core.block_bytes, iomap.NULL_ADDR, iomap.HOLE)


# ---- sizes that are wrong --------------------------------------------------------------------------------------

def inline_editor() -> Editor:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "file").write_bytes(b"f" * 100)
    (root / "dir").mkdir()
    os.symlink("l" * 80, root / "link")
    return Editor(image("-t ext4 -b 1024 -I 256 -O inline_data,^has_journal,^resize_inode", 2048, root))


def test_a_file_larger_than_its_inode_ends_in_zeroes() -> None:
    editor = inline_editor()
    editor.put_inode(editor.number("/file"), size_lo=5000)
    core = Core(editor.data)
    found = core.at("/file")
    assert core.run(inlinedata.read, found) == b"f" * 100
    assert core.content(found) == b"f" * 100 + bytes(4900)


def test_a_file_shorter_than_what_is_stored() -> None:
    for size in (0, 1, 59, 60, 61, 99):
        editor = inline_editor()
        editor.put_inode(editor.number("/file"), size_lo=size)
        assert Core(editor.data).content(Core(editor.data).at("/file")) == b"f" * size


@pytest.mark.parametrize("size", [60 + 256 + 1, 1024, 1 << 20])
def test_a_directory_larger_than_its_inode(size: int) -> None:
    editor = inline_editor()
    number = editor.number("/dir")
    assert editor.core.inode(number).is_inline
    editor.put_inode(number, size_lo=size)
    core = Core(editor.data)
    for operation in (lambda fs: directory.find(fs, core.inode(number), b"x"),
                      lambda fs: list(directory.read(fs, core.inode(number), 0))):
        with pytest.raises(Corrupt) as caught:
            core.run(operation)
        assert caught.value.check is Check.INLINE_DATA
        assert caught.value.where == {"inode": number, "size": size}


def test_a_link_longer_than_what_is_stored() -> None:
    editor = inline_editor()
    number = editor.number("/link")
    editor.put_inode(number, size_lo=200)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(namespace.readlink, core.inode(number))
    assert caught.value.check is Check.SYMLINK_SIZE and caught.value.where["size"] == 200


def test_entries_in_an_inline_directory_are_checked() -> None:
    editor = inline_editor()
    number = editor.number("/dir")
    with editor.inode(number) as raw:
        raw[0x28 + 4:0x28 + 60] = b"\x0c\0\0\0\x38\0\1\1/".ljust(56, b"\0")
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.read_directory(core.inode(number))
    assert caught.value.check is Check.DIRENT_NAME
    assert caught.value.where == {"offset": 4, "name": b"/", "inode": number}


def test_an_inode_without_the_attribute_has_its_block_array_only() -> None:
    editor = inline_editor()
    number = editor.number("/file")
    with editor.inode(number) as raw:
        raw[160:] = bytes(96)
    core = Core(editor.data)
    assert core.run(xattrstore.inline_rest, core.inode(number)) == b""
    assert core.content(core.inode(number)) == b"f" * 60 + bytes(40)
