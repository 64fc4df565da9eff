"""The compiled twins against the pure functions that they stand in for: same results and errors, no byte out of bounds.

If fusewire was installed without a compiler, the extension is compiled here for these tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fusewire import accel, accel_build
from fusewire.ext4 import checksum, dirblock, dirhash
from fusewire.ext4.errors import Check, Corrupt
from tests.conftest import require

NAME = "fusewire._accel"
INODES = 5000


def random_source() -> random.Random:
    seed = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 32)))
    print("FUSEWIRE_SEED =", seed)
    return random.Random(seed)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """``fusewire.accel`` with its extension, which is compiled from ``accel_build`` even where one is installed."""
    require([] if shutil.which("gcc") else ["a C compiler (Debian package gcc)"])
    before = sys.modules.pop(NAME, None)
    path = accel_build.ffi.compile(tmpdir=str(tmp_path_factory.mktemp("accel")))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop(NAME, None)  # where loading an extension puts it
    if before is not None:
        sys.modules[NAME] = before
    with reloaded(module):
        assert accel.AVAILABLE
        yield accel
    assert sys.modules.get(NAME) is before


class reloaded:
    """``fusewire.accel`` as it is imported where the extension is ``module``; None: where there is none."""

    def __init__(self, module: ModuleType | None) -> None:
        self.module = module

    def __enter__(self) -> None:
        accel.remove()
        self.before = {NAME: sys.modules[NAME]} if NAME in sys.modules else {}
        sys.modules[NAME] = self.module  # type: ignore[assignment]
        self.attribute = vars(sys.modules["fusewire"]).pop("_accel", None)
        importlib.reload(accel)

    def __exit__(self, *_: object) -> None:
        accel.remove()
        del sys.modules[NAME]
        sys.modules.update(self.before)
        if self.attribute is not None:
            sys.modules["fusewire"]._accel = self.attribute  # type: ignore[attr-defined]
        importlib.reload(accel)


@pytest.fixture(params=["python", "compiled"])
def installed(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test with it runs twice: with the pure functions and with their twins in place."""
    if request.param == "compiled":
        assert request.getfixturevalue("compiled").install()
    yield request.param
    accel.remove()


def file_system(typed: bool = True, inodes: int = INODES) -> SimpleNamespace:
    return SimpleNamespace(geometry=SimpleNamespace(inodes=inodes), has_file_types=typed)


