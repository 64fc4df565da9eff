"""What programs may rely on when they write data: kernel ext4 is asked first, and is the judge.

The device is full of old bytes, so whatever is read and was not written must be zero, not ``STALE``.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.images import MIB
from tests.model.generate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from tests.model.side import Side, fallocate, read_runs
from tests.mount.writable_mount import DRIVERS, STALE, Writable, error_of, here, mounted, writable  # noqa: F401

GIB = 1 << 30
PAGE = 4096
MARK = STALE[:6]
SEED = int(os.environ.get("FUSEWIRE_SEED", "20240229"))
# fs/fuse lets the page cache take what the file system will refuse: the error comes with fsync(2) or close(2).
BY_DRIVER = {"kernel": {"beyond": "EFBIG"}, "fusewire": {"beyond": "ok"}}


def forget(fd: int) -> None:
    """Have the next read come from the file system."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def content(fd: int) -> bytes:
    """The whole file, first from the page cache and then from the file system: the same."""
    size = os.fstat(fd).st_size
    cached = os.pread(fd, size, 0)
    forget(fd)
    assert os.pread(fd, size, 0) == cached
    assert MARK not in cached
    return cached


@pytest.fixture
def fd(here: Path) -> object:  # noqa: F811
    number = os.open(here / "file", os.O_RDWR | os.O_CREAT, 0o644)
    yield number
    os.close(number)


@pytest.mark.parametrize("at", [1, 511, 512, 1000, 4095, 4096, 4097, 12287, 12288, 70_001])
def test_a_write_somewhere(fd: int, at: int) -> None:
    os.pwrite(fd, b"data", at)
    assert content(fd) == bytes(at) + b"data"
    os.pwrite(fd, b"X", at + 10_000)
    assert content(fd) == bytes(at) + b"data" + bytes(10_000 - 4) + b"X"
    os.pwrite(fd, b"front", 0)
    assert content(fd)[5:] == (bytes(at) + b"data" + bytes(9996) + b"X")[5:] or at < 5


@pytest.mark.parametrize("small", [0, 1, 100, 4095, 4096, 5000, 8192])
@pytest.mark.parametrize("big", [8193, 12_288, 100_000])
def test_truncate_down_and_up_shows_zeroes(fd: int, small: int, big: int) -> None:
    os.pwrite(fd, b"a" * 20_000, 0)
    os.fsync(fd)
    os.ftruncate(fd, small)
    os.ftruncate(fd, big)
    assert content(fd) == b"a" * small + bytes(big - small)
    os.ftruncate(fd, small)
    os.pwrite(fd, b"end", big)
    assert content(fd) == b"a" * small + bytes(big - small) + b"end"


def test_reserved_room_reads_as_zeroes(fd: int) -> None:
    fallocate(fd, 0, 0, 100_000)
    assert content(fd) == bytes(100_000)
    os.pwrite(fd, b"x", 50_000)
    os.pwrite(fd, b"y" * 5000, 8191)
    wanted = bytearray(100_000)
    wanted[50_000:50_001], wanted[8191:13_191] = b"x", b"y" * 5000
    assert content(fd) == bytes(wanted)
    fallocate(fd, KEEP_SIZE, 100_000, 500_000)
    assert os.fstat(fd).st_size == 100_000
    assert os.fstat(fd).st_blocks * 512 >= 600_000
    os.ftruncate(fd, 300_000)
    assert content(fd) == bytes(wanted) + bytes(200_000)


