"""Partition tables: what sfdisk writes is found where sfdisk and partx say; damaged and hostile tables are refused.

A test that draws at random prints ``FUSEWIRE_SEED``; set it to repeat the run.
"""

import json
import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from fusewire.partition import PartitionError, Read, find_partition, list_partitions

MIB = 1 << 20
DISK_BYTES = 64 * MIB

GPT_SCRIPT = """label: gpt
start=2048, size=8192, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="boot"
start=10240, size=20480, type=L, name="root, with comma"
4 : start=40960, size=4096, type=S
"""
MBR_SCRIPT = """label: dos
start=2048, size=4096, type=83
start=8192, size=40960, type=5
4 : start=61440, size=2048, type=c
start=10240, size=2048, type=83
start=14336, size=4096, type=82
start=20480, size=1024, type=83
"""


@contextmanager
def loop(path: Path, *options: str) -> Iterator[str]:
    """A loop device that shows an image."""
    done = subprocess.run(["losetup", "-f", "--show", *options, path], check=True, capture_output=True, text=True)
    try:
        yield done.stdout.strip()
    finally:
        subprocess.run(["losetup", "-d", done.stdout.strip()], check=True)


def make(path: Path, script: str, sector: int = 512) -> Path:
    """An image of a disk, partitioned by sfdisk."""
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    with loop(path, "-b", str(sector)) if sector != 512 else nullcontext(path) as disk:
        command = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk]
        subprocess.run(command, input=script.encode(), check=True, capture_output=True)
    return path


def reader(path: Path) -> Read:
    """A ``read`` over a file."""
    file = path.open("rb")
    return lambda offset, length: os.pread(file.fileno(), length, offset)


def by_sfdisk(path: Path) -> list[tuple[int, int, int]]:
    """(number, offset, size) of each partition, extended ones left out, according to sfdisk."""
    output = subprocess.run(["sfdisk", "--json", path], check=True, capture_output=True).stdout
    found = json.loads(output)["partitiontable"]["partitions"]
    return [
        (int(part["node"].removeprefix(str(path))), part["start"] * 512, part["size"] * 512)
        for part in found if part["type"] not in ("5", "f", "85")
    ]


def places(read: Read, size: int = DISK_BYTES, sector: int = 0) -> list[tuple[int, int, int]]:
    return [
        (part.number, part.offset_bytes, part.size_bytes)
        for part in list_partitions(read, size, sector) if part.kind != "extended"
    ]


def test_gpt_as_sfdisk_wrote_it(tmp_path: Path) -> None:
    path = make(tmp_path / "gpt.img", GPT_SCRIPT)
    assert places(reader(path)) == by_sfdisk(path) != []
    boot, root, swap = list_partitions(reader(path), DISK_BYTES)
    assert (boot.kind, root.kind, swap.kind) == ("EFI system", "Linux data", "Linux swap")
    assert root.label == "root, with comma"
    assert find_partition(reader(path), DISK_BYTES, 2) == root
    assert root.offset_bytes == 10240 * 512 and root.size_bytes == 20480 * 512


def test_gpt_with_sectors_of_4096_bytes(tmp_path: Path) -> None:
    script = "label: gpt\nstart=256, size=1024, type=L\nstart=2048, size=512, type=L\n"
    path = make(tmp_path / "gpt4k.img", script, 4096)
    expected = [(1, 256 * 4096, 1024 * 4096), (2, 2048 * 4096, 512 * 4096)]
    assert places(reader(path)) == expected
    assert places(reader(path), sector=4096) == expected
    with pytest.raises(PartitionError, match="damaged"):
        list_partitions(reader(path), DISK_BYTES, 512)


def test_mbr_with_logical_partitions_as_sfdisk_wrote_it(tmp_path: Path) -> None:
    path = make(tmp_path / "mbr.img", MBR_SCRIPT)
    assert places(reader(path)) == by_sfdisk(path)
    assert [part.number for part in list_partitions(reader(path), DISK_BYTES)] == [1, 2, 4, 5, 6, 7]
    assert find_partition(reader(path), DISK_BYTES, 6).kind == "Linux swap"
    with pytest.raises(PartitionError, match="partition 2 cannot be used: holds the logical partitions"):
        find_partition(reader(path), DISK_BYTES, 2)


def test_mbr_of_a_disk_with_sectors_of_4096_bytes(tmp_path: Path) -> None:
    path = make(tmp_path / "mbr4k.img", "label: dos\nstart=256, size=1024, type=83\n", 4096)
    assert places(reader(path), sector=4096) == [(1, MIB, 4 * MIB)]