def entry(inode: int, name: bytes, kind: int = 1, length: int = 0) -> bytes:
    """One record, ``length`` bytes long if given."""
    size = length or -(-(8 + len(name)) // 4) * 4
    stored = size & 0xFFFC | size >> 16  # how 64 KiB blocks store it; the same for all that is shorter
    return struct.pack("<IHBB", inode, stored, len(name), kind) + name + bytes(size - 8 - len(name))


def block_of(size: int, *entries: bytes) -> bytes:
    """The entries, the last record made to reach the end of the block."""
    used = b"".join(entries)
    return used + entry(0, b"", 0, size - len(used))


# ---- choosing -----------------------------------------------------------------------------------------------------

def test_install_puts_every_twin_in_place(compiled: ModuleType) -> None:
    pure = (dirhash.compute_python, checksum.crc16_python)
    before = dirblock.decode
    assert compiled.install() and compiled.install()
    assert (dirhash.compute, checksum.crc16, dirblock.decode) == (compiled.compute, compiled.crc16, compiled.decode)
    compiled.remove()
    assert (dirhash.compute, checksum.crc16) == pure and dirblock.decode is before


def test_without_the_extension_nothing_changes() -> None:
    with reloaded(None):
        decode = dirblock.decode
        assert not accel.AVAILABLE and not accel.install()
        assert dirhash.compute is dirhash.compute_python and checksum.crc16 is checksum.crc16_python
        assert dirblock.decode is decode


# ---- hashes and sums -----------------------------------------------------------------------------------------------

def test_hash_of_known_names(installed: str) -> None:
    """Values printed by debugfs's dx_hash, without a seed."""
    known = {(b"README", 0): (0x8B540988, 0), (b"README", 1): (0xA26F97CE, 0xE558C2DF),
             (b"README", 2): (0x44DCFC82, 0xDE4021CE),
             (b"caf\xc3\xa9", 1): (0xFB9C5E5C, 0x0573E8B8), (b"caf\xc3\xa9", 4): (0x9D72AED6, 0xF6138C6A)}
    assert {key: dirhash.dirhash(*key, bytes(16)) for key in known} == known


def test_hashes_are_the_same(compiled: ModuleType) -> None:
    chosen = random_source()
    for length in [*range(256), 300, 1000, 4096]:  # a folded name may be longer than a name
        for alphabet in (range(0x20, 0x7F), range(256)):
            name = bytes(chosen.choice(alphabet) for _ in range(length))
            start = tuple(chosen.getrandbits(32) for _ in range(4))
            for version in range(6):
                assert compiled.compute(name, version, start) == dirhash.compute_python(name, version, start)


def test_crc16_check_value(installed: str) -> None:
    assert checksum.crc16(0, b"123456789") == 0xBB3D
    assert checksum.crc16(0xFFFF, b"123456789") == 0x4B37


def test_crc16_is_the_same(compiled: ModuleType) -> None:
    chosen = random_source()
    for length in (*range(100), 1000):
        data, seed = chosen.randbytes(length), chosen.getrandbits(16)
        for buffer in (data, bytearray(data), memoryview(data)):
            assert compiled.crc16(seed, buffer) == checksum.crc16_python(seed, data)


# ---- directory blocks ------------------------------------------------------------------------------------------------

def test_entries_of_a_block(installed: str) -> None:
    block = block_of(1024, entry(2, b".", 2), entry(2, b"..", 2), entry(0, b"gone"), entry(12, b"n" * 255, 7),
                     entry(13, b"file", 1), entry(14, b"\xff", 200))
    found = dirblock.decode(file_system(), block, encrypted=False, base=4096)
    assert found.entries == [
        dirblock.Entry(4108, 2, 4, b"."), dirblock.Entry(4120, 2, 4, b".."), dirblock.Entry(4396, 12, 10, b"n" * 255),
        dirblock.Entry(4408, 13, 8, b"file"), dirblock.Entry(4420, 14, 0, b"\xff")]
    assert found.names[b"file"] is found.entries[3] and found.alias is None
    untyped = dirblock.decode(file_system(typed=False), block, encrypted=False)
    assert [each.d_type for each in untyped.entries] == [0] * 5


def test_a_block_of_64_kib(installed: str) -> None:
    """Record lengths of 65536 do not fit 16 bits; two stand-ins mean the whole block."""
    whole = [struct.pack("<IHBB", 12, length, 4, 1) + b"name" + bytes(65524) for length in (0, 65535)]
    for block in whole:
        assert dirblock.decode(file_system(), block, encrypted=False).entries == [dirblock.Entry(65536, 12, 8, b"name")]
    block = block_of(65536, *(entry(number + 1, b"%04d" % number) for number in range(4000)))
    assert len(dirblock.decode(file_system(), block, encrypted=False).entries) == 4000


BAD_BLOCKS = {
    "record of 8 bytes": (entry(12, b"a", length=12)[:4] + b"\x08\0" + bytes(1018), Check.DIRENT_LENGTH),
    "record of 0 bytes": (bytes(1024), Check.DIRENT_LENGTH),
    "unaligned record": (struct.pack("<IHBB", 12, 1023, 1, 1) + bytes(1016), Check.DIRENT_LENGTH),
    "record past the end": (struct.pack("<IHBB", 12, 1028, 1, 1) + bytes(1016), Check.DIRENT_LENGTH),
    "name past its record": (struct.pack("<IHBB", 12, 12, 5, 1) + bytes(1016), Check.DIRENT_LENGTH),
    "end inside a head": (entry(12, b"a", length=1020) + bytes(4), Check.DIRENT_LENGTH),
    "inode too large": (block_of(1024, entry(INODES + 1, b"a")), Check.DIRENT_INODE),
    "inode of ones": (block_of(1024, entry(0xFFFFFFFF, b"a")), Check.DIRENT_INODE),
    "empty name": (block_of(1024, entry(12, b"", length=12)), Check.DIRENT_NAME),
    "slash": (block_of(1024, entry(12, b"a/b")), Check.DIRENT_NAME),
    "NUL": (block_of(1024, entry(12, b"a\0b")), Check.DIRENT_NAME),
}


@pytest.mark.parametrize("case", BAD_BLOCKS)
def test_bad_blocks(case: str, installed: str) -> None:
    block, check = BAD_BLOCKS[case]
    with pytest.raises(Corrupt) as caught:
        dirblock.decode(file_system(), block, encrypted=False, inode=77)
    assert caught.value.check is check and caught.value.where["inode"] == 77
    if case in ("slash", "NUL"):
        assert len(dirblock.decode(file_system(), block, encrypted=True).entries) == 1


def outcome(decode: Callable[..., dirblock.DirBlock], block: bytes, encrypted: bool, typed: bool) -> object:
    try:
        return decode(file_system(typed), block, encrypted=encrypted, base=1 << 33, inode=3).entries
    except Corrupt as error:
        return error.check, error.where


def random_block(chosen: random.Random) -> bytes:
    """A sound block with some bytes changed, or none, or cut off."""
    size = chosen.choice([56, 1024, 1024, 2048, 4096, 65536])
    records, used = [], 0
    while used < size - 300 and len(records) < 60:
        name = chosen.randbytes(chosen.choice([1, 2, 8, 60, 255])).replace(b"/", b"x").replace(b"\0", b"y")
        records.append(entry(chosen.choice([0, 1, 12, INODES]), name, chosen.randrange(9)))
        used += len(records[-1])
    block = bytearray(block_of(size, *records))
    for _ in range(chosen.choice([0, 1, 1, 4])):
        block[chosen.randrange(used or 8)] = chosen.choice([0, 1, 4, 8, 12, 0x2F, 0xFF, chosen.randrange(256)])
    return bytes(block[:chosen.choice([size, size, size, chosen.randrange(size)])])


def test_outcomes_are_the_same(compiled: ModuleType) -> None:
    chosen, sound, broken = random_source(), 0, 0
    for _ in range(3000):
        block, encrypted, typed = random_block(chosen), chosen.random() < 0.3, chosen.random() < 0.8
        expected = outcome(dirblock.decode, block, encrypted, typed)
        assert outcome(compiled.decode, block, encrypted, typed) == expected
        sound, broken = sound + isinstance(expected, list), broken + isinstance(expected, tuple)
    assert sound > 500 and broken > 500


def test_entries_with_hashes_are_left_to_the_pure_function(compiled: ModuleType,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Casefolded and encrypted directories: too rare for C."""
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(compiled, "_decode_python", lambda fs, data, **particulars: asked.append(particulars))
    block = block_of(1024, entry(12, b"name"))
    compiled.decode(file_system(), block, encrypted=True, hashed=True, base=5, inode=3)
    assert asked == [{"encrypted": True, "hashed": True, "base": 5, "inode": 3}]
    assert len(compiled.decode(file_system(), block, encrypted=True, hashed=False).entries) == 1
    assert len(asked) == 1


DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
int main(void)
{
    uint32_t size;
    uint64_t sum = 0;
    while (fread(&size, 4, 1, stdin) == 1) {
        uint8_t *block = malloc(size ? size : 1);   /* of the very size, so that every byte beyond it is poisoned */
        if (fread(block, 1, size, stdin) != size)
            return 2;
        for (size_t room = 0; room <= size / 12 + 1; room = room * 2 + 1) {
            fw_entry *out = malloc((room ? room : 1) * sizeof *out);
            sum += (uint64_t)fw_entries(block, size, 5000, (int)(room & 1), out, room);
            free(out);
        }
        for (int version = 0; version < 6; version++)
            sum += fw_dirhash(block, size < 300 ? size : 300, version, 1, 2, 3, 4);
        sum += fw_crc16(0xffff, block, size);
        free(block);
    }
    printf("%llu\n", (unsigned long long)sum);
    return 0;
}
"""


def test_no_byte_out_of_bounds(tmp_path: Path) -> None:
    """The same C under the address and undefined behaviour sanitizers, over random and broken blocks."""
    require([] if shutil.which("gcc") else ["a C compiler (Debian package gcc)"])
    (tmp_path / "driver.c").write_text(accel_build.SOURCE + DRIVER)
    subprocess.run(["gcc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
                    "-fno-sanitize-recover=all", "-o", "driver", "driver.c"], cwd=tmp_path, check=True)
    chosen = random_source()
    blocks = [random_block(chosen) for _ in range(1500)] + [bytes(length) for length in range(20)]
    stream = b"".join(struct.pack("=I", len(block)) + block for block in blocks)
    done = subprocess.run([tmp_path / "driver"], input=stream, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) > 0


def test_a_helper_of_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        FW_DIGEST = 1

    monkeypatch.setattr(accel, "_lib", Old())
    assert not accel._is_current()