def test_holes_and_zeroes(fd: int) -> None:
    os.pwrite(fd, b"a" * 100_000, 0)
    os.fsync(fd)
    before = os.fstat(fd).st_blocks
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 10_000, 50_000)
    assert os.fstat(fd).st_blocks < before
    fallocate(fd, ZERO_RANGE, 70_001, 9)
    fallocate(fd, ZERO_RANGE, 95_000, 10_000)
    wanted = bytearray(b"a" * 95_000 + bytes(10_000))
    wanted[10_000:60_000] = bytes(50_000)
    wanted[70_001:70_010] = bytes(9)
    assert content(fd) == bytes(wanted)
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, GIB)
    assert content(fd) == bytes(105_000)
    assert os.fstat(fd).st_blocks == 0
    for mode in (PUNCH_HOLE, 0x40, 0x80, PUNCH_HOLE | KEEP_SIZE | ZERO_RANGE):
        assert error_of(fallocate, fd, mode, 0, 4096) in ("ENOTSUP", "EINVAL")
    assert error_of(fallocate, fd, 0, 0, 0) == "EINVAL"
    assert error_of(fallocate, fd, 0, -1, 5) == "EINVAL"


def test_mapped_memory(fd: int) -> None:
    os.ftruncate(fd, 50_001)
    with mmap.mmap(fd, 50_001) as memory:
        assert memory[:] == bytes(50_001)
        memory[10_000:10_004] = b"page"
        memory[50_000:] = b"!"
        assert os.pread(fd, 4, 10_000) == b"page"
        os.pwrite(fd, b"PW", 10_001)
        assert memory[10_000:10_004] == b"pPWe"
        memory.flush()
    wanted = bytearray(50_001)
    wanted[10_000:10_004], wanted[50_000:] = b"pPWe", b"!"
    assert content(fd) == bytes(wanted)
    os.ftruncate(fd, 60_000)    # what a mapping wrote behind the end of the file is gone
    assert content(fd) == bytes(wanted) + bytes(9_999)


def test_what_a_mapping_writes_behind_the_end(fd: int) -> None:
    os.ftruncate(fd, PAGE)
    with mmap.mmap(fd, PAGE) as memory:
        os.ftruncate(fd, 100)
        memory[50:200] = b"z" * 150
        memory.flush()
    os.ftruncate(fd, 300)
    assert content(fd) == bytes(50) + b"z" * 50 + bytes(200)


def test_direct_beside_cached(here: Path, fd: int) -> None:  # noqa: F811
    os.pwrite(fd, b"c" * 5 * PAGE, 0)
    direct = os.open(here / "file", os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 2 * PAGE) as buffer:
            buffer[:] = b"d" * 2 * PAGE
            assert os.pwritev(direct, [buffer], PAGE) == 2 * PAGE
            assert os.pwritev(direct, [buffer], 20 * PAGE) == 2 * PAGE
            assert os.preadv(direct, [buffer], 2 * PAGE) == 2 * PAGE
            assert buffer[:] == b"d" * PAGE + b"c" * PAGE
    finally:
        os.close(direct)
    assert content(fd) == b"c" * PAGE + b"d" * 2 * PAGE + b"c" * 2 * PAGE + bytes(15 * PAGE) + b"d" * 2 * PAGE


def test_appenders_do_not_overwrite_each_other(here: Path) -> None:  # noqa: F811
    script = ("import os,sys\nfd=os.open(sys.argv[1],os.O_WRONLY|os.O_APPEND|os.O_CREAT)\n"
              "for i in range(500): os.write(fd,(sys.argv[2]*99+'\\n').encode())")
    running = [subprocess.Popen([sys.executable, "-c", script, here / "log", name]) for name in "abcd"]
    assert [process.wait() for process in running] == [0] * 4
    lines = (here / "log").read_text().splitlines()
    assert sorted(lines) == sorted(name * 99 for name in "abcd" for _ in range(500))


def test_big_sparse_file(fd: int) -> None:
    os.ftruncate(fd, 2 * GIB)
    places = [0, 4095, 1 << 20, (1 << 30) - 2, (1 << 31) - 6]
    for place in places:
        os.pwrite(fd, b"here!", place)
    forget(fd)
    for place in places:
        assert os.pread(fd, 5, place) == b"here!"
        assert os.pread(fd, 100, place + 8192).strip(b"\0") == b""
    assert os.fstat(fd).st_size == 2 * GIB
    assert os.fstat(fd).st_blocks * 512 <= 16 * 4 * PAGE


