"""Directory hashes against debugfs, name by name, and against the hash trees that the kernel builds."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire.ext4 import dirhash
from tests.mounting import kernel_mount

VERSIONS = ("legacy", "half_md4", "tea", "legacy_unsigned", "half_md4_unsigned", "tea_unsigned")
SAFE = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+"  # of what debugfs takes as it stands
HIGH = bytes(range(0x80, 0x100))
UNSIGNED_FLAG = 2


def random_names(count: int) -> list[bytes]:
    seed = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 32)))
    print("FUSEWIRE_SEED =", seed)
    chosen = random.Random(seed)
    return [b"x" + bytes(chosen.choice(SAFE if chosen.random() < 0.7 else HIGH) for _ in range(chosen.randrange(255)))
            for _ in range(count)]


def every_length() -> list[bytes]:
    return [(SAFE[length % 60:] + HIGH + SAFE * 3)[:length] for length in range(1, 256)]


def debugfs_hashes(names: list[bytes], version: int, seed: uuid.UUID | None) -> list[tuple[int, int]]:
    """debugfs's answers; it takes a version as a number too, which makes the signedness of its own char irrelevant."""
    option = b"-s " + str(seed).encode() if seed else b""
    requests = b"".join(b"dx_hash -h %d %s %s\n" % (version, option, name) for name in names)
    done = subprocess.run(["debugfs", "-f", "-"], input=requests, capture_output=True, check=True)
    answers = [line.rsplit(b" is ", 1)[1] for line in done.stdout.split(b"\n") if line.startswith(b"Hash of ")]
    return [(int(words[0], 16), int(words[2].rstrip(b")"), 16)) for words in map(bytes.split, answers)]


@pytest.mark.parametrize("seed", [None, uuid.UUID("01234567-89ab-cdef-fedc-ba9876543210")], ids=["default", "seeded"])
@pytest.mark.parametrize("version", range(6), ids=VERSIONS)
def test_every_version_is_debugfs(version: int, seed: uuid.UUID | None) -> None:
    names = random_names(200) + every_length()
    expected = debugfs_hashes(names, version, seed)
    assert len(expected) == len(names)
    words = seed.bytes if seed else bytes(16)
    assert [dirhash.dirhash(name, version, words) for name in names] == expected


def test_seed_as_words_and_as_bytes() -> None:
    raw = bytes(range(16))
    words = struct.unpack("<4I", raw)
    assert dirhash.dirhash(b"name", dirhash.TEA, raw) == dirhash.dirhash(b"name", dirhash.TEA, words)
    assert dirhash.dirhash(b"name", dirhash.TEA, raw) != dirhash.dirhash(b"name", dirhash.TEA, bytes(16))
    assert dirhash.dirhash(b"name", 1, (0, 0, 0, 0)) == dirhash.dirhash(b"name", 1, bytes(16))


@pytest.mark.parametrize("version", [-1, 6, 7, 255])
def test_versions_without_formula(version: int) -> None:
    with pytest.raises(ValueError, match="cannot be computed"):
        dirhash.dirhash(b"name", version, bytes(16))


def test_end_mark_is_never_a_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    for raw, expected in ((0xFFFFFFFE, 0xFFFFFFFC), (0xFFFFFFFF, 0xFFFFFFFC), (0xFFFFFFFD, 0xFFFFFFFC), (3, 2), (0, 0)):
        monkeypatch.setattr(dirhash, "compute", lambda *_, raw=raw: (raw, 9))
        assert dirhash.dirhash(b"name", 1, bytes(16)) == (expected, 9)


@pytest.mark.parametrize(("version", "flags", "expected"), [
    (0, 1, 0), (1, 1, 1), (2, 0, 2), (0, 2, 3), (1, 2, 4), (2, 3, 5), (4, 2, 4), (6, 2, 6)])
def test_unsigned_version(version: int, flags: int, expected: int) -> None:
    assert dirhash.unsigned_version(version, flags) == expected


# ---- the kernel's trees ----------------------------------------------------------------------------------------

def tree_ranges(raw: bytes, block_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """(first hash, hash after the last, leaf block) of a hash tree with one level of nodes below its root at most."""
    levels = raw[30]
    nodes = node_entries(raw[:block_bytes], 32, 1 << 32)
    for _ in range(levels):
        nodes = [entry for low, high, block in nodes
                 for entry in node_entries(raw[block * block_bytes:(block + 1) * block_bytes], 8, high, low)]
    for low, high, block in nodes:
        yield low, high, raw[block * block_bytes:(block + 1) * block_bytes]


def node_entries(raw: bytes, offset: int, end: int, start: int = 0) -> list[tuple[int, int, int]]:
    count = struct.unpack_from("<H", raw, offset + 2)[0]
    entries = [struct.unpack_from("<II", raw, offset + 8 * index) for index in range(count)]
    lows = [start, *(low for low, _ in entries[1:]), end]
    return [(lows[index], lows[index + 1], block) for index, (_, block) in enumerate(entries)]


def leaf_names(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        inode, length, name_length = struct.unpack_from("<IHB", raw, at)
        if inode:
            yield raw[at + 8:at + 8 + name_length]
        at += length


def write_directory(path: Path, names: set[bytes], version: str, flags: int) -> bytes:
    """The directory's blocks, with a tree that the kernel built under a hash version and signedness."""
    with open(path, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-N", "4096", str(path)], check=True)
    subprocess.run(["tune2fs", "-E", f"hash_alg={version}", str(path)], check=True, capture_output=True)
    subprocess.run(["debugfs", "-w", "-R", f"ssv flags {flags}", str(path)], check=True, capture_output=True)
    with kernel_mount(path, "rw") as mounted:
        folder = os.fsencode(mounted.root / "names")
        os.mkdir(folder)
        for name in names:
            os.mknod(os.path.join(folder, name))
    done = subprocess.run(["debugfs", "-R", "cat /names", str(path)], check=True, capture_output=True)
    return done.stdout


@pytest.mark.parametrize("flags", [1, UNSIGNED_FLAG], ids=["signed", "unsigned"])
@pytest.mark.parametrize("version", range(3), ids=VERSIONS[:3])
def test_kernels_trees_are_in_this_order(version: int, flags: int, mounts: None, tmp_path: Path) -> None:
    names = set(random_names(1500))
    raw = write_directory(tmp_path / "image", names, VERSIONS[version], flags)
    super_block = (tmp_path / "image").read_bytes()[1024:2048]
    assert super_block[0xFC] == raw[28] == version
    seed = super_block[0xEC:0xFC]
    wanted = dirhash.unsigned_version(version, struct.unpack_from("<I", super_block, 0x160)[0])
    seen, wrong_signedness = set(), 0
    for low, high, leaf in tree_ranges(raw, 1024):
        for name in leaf_names(leaf):
            seen.add(name)
            # A low bit set in a bound says that names of that very hash may stand on both sides of it.
            assert low & ~1 <= dirhash.dirhash(name, wanted, seed)[0] < high + (high & 1)
            wrong_signedness += not low & ~1 <= dirhash.dirhash(name, (wanted + 3) % 6, seed)[0] < high
    assert seen == names
    assert wrong_signedness > 100
