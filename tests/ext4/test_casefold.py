"""Folded names against e2fsprogs' own Unicode 12.1 tables, seen through the hashes that debugfs and e2fsck compute."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import unicodedata
from pathlib import Path

import pytest

from fusewire.ext4.casefold import fold, hashed_form, same_name
from fusewire.ext4.dirhash import HALF_MD4, dirhash

CASEFOLD_FLAG, HASHED_FLAG = 0x40000000, 0x1000
SURROGATES = range(0xD800, 0xE000)
CODE_POINTS = [number for number in range(0x80, 0x110000) if number not in SURROGATES]
MARKS = [number for number in CODE_POINTS if unicodedata.combining(chr(number))]
CHANGING = [number for number in CODE_POINTS
            if unicodedata.normalize("NFD", chr(number).casefold()) != chr(number)]
IGNORABLES = [0xAD, 0x34F, 0x115F, 0x180B, 0x200B, 0x200D, 0x2065, 0xFE0F, 0xFEFF, 0xE0001, 0xE0FFF]
SPECIAL = [ord(letter) for letter in "İıſKÅΣσςßẞﬀﬁŉǰΐΰᾳᾼꭰᏸ각힣가각\u0345"]
LATER = [0x180F, 0x8BE, 0x1ABF, 0x1DFA, 0x2C2F, 0x2C5F, 0xA7C7, 0xA7D0, 0xA7F5, 0x10570, 0x11938, 0x16D40, 0x1FAE0,
         0x1F6D6, 0x30000, 0x31350, 0x1E4EC, 0x1E08F, 0x10D50]  # assigned by Unicode 13 to 16
POOLS = [MARKS, MARKS, CHANGING, CODE_POINTS, IGNORABLES, SPECIAL, LATER, range(0xAC00, 0xD7A4), range(0x41, 0x7B)]


def random_source() -> random.Random:
    seed = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 32)))
    print("FUSEWIRE_SEED =", seed)
    return random.Random(seed)


def random_name(chosen: random.Random) -> bytes:
    text = "".join(chr(chosen.choice(chosen.choice(POOLS))) for _ in range(chosen.randint(1, 14)))
    return ("x" + text).encode().replace(b"\\", b"/").replace(b"/", b"b")


def debugfs_hashes(names: list[bytes]) -> list[tuple[int, int] | None]:
    """Half MD4 of each folded name; None where debugfs refuses to fold it."""
    requests = b"".join(b"dx_hash -h half_md4 -c -e utf8 %s\n" % name for name in names)
    done = subprocess.run(["debugfs", "-f", "-"], input=requests, capture_output=True, check=True)
    found: list[tuple[int, int] | None] = []
    for line in done.stdout.split(b"\n"):
        if line.startswith(b"debugfs: "):
            found.append(None)
        elif line.startswith(b"Hash of "):
            words = line.rsplit(b" is ", 1)[1].split()
            found[-1] = int(words[0], 16), int(words[2].rstrip(b")"), 16)
    return found


def our_hash(name: bytes) -> tuple[int, int] | None:
    folded = fold(name)
    return None if folded is None else dirhash(folded, HALF_MD4, bytes(16))


def test_every_code_point() -> None:
    """All 1,111,936 above ASCII, 40 to a name, each behind a letter that ends what came before."""
    names = ["".join(f"x{number:c}" for number in CODE_POINTS[at:at + 40]).encode()
             for at in range(0, len(CODE_POINTS), 40)]
    expected = debugfs_hashes(names)
    assert len(expected) == len(names)
    assert [name for name, theirs in zip(names, expected, strict=True) if our_hash(name) != theirs] == []


def test_sequences() -> None:
    """Marks in any order, across characters that vanish, fold, decompose, or were assigned after 12.1."""
    chosen = random_source()
    names = [random_name(chosen) for _ in range(20_000)]
    expected = debugfs_hashes(names)
    assert len(expected) == len(names)
    assert [name for name, theirs in zip(names, expected, strict=True) if our_hash(name) != theirs] == []


def test_bytes_that_are_not_utf8() -> None:
    """Refused like there; a stray continuation byte is let through like there."""
    chosen, broken = random_source(), 0
    names = [b"x\xc0\x80", b"x\xc1\xbf", b"x\xe0\x9f\xbf", b"x\xed\xa0\x80", b"x\xed\xbf\xbf", b"x\xf0\x8f\xbf\xbf",
             b"x\xf4\x90\x80\x80", b"x\xf5\x80\x80\x80", b"x\xff", b"x\x80", b"x\xe2\x82", b"x\xf0\x9f\x98"]
    for _ in range(5000):
        name = bytearray(random_name(chosen))
        for _ in range(chosen.randint(1, 3)):
            at = chosen.randrange(1, len(name) + 1)
            name[at:at + chosen.randrange(2)] = bytes([chosen.choice([*range(0x80, 0xC0), *range(0x80, 0x100), 0x61])])
        names.append(bytes(name[:chosen.randint(2, len(name))]))
    for name, theirs in zip(names, debugfs_hashes(names), strict=True):
        assert our_hash(name) == theirs, name
        if theirs is None:
            broken += 1
            assert fold(name) is None and hashed_form(name) == name
            assert same_name(name, name) and not same_name(name, b"X" + name[1:])
    assert 1000 < broken < len(names) - 1000


@pytest.mark.parametrize(("name", "folded"), [
    (b"", b""), (b"README", b"readme"), (b"A_-@[`{Z~", b"a_-@[`{z~"), ("Straße".encode(), b"strasse"),
    ("ΣΊΣΥΦΟΣ".encode(), "σι\u0301συφοσ".encode()), ("\u00ad".encode(), b""),
    ("\uac00".encode(), "\u1100\u1161".encode()), (b"X\x80\xbfY\xc3\x89\xa5", b"x\x80\xbfye\xa5\xcc\x81\xa5"),
    ("\u212b".encode(), "a\u030a".encode()), ("a\u0301\u0323".encode(), "a\u0323\u0301".encode()),
    ("\U0001fae0".encode(), "\U0001fae0".encode())])
def test_known_foldings(name: bytes, folded: bytes) -> None:
    assert fold(name) == folded
    if fold(folded) == folded:
        assert same_name(name, folded)


def test_ignorable_ends_a_run_of_marks() -> None:
    """Marks on both sides of it are not put in order, so a folded name may itself fold to another."""
    name = "a\u0301\u00ad\u0323".encode()
    folded = fold(name)
    assert folded == "a\u0301\u0323".encode() and fold(folded) == "a\u0323\u0301".encode()
    assert not same_name(name, folded)


def test_names_that_differ() -> None:
    assert not same_name(b"a", b"b")
    assert not same_name("\ua7c7".encode(), "\ua7c8".encode())  # a pair of letters from Unicode 13
    assert not same_name(b"\xff", "\u00ad".encode()) and not same_name("\u00ad".encode(), b"\xff")


# ---- e2fsck's hash tree ---------------------------------------------------------------------------------------------

def tree_leaves(raw: bytes, block_bytes: int) -> list[tuple[int, int, bytes]]:
    """(lowest hash, hash after the highest, block) of each leaf below a root of one level."""
    assert raw[30] == 0
    count = struct.unpack_from("<H", raw, 34)[0]
    entries = [struct.unpack_from("<II", raw, 32 + 8 * index) for index in range(count)]
    lows = [0, *(low & ~1 for low, _ in entries[1:]), 1 << 32]
    return [(lows[index], lows[index + 1], raw[block * block_bytes:(block + 1) * block_bytes])
            for index, (_, block) in enumerate(entries)]


def leaf_names(raw: bytes) -> list[bytes]:
    names, at = [], 0
    while at < len(raw):
        inode, length, name_length = struct.unpack_from("<IHB", raw, at)
        if inode:
            names.append(raw[at + 8:at + 8 + name_length])
        at += length
    return names


@pytest.mark.parametrize("flags", ["", ",encoding_flags=strict"], ids=["lax", "strict"])
def test_tree_built_by_e2fsck(flags: str, tmp_path: Path) -> None:
    """``e2fsck -D`` orders a casefolded directory by the hashes of folded names."""
    chosen, names = random_source(), {}
    while len(names) < 400:
        name = random_name(chosen)
        names.setdefault(fold(name), name)
    content, image = tmp_path / "content", tmp_path / "image"
    (content / "names").mkdir(parents=True)
    for name in names.values():
        os.mknod(os.path.join(os.fsencode(content / "names"), name))
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", "casefold", "-E", f"encoding=utf8{flags}",
                    "-d", str(content), str(image)], check=True)
    subprocess.run(["debugfs", "-w", "-R", f"sif /names flags {CASEFOLD_FLAG | 0x80000:#x}", str(image)], check=True,
                   capture_output=True)
    assert subprocess.run(["e2fsck", "-fyD", str(image)], capture_output=True, check=False).returncode in (0, 1)
    raw = subprocess.run(["debugfs", "-R", "cat /names", str(image)], check=True, capture_output=True).stdout
    seed = image.read_bytes()[1024 + 0xEC:1024 + 0xFC]
    seen = []
    for low, high, leaf in tree_leaves(raw, 1024):
        for name in leaf_names(leaf):
            assert low <= dirhash(hashed_form(name), HALF_MD4, seed)[0] <= high
            seen.append(name)
    assert sorted(seen) == sorted(names.values())