def test_the_largest_file(mounted: Writable, fd: int) -> None:  # noqa: F811
    largest = (1 << 44) - PAGE
    os.ftruncate(fd, largest)
    assert os.fstat(fd).st_size == largest
    os.pwrite(fd, b"last", largest - 4)
    forget(fd)
    assert os.pread(fd, 10, largest - 5) == b"\0last"
    assert error_of(os.ftruncate, fd, largest + 1) == "EFBIG"
    assert error_of(fallocate, fd, 0, largest, PAGE) == "EFBIG"
    assert error_of(os.pwrite, fd, b"x", largest) == BY_DRIVER[mounted.driver]["beyond"]
    if mounted.driver == "fusewire":
        assert error_of(os.fsync, fd) == "EFBIG"
    os.ftruncate(fd, 0)


def test_seeking_sees_what_is_not_written_back(fd: int) -> None:
    """A program that copies a file which another has open must not take dirty pages for holes."""
    os.ftruncate(fd, 40 * PAGE)
    os.fsync(fd)
    os.pwrite(fd, b"a" * PAGE, 10 * PAGE)
    with mmap.mmap(fd, 40 * PAGE) as memory:
        memory[20 * PAGE] = 1
        assert read_runs(fd, 40 * PAGE) == "40960-45056,81920-86016"


def test_copying_a_file_that_is_being_written(here: Path, fd: int) -> None:  # noqa: F811
    os.pwrite(fd, b"precious" * 1000, 100_000)
    subprocess.run(["cp", here / "file", here / "copy"], check=True)
    assert (here / "copy").read_bytes() == bytes(100_000) + b"precious" * 1000


def test_copied_ranges(here: Path, fd: int) -> None:  # noqa: F811
    """Holes and room without data become neither data nor stale bytes, wherever the edges of blocks are."""
    random_source = random.Random(SEED)
    print(f"FUSEWIRE_SEED={SEED}")
    os.pwrite(fd, b"a" * 30_000, 0)
    os.pwrite(fd, b"b" * 3_000, 100_000)
    fallocate(fd, 0, 200_000, 50_000)
    os.pwrite(fd, b"c" * 10, 220_000)
    source = content(fd)
    wanted = bytearray(b"t" * 150_000)
    target = os.open(here / "target", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(target, wanted, 0)
        for _ in range(60):
            start, to = random_source.randrange(len(source)), random_source.randrange(200_000)
            length = min(random_source.choice((1, 100, 4096, 5000, 60_000, 300_000)), len(source) - start)
            done = 0
            while done < length:
                done += os.copy_file_range(fd, target, length - done, start + done, to + done)
            wanted.extend(bytes(max(to + length - len(wanted), 0)))
            wanted[to:to + length] = source[start:start + length]
        assert content(target) == bytes(wanted)
    finally:
        os.close(target)


def test_a_copy_has_the_holes_of_its_source(mounted: Writable, here: Path, fd: int) -> None:  # noqa: F811
    os.pwrite(fd, b"data" * 1024, 0)
    os.pwrite(fd, b"data" * 1024, 50 * MIB)
    target = os.open(here / "target", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(target, b"old" * 100_000, 0)
        os.fsync(target)
        size, done = os.fstat(fd).st_size, 0
        while done < size:
            done += os.copy_file_range(fd, target, size - done, done, done)
        forget(target)
        assert os.pread(target, 4096, 50 * MIB) == b"data" * 1024
        assert os.pread(target, 1 << 20, 4096) == bytes(1 << 20)
        assert os.fstat(target).st_size == size
        if mounted.driver == "fusewire":    # ext4 copies zeroes
            assert os.fstat(target).st_blocks * 512 <= 4 * PAGE
    finally:
        os.close(target)


def test_many_writers_of_one_file(fd: int) -> None:
    def write(index: int) -> None:
        for step in range(50):
            os.pwrite(fd, bytes([index]) * 1000, (step * 16 + index) * 1000)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(16)))
    assert content(fd) == b"".join(bytes([index]) * 1000 for _ in range(50) for index in range(16))


