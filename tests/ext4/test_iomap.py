"""Byte ranges of files: mappings against FIEMAP of the kernel, seeking against its lseek, and the ends of both."""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fusewire.ext4 import iomap
from fusewire.ext4.errors import Refused
from fusewire.ext4.inode import FLAG_ENCRYPT, FLAG_EXTENTS, Inode
from tests import populate
from tests.ext4.driver import Core, Editor, copied, image, new_path
from tests.mounting import kernel_mount

FS_IOC_FIEMAP = 0xC020660B
FIEMAP_EXTENT_UNWRITTEN = 0x800
FIEMAP_MOST = 500


def fiemap(path: bytes) -> dict[int, tuple[int, bool]]:
    """File block (of 1 KiB) → (device block, whether unwritten), as the kernel tells."""
    request = struct.pack("<QQIIII", 0, (1 << 64) - 1, 0, 0, FIEMAP_MOST, 0) + bytes(56 * FIEMAP_MOST)
    fd = os.open(path, os.O_RDONLY)
    try:
        answer = bytearray(request)
        fcntl.ioctl(fd, FS_IOC_FIEMAP, answer)
    finally:
        os.close(fd)
    count = struct.unpack_from("<I", answer, 20)[0]
    blocks: dict[int, tuple[int, bool]] = {}
    for index in range(count):
        logical, physical, length, flags = struct.unpack_from("<QQQ16xI", answer, 32 + 56 * index)
        for at in range(0, length, 1024):
            blocks[(logical + at) // 1024] = ((physical + at) // 1024, bool(flags & FIEMAP_EXTENT_UNWRITTEN))
    return blocks


class Written:
    """An image that the kernel wrote, its files, and what the kernel says about each: FIEMAP and lseek."""

    def __init__(self, arguments: str) -> None:
        path = copied(image(arguments, 65536))
        with kernel_mount(path, "rw") as mounted:
            populate.holes(mounted.root)
            populate.plain_files(mounted.root)
            if "ext4" in arguments:
                populate.preallocated(mounted.root)
            populate.fragmented(200)(mounted.root)
        self.core = Core(path)
        self.files = {name: found for name, found in self.core.tree() if found.is_regular and found.size}
        self.blocks: dict[bytes, dict[int, tuple[int, bool]]] = {}
        self.seeks: dict[bytes, dict[tuple[int, int], int | None]] = {}
        with kernel_mount(path, "ro") as mounted:
            for name, found in self.files.items():
                full = os.fsencode(mounted.root) + name
                self.blocks[name] = fiemap(full)
                self.seeks[name] = seeks(full, self.edges(found))

    def edges(self, found: Inode) -> list[int]:
        """Offsets at, before and after the ends of mappings."""
        ends = {0, found.size, *(mapping.offset for mapping in self.core.mappings(found))}
        near = {end + step for end in sorted(ends)[:60] for step in (-1, 0, 1)}
        return sorted(offset for offset in near if offset >= 0)


def seeks(path: bytes, offsets: list[int]) -> dict[tuple[int, int], int | None]:
    """Where the kernel's SEEK_DATA and SEEK_HOLE lead from each offset, None for ENXIO."""
    fd, found = os.open(path, os.O_RDONLY), {}
    for offset in offsets:
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            try:
                found[offset, whence] = os.lseek(fd, offset, whence)
            except OSError as error:
                assert error.errno == errno.ENXIO
                found[offset, whence] = None
    os.close(fd)
    return found


@pytest.fixture(scope="module", params=["-t ext4 -b 1024", "-t ext4 -b 4096", "-t ext3 -b 1024",
                                        "-t ext4 -b 1024 -O bigalloc -C 8192", "-t ext4 -b 1024 -O inline_data"])
def written(request: pytest.FixtureRequest, mounts: None) -> Iterator[Written]:
    made = Written(request.param)
    yield made
    made.core.close()


def test_mappings_are_those_of_fiemap(written: Written) -> None:
    for name, found in written.files.items():
        if found.is_inline:
            continue
        blocks = {}
        allocated = found.size + found.sectors * 512  # blocks past the end of the file are mapped too
        for mapping in written.core.mappings(found, allocated):
            if mapping.type == iomap.HOLE:
                assert mapping.addr == iomap.NULL_ADDR
                continue
            assert mapping.type in (iomap.MAPPED, iomap.UNWRITTEN)
            for at in range(0, mapping.length, 1024):
                blocks[(mapping.offset + at) // 1024] = (
                    (mapping.addr + at) // 1024, mapping.type == iomap.UNWRITTEN)
        assert blocks == written.blocks[name], name


def test_seeking_is_the_kernels(written: Written) -> None:
    for name, answers in written.seeks.items():
        found = written.files[name]
        for (offset, whence), expected in answers.items():
            try:
                answer = written.core.run(iomap.seek, found, offset, whence == os.SEEK_DATA)
            except Refused as error:
                assert error.errno == errno.ENXIO
                answer = None
            assert answer == expected, (name, offset, whence)


def test_only_mapped_bytes_are_data(written: Written) -> None:
    """A walk by SEEK_DATA and SEEK_HOLE meets every written block, and none that is not."""
    for name, found in written.files.items():
        if found.is_inline:
            continue
        met, position = set(), 0
        while position < found.size:
            try:
                start = written.core.run(iomap.seek, found, position, True)
            except Refused:
                break
            position = written.core.run(iomap.seek, found, start, False)
            met |= set(range(start // 1024, -(-position // 1024)))
        end = -(-found.size // 1024)
        assert met == {block for block, (_, unwritten) in written.blocks[name].items()
                       if not unwritten and block < end}, name


# ---- the ends --------------------------------------------------------------------------------------------------

@cache
def small(features: str = "") -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "file").write_bytes(b"x" * 5000)
    (root / "empty").write_bytes(b"")
    return image(f"-t ext4 -b 1024 -O ^has_journal,^resize_inode {features}", 2048, root)


@pytest.mark.parametrize("features", ["", "-O ^extent,^64bit"])
def test_every_mapping_holds_the_place_asked_for(features: str) -> None:
    with Core(small(features)) as core:
        for path in ("/file", "/empty"):
            found = core.at(path)
            for position in (0, 1, 1023, 1024, 4999, 5000, 5120, 5121, 100_000, 1 << 30, (1 << 34) - 1):
                for count in (0, 1, 1024, 1 << 20, 1 << 40):
                    mapping = core.run(iomap.begin, found, position, count)
                    assert mapping.offset <= position < mapping.offset + mapping.length
                    assert mapping.offset % 1024 == mapping.length % 1024 == 0


def test_holes_end_where_the_file_and_the_question_end() -> None:
    """The kernel would take a longer hole for a file that cannot be written there."""
    with Core(small()) as core:
        assert core.run(iomap.begin, core.at("/empty"), 0, 10) == (0, 1024, iomap.NULL_ADDR, iomap.HOLE, 0)
        assert core.run(iomap.begin, core.at("/empty"), 5000, 3000) == (4096, 4096, iomap.NULL_ADDR, iomap.HOLE, 0)
        assert core.run(iomap.begin, core.at("/file"), 5120, 1).offset == 5120


def test_beyond_the_largest_file() -> None:
    for features in ("", "-O ^extent,^64bit"):
        with Core(small(features)) as core:
            found = core.at("/file")
            end = core.fs.max_file_bytes(found)
            for position in (end, end + 1, 1 << 63, -1):
                with pytest.raises(Refused) as caught:
                    core.run(iomap.begin, found, position, 1)
                assert caught.value.errno == errno.EFBIG
            mapping = core.run(iomap.begin, found, end - 1, 1)
            assert mapping.type == iomap.HOLE and mapping.offset + mapping.length == end


def test_block_maps_say_that_they_were_joined() -> None:
    for features, flags in (("", 0), ("-O ^extent,^64bit", iomap.MERGED)):
        with Core(small(features)) as core:
            assert core.run(iomap.begin, core.at("/file"), 0, 1).flags == flags


def test_the_data_of_encrypted_files_needs_a_key_but_its_place_does_not() -> None:
    editor = Editor(small("-O encrypt"))
    number = editor.number("/file")
    editor.put_inode(number, flags=FLAG_EXTENTS | FLAG_ENCRYPT)
    core = Core(editor.data)
    found = core.inode(number)
    with pytest.raises(Refused) as caught:
        core.run(iomap.begin, found, 0, 1)
    assert caught.value.errno == errno.ENOKEY
    assert core.run(iomap.begin, found, 0, 1, iomap.OP_REPORT).type == iomap.MAPPED
    assert core.run(iomap.seek, found, 0, True) == 0
    assert core.run(iomap.seek, found, 0, False) == 5000


@pytest.mark.parametrize("offset", [-1, 5000, 5001, 1 << 62])
def test_seeking_outside_the_file(offset: int) -> None:
    with Core(small()) as core:
        for data in (True, False):
            with pytest.raises(Refused) as caught:
                core.run(iomap.seek, core.at("/file"), offset, data)
            assert caught.value.errno == errno.ENXIO
            with pytest.raises(Refused):
                core.run(iomap.seek, core.at("/empty"), 0, data)