def test_partx_finds_the_same(tmp_path: Path) -> None:
    """libblkid's reading of the table, extended partitions included."""
    for name, script in (("gpt", GPT_SCRIPT), ("mbr", MBR_SCRIPT)):
        path = make(tmp_path / f"{name}.img", script)
        command = ["partx", "--show", "--noheadings", "--output", "NR,START,SECTORS", path]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        ours = list_partitions(reader(path), DISK_BYTES)
        assert [tuple(map(int, line.split())) for line in lines] == [
            (part.number, part.offset_bytes // 512, part.size_bytes // 512) for part in ours
        ]


def test_missing_partition_lists_the_others(tmp_path: Path) -> None:
    path = make(tmp_path / "gpt.img", GPT_SCRIPT)
    with pytest.raises(PartitionError) as raised:
        find_partition(reader(path), DISK_BYTES, 3)
    assert str(raised.value) == (
        'no partition 3; there are 1 (4 MiB, EFI system "boot"), 2 (10 MiB, Linux data "root, with comma"), '
        "4 (2 MiB, Linux swap)"
    )
    empty = make(tmp_path / "empty.img", "label: gpt\n")
    with pytest.raises(PartitionError, match="no partition 1; there is none"):
        find_partition(reader(empty), DISK_BYTES, 1)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 511, b"\0" * MIB, b"\xff" * MIB], ids=["none", "short", "zero", "ones"]
)
def test_no_table(content: bytes) -> None:
    with pytest.raises(PartitionError, match="no partition table"):
        list_partitions(lambda offset, length: content[offset : offset + length], len(content))


def test_file_system_without_partitions_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "plain.img"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)
    with pytest.raises(PartitionError, match="no partition table"):
        list_partitions(reader(path), 8 * MIB)


def overlay(read: Read, *patches: tuple[int, bytes]) -> Read:
    """A ``read`` with some bytes replaced."""
    def patched(offset: int, length: int) -> bytes:
        data = bytearray(read(offset, length))
        for place, content in patches:
            for index, byte in enumerate(content):
                if 0 <= place + index - offset < len(data):
                    data[place + index - offset] = byte
        return bytes(data)
    return patched


@pytest.mark.parametrize("place", [512, 512 + 16, 512 + 40, 512 + 72, 1024, 1024 + 128 + 33], ids=str)
def test_backup_table_serves_when_the_primary_is_damaged(tmp_path: Path, place: int) -> None:
    path = make(tmp_path / "gpt.img", GPT_SCRIPT)
    intact = reader(path)
    damaged = overlay(intact, (place, bytes([intact(place, 1)[0] ^ 0x10])))
    assert list_partitions(damaged, DISK_BYTES) == list_partitions(intact, DISK_BYTES)
    guid = DISK_BYTES - 512 + 56
    both = overlay(damaged, (guid, bytes([intact(guid, 1)[0] ^ 0x01])))
    with pytest.raises(PartitionError, match="neither the primary nor the backup"):
        list_partitions(both, DISK_BYTES)


def test_backup_table_of_a_disk_with_large_sectors(tmp_path: Path) -> None:
    path = make(tmp_path / "g.img", "label: gpt\nstart=256, size=1024, type=L\n", 4096)
    assert places(overlay(reader(path), (4096, b"gone"))) == [(1, MIB, 4 * MIB)]


def with_gpt(read: Read, change: Callable[[bytearray], None], entry: Callable[[bytearray], None]) -> Read:
    """A primary table changed and its checksums made right again, the backup destroyed."""
    entries = bytearray(read(1024, 128 * 128))
    entry(entries)
    header = bytearray(read(512, 512))
    struct.pack_into("<I", header, 88, zlib.crc32(entries))
    change(header)
    struct.pack_into("<I", header, 16, 0)
    header_bytes = min(struct.unpack_from("<I", header, 12)[0], 512)
    struct.pack_into("<I", header, 16, zlib.crc32(header[:header_bytes]))
    return overlay(read, (512, bytes(header)), (1024, bytes(entries)), (DISK_BYTES - 512, bytes(8)))


def keep(_record: bytearray) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (12, "<I", 91), (12, "<I", 513), (12, "<I", 0xFFFFFFFF), (24, "<Q", 2), (72, "<Q", 1 << 63),
        (72, "<Q", (1 << 64) - 1), (72, "<Q", DISK_BYTES // 512 - 1), (80, "<I", 0xFFFFFFFF), (84, "<I", 0),
        (84, "<I", 127), (84, "<I", 0xFFFFFFF8),
    ],
    ids=str,
)
def test_hostile_header_with_right_checksums_is_refused(tmp_path: Path, offset: int, form: str, value: int) -> None:
    path = make(tmp_path / "gpt.img", GPT_SCRIPT)
    hostile = with_gpt(reader(path), lambda header: struct.pack_into(form, header, offset, value), keep)
    with pytest.raises(PartitionError, match="damaged"):
        list_partitions(hostile, DISK_BYTES)