def test_sync_calls(here: Path, fd: int) -> None:  # noqa: F811
    os.pwrite(fd, b"x" * 100_000, 0)
    os.fdatasync(fd)
    os.pwrite(fd, b"y", 0)
    os.fsync(fd)
    folder = os.open(here, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    Side(here).syncfs()
    flags = os.O_RDWR | os.O_CREAT | os.O_SYNC
    synced = os.open(here / "synced", flags)
    try:
        assert os.write(synced, b"z" * 10_000) == 10_000
        assert content(synced) == b"z" * 10_000
    finally:
        os.close(synced)


def test_blocks_are_counted_once_they_are_written(fd: int) -> None:
    """At once where there were none; of a file that is being written on, a second later or when it is closed."""
    os.pwrite(fd, b"x" * MIB, 0)
    os.fsync(fd)
    assert os.fstat(fd).st_blocks == MIB // 512
    for megabytes in (2, 3):
        other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        os.pwrite(other, b"x" * MIB, (megabytes - 1) * MIB)
        os.fsync(other)
        os.close(other)
        assert os.fstat(fd).st_blocks == megabytes * MIB // 512


def test_overwriting_follows_the_blocks_of_a_file(fd: int) -> None:
    """Blocks that were freed between two writes to the same place are not written any more."""
    for round_ in range(3):
        for place in (0, 5 * PAGE, 40 * PAGE):
            os.pwrite(fd, bytes([65 + round_]) * 10 * PAGE, place)
            os.fdatasync(fd)
            os.pwrite(fd, bytes([97 + round_]) * 2 * PAGE, place + PAGE)
            os.fdatasync(fd)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 4 * PAGE, 38 * PAGE)
        os.pwrite(fd, b"after", 6 * PAGE)
        assert content(fd)[4 * PAGE:42 * PAGE] == bytes(2 * PAGE) + b"after".ljust(36 * PAGE, b"\0")
        os.ftruncate(fd, 0)


def test_statfs_counts_what_is_written_and_freed(mounted: Writable, here: Path) -> None:  # noqa: F811
    side = Side(mounted.root)
    side.syncfs()
    before = os.statvfs(here)
    (here / "file").write_bytes(b"x" * MIB)
    os.mkdir(here / "dir")
    side.syncfs()
    during = os.statvfs(here)
    assert before.f_bfree - during.f_bfree == MIB // 4096 + 1
    assert before.f_bavail - during.f_bavail == MIB // 4096 + 1
    assert before.f_ffree - during.f_ffree == 2
    os.unlink(here / "file")
    os.rmdir(here / "dir")
    side.syncfs()
    after = os.statvfs(here)
    assert (after.f_bfree, after.f_bavail, after.f_ffree) == (before.f_bfree, before.f_bavail, before.f_ffree)


# --- a disk that is full ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["-t ext4 -b 4096", "-t ext4 -b 1024", "-t ext3 -b 1024", "-t ext2 -b 4096"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_nothing_stale_on_a_full_disk(driver: str, form: str, mounts: None, tmp_path: Path) -> None:
    """Every block of the device belongs to a file in the end; writes of odd lengths leave gaps everywhere."""
    random_source = random.Random(SEED)
    print(f"FUSEWIRE_SEED={SEED}")
    with writable(driver, tmp_path / "full.img", form, size=10 * MIB) as made:
        failed = 0
        for index in range(900):
            with open(made.root / f"f{index % 40}", "r+b" if index >= 40 else "xb", buffering=0) as file:
                try:
                    os.pwrite(file.fileno(), b"n" * random_source.randrange(1, 60_000),
                              random_source.randrange(1_000_000))
                    os.fsync(file.fileno())
                except OSError:
                    failed += 1
                    os.ftruncate(file.fileno(), random_source.randrange(100_000))
        assert failed
        for index in range(40):
            with open(made.root / f"f{index}", "r+b", buffering=0) as file:
                assert not content(file.fileno()).strip(b"n\0")
