"""Checksums of every structure of images that mke2fs, debugfs and e2fsck wrote, read here without fusewire's parsers.

A structure passes as it lies on the disk, fails after any bit of it has turned, and ``seal_…`` restores its bytes.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusewire.ext4 import checksum
from tests.mounting import kernel_mount

RECIPES = {
    "metadata_csum": ["-O", "metadata_csum,64bit"],
    "desc32": ["-O", "metadata_csum,^64bit"],
    "seed": ["-O", "metadata_csum,64bit,metadata_csum_seed,mmp,orphan_file"],
    "blocks4k": ["-O", "metadata_csum,64bit,orphan_file", "-b", "4096"],
    "inode128": ["-O", "metadata_csum,64bit", "-I", "128"],
    "inode1024": ["-O", "metadata_csum,64bit", "-I", "1024", "-b", "4096"],
    "uninit_bg": ["-O", "uninit_bg,^metadata_csum,^64bit"],
    "uninit_bg64": ["-O", "uninit_bg,^metadata_csum,64bit"],
    "bigalloc": ["-O", "metadata_csum,64bit,bigalloc", "-C", "16384", "-b", "4096"],
}
WITH_METADATA_CSUM = [name for name, options in RECIPES.items() if "^metadata_csum" not in options[1]]
DIR_TYPE, REGULAR_TYPE, HASHED_FLAG, EXTENTS_FLAG = 0x4000, 0x8000, 0x1000, 0x80000


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert not check or done.returncode in (0, 1), (command, done.stdout, done.stderr)
    return done.stdout


def debugfs(image: Path, *requests: str) -> str:
    done = subprocess.run(["debugfs", "-w", "-f", "-", str(image)], input="\n".join(requests) + "\n",
                          capture_output=True, text=True, check=True)
    return done.stdout


class Image:
    """An image read by offsets alone; fields are looked up where the kernel's documentation says they are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.super = self.data[1024:2048]
        self.block_bytes = 1024 << self.u32(0x18)
        self.first_block, self.blocks = self.u32(0x14), self.u32(0x04)
        self.clusters_per_group, self.inodes_per_group = self.u32(0x24), self.u32(0x28)
        self.blocks_per_group, self.inodes = self.u32(0x20), self.u32(0)
        self.inode_bytes = struct.unpack_from("<H", self.super, 0x58)[0]
        self.uuid = self.super[0x68:0x78]
        incompat = self.u32(0x60)
        self.desc_bytes = struct.unpack_from("<H", self.super, 0xFE)[0] if incompat & 0x80 else 32
        self.groups = -(-(self.blocks - self.first_block) // self.blocks_per_group)
        self.seed = self.u32(0x270) if incompat & 0x2000 else checksum.seed_of(self.uuid)

    def u32(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.super, offset)[0])

    def block(self, number: int) -> bytes:
        return self.data[number * self.block_bytes:(number + 1) * self.block_bytes]

    def desc(self, group: int) -> bytes:
        at = (self.first_block + 1) * self.block_bytes + group * self.desc_bytes
        return self.data[at:at + self.desc_bytes]

    def bitmap_block(self, group: int, which: int) -> bytes:
        desc = self.desc(group)
        high = struct.unpack_from("<I", desc, 0x20 + 4 * which)[0] if len(desc) >= 64 else 0
        return self.block(struct.unpack_from("<I", desc, 4 * which)[0] | high << 32)

    def inode(self, number: int) -> bytes:
        group, index = divmod(number - 1, self.inodes_per_group)
        at = struct.unpack_from("<I", self.desc(group), 8)[0] * self.block_bytes + index * self.inode_bytes
        return self.data[at:at + self.inode_bytes]

    def inodes_in_use(self) -> Iterator[int]:
        for group in range(self.groups):
            if struct.unpack_from("<H", self.desc(group), 0x12)[0] & 1:
                continue
            bitmap = self.bitmap_block(group, 1)
            for index in range(self.inodes_per_group):
                if bitmap[index // 8] >> index % 8 & 1:
                    yield group * self.inodes_per_group + index + 1

    def seed_of_inode(self, number: int) -> int:
        return checksum.inode_seed(self.seed, number, struct.unpack_from("<I", self.inode(number), 0x64)[0])

    def mapped(self, number: int) -> tuple[list[bytes], list[int]]:
        """(the blocks of the extent tree below the root, numbers of the data blocks in file order)."""
        return self._tree(self.inode(number)[0x28:0x64])

    def _tree(self, node: bytes) -> tuple[list[bytes], list[int]]:
        magic, entries, _, depth = struct.unpack_from("<4H", node)
        assert magic == 0xF30A
        nodes, blocks = [], []
        for at in range(12, 12 + 12 * entries, 12):
            _, low, high, _ = struct.unpack_from("<IIHH", node, at)
            if depth:
                child = self.block(low | high << 32)
                below = self._tree(child)
                nodes += [child, *below[0]]
                blocks += below[1]
            else:
                _, length, _, start = struct.unpack_from("<IHHI", node, at)
                blocks += range(start, start + length % 0x8000)
        return nodes, blocks


def fill(folder: Path) -> None:
    """Files that need every structure: a directory for a hash tree of two levels, a tree of extents, a long name."""
    (folder / "many").mkdir(parents=True)
    for number in range(1300):
        (folder / "many" / (f"{number:04d}-" + "n" * 180)).touch()
    (folder / "few").mkdir()
    (folder / "few" / "name").write_bytes(b"content")
    with open(folder / "sparse", "wb") as file:
        for number in range(800):
            file.seek(number * 8192)
            file.write(b"x" * 4096)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("content")
    fill(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image_of(content: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Image]]:
    folder, made = tmp_path_factory.mktemp("checksum"), {}

    def image(name: str) -> Image:
        if name not in made:
            path = folder / name
            with open(path, "wb") as file:
                file.truncate(64 << 20)
            options = ["-b", "1024", "-N", "4096", *RECIPES[name], "-d", str(content)]
            run("mke2fs", "-q", "-F", "-t", "ext4", *options, str(path))
            value = folder / "value"
            value.write_bytes(b"v" * 500)
            debugfs(path, f"ea_set -f {value} /few/name user.long")
            run("e2fsck", "-fyD", str(path))
            assert run("e2fsck", "-fn", str(path)), name
            made[name] = Image(path)
        return made[name]

    yield image
    shutil.rmtree(folder)


def check_structure(raw: bytes, ok: Callable[[Any], bool], seal: Callable[[bytearray], object],
                    field: slice, ignored: range = range(0)) -> None:
    """``ok`` accepts ``raw`` in every type of buffer, no turned bit; ``seal`` restores the checksum ``field``."""
    assert ok(raw) and ok(memoryview(raw)) and ok(bytearray(raw))
    seed = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 32)))
    print("FUSEWIRE_SEED =", seed)
    chosen = random.Random(seed)
    for _ in range(40):
        broken, bit = bytearray(raw), chosen.randrange(8 * len(raw))
        broken[bit // 8] ^= 1 << bit % 8
        assert ok(broken) == (bit // 8 in ignored), bit
    erased = bytearray(raw)
    erased[field] = b"\xa5" * len(raw[field])
    seal(erased)
    assert bytes(erased) == raw
    for length in (0, 1, 2, 3, 4, 7, 8, 11, 12, 16, 31, 33, 127, 129, len(raw) - 1):
        if length < len(raw):
            assert ok(raw[:length]) is False


# ---- known answers ---------------------------------------------------------------------------------------------

def test_crc32c_is_the_bare_register() -> None:
    """The published check value of CRC-32C over "123456789" is E3069283, with both ends inverted."""
    assert checksum.crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF == 0xE3069283
    assert checksum.crc32c(checksum.crc32c(7, b"1234"), b"56789") == checksum.crc32c(7, b"123456789")
    assert checksum.crc32c(0x1234, b"") == 0x1234


def test_crc16_check_values() -> None:
    """CRC-16/ARC starts from 0 and gives BB3D, CRC-16/MODBUS from ones and gives 4B37."""
    assert checksum.crc16_python(0, b"123456789") == 0xBB3D
    assert checksum.crc16_python(0xFFFF, b"123456789") == 0x4B37


def test_crc32_be_check_values() -> None:
    """CRC-32/MPEG-2 starts from ones and gives 0376E6E7."""
    assert checksum.crc32_be(0xFFFFFFFF, b"123456789") == 0x0376E6E7
    assert checksum.crc32_be(checksum.crc32_be(0xFFFFFFFF, b"1234"), b"56789") == 0x0376E6E7


# ---- the file system ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", WITH_METADATA_CSUM)
def test_superblock(name: str, image_of: Callable[[str], Image]) -> None:
    check_structure(image_of(name).super, checksum.superblock_ok, checksum.seal_superblock, slice(1020, 1024))


@pytest.mark.parametrize("name", WITH_METADATA_CSUM)
def test_group_descriptors(name: str, image_of: Callable[[str], Image]) -> None:
    image = image_of(name)
    for group in range(image.groups):
        check_structure(image.desc(group),
                        lambda raw, group=group: checksum.group_desc_ok(raw, group, image.seed),
                        lambda raw, group=group: checksum.seal_group_desc(raw, group, image.seed), slice(0x1E, 0x20))
        assert not checksum.group_desc_ok(image.desc(group), group + 1, image.seed)


@pytest.mark.parametrize("name", ["uninit_bg", "uninit_bg64"])
def test_group_descriptors_crc16(name: str, image_of: Callable[[str], Image]) -> None:
    image = image_of(name)
    assert image.groups > 1
    for group in range(image.groups):
        check_structure(image.desc(group),
                        lambda raw, group=group: checksum.group_desc_crc16_ok(raw, group, image.uuid),
                        lambda raw, group=group: checksum.seal_group_desc_crc16(raw, group, image.uuid),
                        slice(0x1E, 0x20))
        assert not checksum.group_desc_crc16_ok(image.desc(group), group + 1, image.uuid)


@pytest.mark.parametrize("name", WITH_METADATA_CSUM)
@pytest.mark.parametrize("which", ["block", "inode"])
def test_bitmaps(name: str, which: str, image_of: Callable[[str], Image]) -> None:
    image = image_of(name)
    ok = getattr(checksum, f"{which}_bitmap_ok")
    seal = getattr(checksum, f"seal_{which}_bitmap")
    bits = image.clusters_per_group if which == "block" else image.inodes_per_group
    index, uninitialised, low, high = (0, 2, 0x18, 0x38) if which == "block" else (1, 1, 0x1A, 0x3A)
    seen = 0
    for group in range(image.groups):
        desc, bitmap = image.desc(group), image.bitmap_block(group, index)
        if struct.unpack_from("<H", desc, 0x12)[0] & uninitialised:
            continue
        seen += 1
        assert ok(bitmap, bits, desc, image.seed) and ok(memoryview(bitmap), bits, memoryview(desc), image.seed)
        broken = bytearray(bitmap)
        broken[(bits - 1) // 8] ^= 0x80
        assert not ok(broken, bits, desc, image.seed)
        sealed = bytearray(desc)
        sealed[low:low + 2] = b"\xa5\xa5"
        if len(desc) >= 64:
            sealed[high:high + 2] = b"\xa5\xa5"
        assert not ok(bitmap, bits, sealed, image.seed)
        seal(bitmap, bits, sealed, image.seed)
        assert bytes(sealed) == desc
        assert not ok(bitmap, bits, desc[:31], image.seed)
    assert seen


# ---- inodes and their blocks -----------------------------------------------------------------------------------------

def inode_fields(raw: bytes) -> list[slice]:
    return [slice(0x7C, 0x7E), slice(0x82, 0x84)] if len(raw) > 128 else [slice(0x7C, 0x7E)]


@pytest.mark.parametrize("name", WITH_METADATA_CSUM)
def test_inodes(name: str, image_of: Callable[[str], Image]) -> None:
    image, seen, alike = image_of(name), 0, 0
    for number in image.inodes_in_use():
        raw = image.inode(number)
        if number <= 10 and not raw[:2].strip(b"\0"):
            continue  # reserved inodes not in use are all zero, checksum and all
        assert checksum.inode_ok(raw, number, image.seed), number
        alike += checksum.inode_ok(raw, number + 1, image.seed)
        for field in inode_fields(raw):
            sealed = bytearray(raw)
            sealed[field] = bytes(byte ^ 0xFF for byte in raw[field])
            assert not checksum.inode_ok(sealed, number, image.seed)
            checksum.seal_inode(sealed, number, image.seed)
            assert bytes(sealed) == raw
        seen += 1
    assert seen > 1300 and alike <= 2  # of 65,536 sums of 16 bits one is right by chance
    check_structure(image.inode(2), lambda raw: checksum.inode_ok(raw, 2, image.seed),
                    lambda raw: checksum.seal_inode(raw, 2, image.seed), slice(0x7C, 0x7E))


def test_inode_whose_extra_fields_end_before_the_high_half() -> None:
    """With extra_isize 0 the bytes at 0x82 are ordinary ones, covered by 16 bits of checksum."""
    raw = bytearray(random.Random(5).randbytes(256))
    raw[0x80:0x82] = b"\0\0"
    checksum.seal_inode(raw, 12, 77)
    assert checksum.inode_ok(raw, 12, 77)
    raw[0x82] ^= 1
    assert not checksum.inode_ok(raw, 12, 77)


def inode_named(image: Image, path: str) -> int:
    match = re.search(r"Inode: (\d+)", run("debugfs", "-R", f"stat {path}", str(image.path)))
    assert match
    return int(match[1])


@pytest.mark.parametrize("name", WITH_METADATA_CSUM)
def test_extent_blocks(name: str, image_of: Callable[[str], Image]) -> None:
    image = image_of(name)
    number = inode_named(image, "/sparse")
    seed = image.seed_of_inode(number)
    nodes, _ = image.mapped(number)
    assert nodes
    for node in nodes:
        at = 12 + 12 * struct.unpack_from("<H", node, 4)[0]
        check_structure(node, lambda raw: checksum.extent_block_ok(raw, seed),
                        lambda raw: checksum.seal_extent_block(raw, seed),
                        slice(at, at + 4), range(at + 4, image.block_bytes))


@pytest.mark.parametrize("name", WITH_METADATA_CSUM)
def test_directory_blocks_and_hash_tree_nodes(name: str, image_of: Callable[[str], Image]) -> None:
    image = image_of(name)
    kinds = set()
    for path in ("/", "/few", "/many"):
        number = inode_named(image, path)
        seed = image.seed_of_inode(number)
        hashed = struct.unpack_from("<I", image.inode(number), 0x20)[0] & HASHED_FLAG
        for index, block in enumerate(image.mapped(number)[1]):
            kinds.add(check_directory_block(image.block(block), seed, bool(hashed), index))
    assert kinds == {"leaf", "root", "node"} if image.block_bytes == 1024 else {"leaf", "root"} <= kinds


def check_directory_block(raw: bytes, seed: int, hashed: bool, index: int) -> str:
    if hashed and (index == 0 or struct.unpack_from("<IH", raw) == (0, len(raw))):
        offset = 32 if index == 0 else 8
        limit, count = struct.unpack_from("<HH", raw, offset)
        unused, tail = offset + 8 * count, offset + 8 * limit
        check_structure(raw[:tail + 8], lambda raw: checksum.htree_node_ok(raw, seed, offset),
                        lambda raw: checksum.seal_htree_node(raw, seed, offset),
                        slice(tail + 4, tail + 8), range(unused, tail))
        assert not checksum.dir_block_has_tail(raw)
        return "node" if index else "root"
    assert checksum.dir_block_has_tail(raw)
    check_structure(raw, lambda raw: checksum.dir_block_ok(raw, seed),
                    lambda raw: checksum.seal_dir_block(raw, seed), slice(-12, None))
    return "leaf"


def test_hash_tree_node_with_absurd_counts() -> None:
    for limit, count in ((0xFFFF, 1), (1, 2), (0, 0), (126, 126), (127, 1)):
        raw = struct.pack("<IHBB", 0, 1024, 0, 0) + struct.pack("<HH", limit, count) + bytes(1012)
        assert checksum.htree_node_ok(raw, 1, 8) is False
    for offset in (-1, 1021, 1024, 1 << 40):
        assert checksum.htree_node_ok(bytes(1024), 1, offset) is False


@pytest.mark.parametrize("name", WITH_METADATA_CSUM)
def test_attribute_block(name: str, image_of: Callable[[str], Image]) -> None:
    image = image_of(name)
    inode = image.inode(inode_named(image, "/few/name"))
    block = struct.unpack_from("<I", inode, 0x68)[0]
    if image.inode_bytes == 1024:
        assert block == 0  # the value fits into such an inode
        return
    check_structure(image.block(block), lambda raw: checksum.xattr_block_ok(raw, block, image.seed),
                    lambda raw: checksum.seal_xattr_block(raw, block, image.seed), slice(16, 20))
    assert not checksum.xattr_block_ok(image.block(block), block + 1, image.seed)


def test_mmp_block(image_of: Callable[[str], Image]) -> None:
    image = image_of("seed")
    raw = image.block(struct.unpack_from("<Q", image.super, 0x168)[0])[:1024]
    check_structure(raw, lambda raw: checksum.mmp_ok(raw, image.seed),
                    lambda raw: checksum.seal_mmp(raw, image.seed), slice(1020, 1024))


@pytest.mark.parametrize("name", ["seed", "blocks4k"])
def test_orphan_file_blocks(name: str, image_of: Callable[[str], Image]) -> None:
    image = image_of(name)
    number = image.u32(0x280)
    seed, (_, blocks) = image.seed_of_inode(number), image.mapped(number)
    assert blocks
    for block in blocks[:4]:
        check_structure(image.block(block), lambda raw, block=block: checksum.orphan_block_ok(raw, block, seed),
                        lambda raw, block=block: checksum.seal_orphan_block(raw, block, seed), slice(-8, None))


# ---- the journal ---------------------------------------------------------------------------------------------------

def journal_of(image_of: Callable[[str], Image], tmp_path: Path, version: int) -> tuple[Image, list[bytes]]:
    """An image whose journal holds a transaction of two blocks, then one that revokes a block, and that journal."""
    path, source = tmp_path / "journal", tmp_path / "source"
    shutil.copy(image_of("metadata_csum").path, path)
    source.write_bytes(random.Random(3).randbytes(1024) + struct.pack(">I", 0xC03B3998) + bytes(1020))
    debugfs(path, f"jo -c -v {version}", f"jw -b 40000,40001 {source}", "jw -r 40002", "jc")
    image = Image(path)
    return image, [image.block(block) for block in image.mapped(8)[1][:7]]


@pytest.mark.parametrize("version", [2, 3])
def test_journal_blocks(version: int, image_of: Callable[[str], Image], tmp_path: Path) -> None:
    _, journal = journal_of(image_of, tmp_path, version)
    seed = checksum.seed_of(journal[0][0x30:0x40])
    check_structure(journal[0], checksum.journal_superblock_ok, checksum.seal_journal_superblock, slice(0xFC, 0x100))
    found = set()
    for block in journal[1:]:
        magic, kind = struct.unpack_from(">II", block)
        if magic == 0xC03B3998 and kind in (1, 5):
            check_structure(block, lambda raw: checksum.journal_tail_ok(raw, seed),
                            lambda raw: checksum.seal_journal_tail(raw, seed), slice(-4, None))
            found.add(kind)
        elif magic == 0xC03B3998 and kind == 2:
            check_structure(block, lambda raw: checksum.journal_commit_ok(raw, seed),
                            lambda raw: checksum.seal_journal_commit(raw, seed), slice(16, 20))
            found.add(kind)
    assert found == {1, 2, 5}
    check_journal_data(version, journal, seed)


def check_journal_data(version: int, journal: list[bytes], seed: int) -> None:
    """The tags of the descriptor in block 1 of the journal against blocks 2 and 3, of which the second is escaped."""
    sequence = struct.unpack_from(">I", journal[1], 8)[0]
    sums = [checksum.journal_data(block, sequence, seed) for block in journal[2:4]]
    assert journal[3][:4] == bytes(4)
    features = struct.unpack_from(">I", journal[0], 0x28)[0]
    if version == 3:  # tags of 16 bytes; the first is followed by a UUID of 16
        stored = [struct.unpack_from(">I", journal[1], 12 + at + 12)[0] for at in (0, 32)]
        assert stored == sums
    else:  # tags of 8, of 12 with 64-bit block numbers, checksum in bytes 4–5, the tag 2 bytes longer
        size = 8 + (4 if features & 2 else 0) + 2
        stored = [struct.unpack_from(">H", journal[1], 12 + at + 4)[0] for at in (0, size + 16)]
        assert stored == [value & 0xFFFF for value in sums]


def test_journal_version_1(mounts: None, image_of: Callable[[str], Image], tmp_path: Path) -> None:
    """The kernel writes it where metadata_csum is off and the option journal_checksum is on."""
    path, live = tmp_path / "v1", tmp_path / "live"
    shutil.copy(image_of("uninit_bg").path, path)
    with kernel_mount(path, "rw,journal_checksum") as mounted:
        (mounted.root / "new").mkdir()
        sync_directory(mounted.root)
        shutil.copy(path, live)
    image = Image(live)
    journal = [image.block(block) for block in image.mapped(8)[1]]
    assert check_commits_v1(journal) > 0


def check_commits_v1(journal: list[bytes]) -> int:
    """The commits whose checksum is right; a transaction is what lies between the one before and its commit."""
    running, commits = 0xFFFFFFFF, 0
    for block in journal[1:]:
        magic, kind = struct.unpack_from(">II", block)
        if magic == 0xC03B3998 and kind == 2:
            method, size, stored = struct.unpack_from(">BB2xI", block, 12)
            assert (method, size, stored) == (1, 4, running)
            running, commits = 0xFFFFFFFF, commits + 1
        elif magic == 0xC03B3998 or commits == 0 or running != 0xFFFFFFFF:
            running = checksum.journal_commit_v1(running, block)
        else:
            break
    return commits


def sync_directory(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