def test_changed_gpt_with_right_checksums_is_read(tmp_path: Path) -> None:
    """That the helper of the test above makes valid tables."""
    path = make(tmp_path / "gpt.img", GPT_SCRIPT)
    assert list_partitions(with_gpt(reader(path), keep, keep), DISK_BYTES) == list_partitions(reader(path), DISK_BYTES)


@pytest.mark.parametrize(
    ("first", "last", "problem"),
    [
        (2048, DISK_BYTES // 512, "beyond the end"), (1 << 63, (1 << 64) - 1, "beyond the end"),
        (4096, 2048, "before its start"), (1 << 63, 0, "before its start"),
    ],
)
def test_gpt_partition_outside_the_disk_cannot_be_used(tmp_path: Path, first: int, last: int, problem: str) -> None:
    path = make(tmp_path / "gpt.img", GPT_SCRIPT)
    hostile = with_gpt(reader(path), keep, lambda entries: struct.pack_into("<QQ", entries, 32, first, last))
    with pytest.raises(PartitionError, match=f"partition 1 cannot be used: .*{problem}"):
        find_partition(hostile, DISK_BYTES, 1)
    assert find_partition(hostile, DISK_BYTES, 2).problem == ""


def test_control_characters_in_a_label_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = make(tmp_path / "gpt.img", GPT_SCRIPT)
    name = "\x1b[2J\u202ex".encode("utf-16-le").ljust(72, b"\0")
    hostile = with_gpt(reader(path), keep, lambda entries: entries.__setitem__(slice(56, 128), name))
    assert list_partitions(hostile, DISK_BYTES)[0].label == "\ufffd[2J\ufffdx"


def mbr(*slots: tuple[int, int, int]) -> bytes:
    """A boot record of (type, start, sectors) entries."""
    entries = b"".join(struct.pack("<BxxxBxxxII", 0, *slot) for slot in slots)
    return (bytes(446) + entries).ljust(510, b"\0") + b"\x55\xaa"


def test_loops_of_extended_boot_records_end() -> None:
    size = 16 * MIB
    disk = overlay(lambda offset, length: bytes(max(0, min(length, size - offset))),
                   (0, mbr((5, 100, 20000))),
                   (100 * 512, mbr((0x83, 1, 10), (5, 50, 100))),
                   (150 * 512, mbr((0x83, 1, 20), (5, 0, 100))))
    assert [(p.number, p.offset_bytes // 512) for p in list_partitions(disk, size)] == [(1, 100), (5, 101), (6, 151)]


def test_long_chains_of_extended_boot_records_are_bounded() -> None:
    size = 64 * MIB
    reads = 0

    def disk(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        sector = offset // 512
        if sector == 0:
            return mbr((0x0F, 1, size // 512 - 1))
        return mbr((0x83, 1, 1), (0x83, 1, 1), (0x83, 1, 1), (5, sector, 2))

    assert len(list_partitions(disk, size)) == 1 + 128
    assert reads <= 130


def test_extended_partition_outside_the_disk_is_not_read() -> None:
    content = mbr((5, 1 << 31, 100), (0x83, 1, 0xFFFFFFFF))
    found = list_partitions(lambda offset, length: content[offset : offset + length], MIB)
    assert [part.number for part in found] == [1, 2]
    assert found[1].problem == "reaches beyond the end of the disk"


def test_random_damage_gives_partitions_or_a_partition_error(tmp_path: Path) -> None:
    seed = int(os.environ.get("FUSEWIRE_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"FUSEWIRE_SEED={seed}")
    chance = random.Random(seed)
    sources = [reader(make(tmp_path / f"{i}.img", script)) for i, script in enumerate((GPT_SCRIPT, MBR_SCRIPT))]
    for _ in range(400):
        places = [chance.choice((446, 512, 1024, 8192 * 512 + 446)) + chance.randrange(100) for _ in range(3)]
        patches = [(place, chance.randbytes(chance.randint(1, 8))) for place in places]
        try:
            found = list_partitions(overlay(chance.choice(sources), *patches), DISK_BYTES)
        except PartitionError:
            continue
        for part in found:
            inside = part.size_bytes > 0 and part.offset_bytes + part.size_bytes <= DISK_BYTES
            assert inside or part.problem
