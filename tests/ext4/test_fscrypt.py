"""Encrypted directories without the key: what the kernel's ext4 lists and finds, against what lies on the disk.

The kernel makes the names (the key is added to the first mount only, and goes with it); debugfs reads the raw entries,
so that kernel and ``fscrypt`` start from the same ciphertexts.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import subprocess
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusewire.ext4 import fscrypt
from fusewire.ext4.dirhash import dirhash, unsigned_version
from fusewire.ext4.errors import Check, Corrupt
from tests import encrypted
from tests.mounting import kernel_mount

LENGTHS = [*range(1, 256, 6), 15, 16, 17, 32, 33, 143, 144, 148, 149, 150, 151, 159, 160, 161, 254, 255]
TARGETS = (1, 15, 16, 17, 31, 32, 33, 55, 58, 59, 60, 100, 149, 150, 500, 1000)
HASHED_FLAG, DIR_INDEX = 0x1000, 0x20

# name of the recipe: (mke2fs options, policy version, whether "many" loses its hash tree's flag, presented with hashes)
RECIPES = {
    "hashed": (("-b", "1024", "-O", "encrypt,dir_index"), 2, False, {"many": True, "few": True}),
    "hashed-v1": (("-b", "4096", "-O", "encrypt,dir_index"), 1, False, {"many": True, "few": True}),
    "linear": (("-b", "1024", "-O", "encrypt,^dir_index"), 2, False, {"many": False, "few": False}),
    "flag-lost": (("-b", "1024", "-O", "encrypt,dir_index,^metadata_csum"), 2, True, {"many": False, "few": True}),
}


class Encrypted:
    """One image with the encrypted directories "many" (several blocks) and "few" (one), and readers of its parts."""

    def __init__(self, path: Path, key: bytes, hashed: dict[str, bool]) -> None:
        self.path, self.key, self.hashed = path, key, hashed
        self.super = path.read_bytes()[1024:2048]
        self.hash_version = unsigned_version(self.super[0xFC], struct.unpack_from("<I", self.super, 0x160)[0])

    def debugfs(self, request: str, *options: str) -> bytes:
        command = ["debugfs", *options, "-R", request, str(self.path)]
        return subprocess.run(command, capture_output=True, check=True).stdout

    def inode(self, where: str) -> bytes:
        match = re.search(rb"block (\d+), offset (0x\w+)", self.debugfs(f"imap {where}"))
        assert match
        at = int(match[1]) * (1024 << self.super[0x18]) + int(match[2], 16)
        return self.path.read_bytes()[at:at + 256]

    def entries(self, name: str) -> dict[bytes, int]:
        """Raw names and inode numbers of a directory, less "." and ".."; hash tree nodes look like empty entries."""
        raw, found, at = self.debugfs(f"cat /{name}"), {}, 0
        while at < len(raw):
            inode, length, name_length = struct.unpack_from("<IHB", raw, at)
            if inode:
                found[raw[at + 8:at + 8 + name_length]] = inode
            at += length
        return {name: inode for name, inode in found.items() if name not in (b".", b"..")}

    def present(self, name: str, ciphertext: bytes) -> bytes:
        hashes = dirhash(ciphertext, self.hash_version, self.super[0xEC:0xFC]) if self.hashed[name] else (0, 0)
        return fscrypt.present_name(ciphertext, hashes)

    def context(self, where: str) -> bytes:
        """The value of attribute "c", the only one in the inode."""
        inode = self.inode(where)
        start = 128 + struct.unpack_from("<H", inode, 128)[0] + 4
        name_bytes, index, offset, _, size = struct.unpack_from("<BBHII", inode, start)
        assert (name_bytes, index, inode[start + 16:start + 17]) == (1, fscrypt.CONTEXT_XATTR_INDEX,
                                                                     fscrypt.CONTEXT_XATTR_NAME)
        return inode[start + offset:start + offset + size]


def write(root: Path, version: int) -> bytes:
    key = encrypted.add_key(root, version)
    for name, lengths in (("many", LENGTHS), ("few", (1, 40, 160, 255))):
        (root / name).mkdir()
        encrypted.set_policy(root / name, version, key)
        for length in lengths:
            (root / name / ("n" * length)).touch()
    (root / "links").mkdir()
    encrypted.set_policy(root / "links", version, key)
    for length in TARGETS:
        os.symlink("t" * length, root / "links" / f"{length}")
    return key


@pytest.fixture(scope="module")
def image_of(mounts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Encrypted]]:
    folder, made = tmp_path_factory.mktemp("encrypted"), {}

    def image(name: str) -> Encrypted:
        if name not in made:
            options, version, lose_flag, hashed = RECIPES[name]
            path = folder / name
            with open(path, "wb") as file:
                file.truncate(16 << 20)
            subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", *options, str(path)], check=True)
            with kernel_mount(path, "rw") as mounted:
                key = write(mounted.root, version)
            made[name] = Encrypted(path, key, hashed)
            if lose_flag:
                flags = struct.unpack_from("<I", made[name].inode("/many"), 0x20)[0]
                assert flags & HASHED_FLAG
                made[name].debugfs(f"sif /many flags {flags & ~HASHED_FLAG:#x}", "-w")
        return made[name]

    yield image
    for path in folder.iterdir():
        path.unlink()


def names_in(folder: Path) -> list[bytes]:
    return os.listdir(os.fsencode(folder))


def found(folder: Path, name: bytes) -> int | None:
    """Inode number of ``name``, or None."""
    try:
        return os.lstat(os.path.join(os.fsencode(folder), name)).st_ino
    except FileNotFoundError:
        return None


# ---- names ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("directory", ["many", "few"])
@pytest.mark.parametrize("name", RECIPES)
def test_listing_is_the_kernels(name: str, directory: str, image_of: Callable[[str], Encrypted]) -> None:
    image = image_of(name)
    entries = image.entries(directory)
    assert len(entries) == (len(set(LENGTHS)) if directory == "many" else 4)
    assert max(map(len, entries)) == 255
    size, flags = (struct.unpack_from("<I", image.inode(f"/{directory}"), at)[0] for at in (4, 0x20))
    has_dir_index = struct.unpack_from("<I", image.super, 0x5C)[0] & DIR_INDEX != 0
    blocks = size // (1024 << image.super[0x18])
    assert (blocks == 1) == (directory == "few")
    assert fscrypt.in_hash_order(has_dir_index, flags & HASHED_FLAG != 0, blocks) == image.hashed[directory]
    with kernel_mount(image.path) as mounted:
        listed = names_in(mounted.root / directory)
    assert sorted(listed) == sorted(image.present(directory, entry) for entry in entries)


@pytest.mark.parametrize("name", RECIPES)
def test_presented_names_lead_to_their_entries(name: str, image_of: Callable[[str], Encrypted]) -> None:
    image = image_of(name)
    entries = image.entries("many")
    with kernel_mount(image.path) as mounted:
        for entry, inode in entries.items():
            presented = image.present("many", entry)
            assert found(mounted.root / "many", presented) == inode
            parsed = fscrypt.parse_name(presented)
            assert parsed is not None
            assert [other for other in entries if parsed.matches(other)] == [entry]
            assert parsed.whole == (len(entry) <= 149)


def encode(raw: bytes) -> bytes:
    return urlsafe_b64encode(raw).rstrip(b"=")


def altered(presented: bytes) -> dict[str, bytes]:
    """Names near ``presented``: each changes one thing that a lookup may or may not look at."""
    raw = urlsafe_b64decode(presented + b"=" * (-len(presented) % 4))
    return {
        "other hashes": encode(bytes(byte ^ 0x55 for byte in raw[:8]) + raw[8:]),
        "other start": encode(raw[:8] + bytes([raw[8] ^ 1]) + raw[9:]),
        "other end": encode(raw[:-1] + bytes([raw[-1] ^ 1])),
        "one byte less": encode(raw[:-1]),
        "one byte more": encode(raw + b"\0"),
        "padded": presented + b"=" * (-len(presented) % 4 or 1),
        "stray bits": presented[:-1] + bytes([presented[-1] + 1]),
        "one character less": presented[:-1],
        "one character more": presented + b"A",
        "other alphabet": presented[:5] + b"+" + presented[6:],
        "hashes only": encode(raw[:8]),
        "one byte of name": encode(raw[:8] + b"x"),
    }


@pytest.mark.parametrize("name", ["hashed", "linear"])
def test_lookup_of_altered_names_is_the_kernels(name: str, image_of: Callable[[str], Encrypted]) -> None:
    """What the kernel finds, ``parse_name`` and ``matches`` find; a tree also needs the hashes of a name cut short."""
    image = image_of(name)
    entries = image.entries("many")
    outcomes = set()
    with kernel_mount(image.path) as mounted:
        for entry in entries:
            for what, other in altered(image.present("many", entry)).items():
                theirs = found(mounted.root / "many", other)
                parsed = fscrypt.parse_name(other)
                ours = [entries[each] for each in entries if parsed and parsed.matches(each)]
                if what == "other hashes" and name == "hashed" and parsed and not parsed.whole:
                    assert ours == [entries[entry]] and theirs in (None, ours[0])  # the same leaf by chance
                    outcomes.add(("other hashes, cut short", theirs is not None))
                    continue
                assert theirs == (ours[0] if ours else None), (what, other)
                outcomes.add((what, theirs is not None))
    assert ("other hashes", True) in outcomes and ("other start", False) in outcomes
    assert (("other hashes, cut short", False) in outcomes) == (name == "hashed")


def test_names_no_kernel_presents() -> None:
    for name in (b"", b"A", b"plain", b"A" * 11, b"A" * 12 + b"AB", b"A" * 12 + b"B", b"A" * 249, b"A" * 253,
                 b"A" * 255, b"\xff" * 40, b"." * 40, b"A" * 11 + b"u", b"A" * 31):
        assert fscrypt.parse_name(name) is None, name
    assert fscrypt.parse_name(b"A" * 32) == fscrypt.PresentedName((0, 0), bytes(16), b"")
    assert fscrypt.parse_name(b"A" * 33) == fscrypt.PresentedName((0, 0), bytes(16), b"")
    assert fscrypt.parse_name(b"A" * 252) == fscrypt.PresentedName((0, 0), bytes(149), bytes(32))


def test_hostile_names_on_disk() -> None:
    """A name below 16 bytes cannot be ciphertext; one with the start of another but shorter does not match it."""
    for length in range(16):
        with pytest.raises(Corrupt) as caught:
            fscrypt.present_name(bytes(length), (0, 0))
        assert caught.value.check is Check.DIRENT_NAME
    parsed = fscrypt.parse_name(fscrypt.present_name(bytes(160), (4, 5)))
    assert parsed is not None and parsed.hashes == (4, 5)
    assert parsed.matches(bytes(160)) and not parsed.matches(bytes(149)) and not parsed.matches(bytes(161))


def test_kernel_refuses_a_short_name_too(image_of: Callable[[str], Encrypted], tmp_path: Path) -> None:
    image = image_of("flag-lost")
    raw = bytearray(image.path.read_bytes())
    entry = next(entry for entry in image.entries("few") if len(entry) == 32)
    at = raw.index(entry)
    raw[at - 2] = 12
    (tmp_path / "image").write_bytes(raw)
    with kernel_mount(tmp_path / "image") as mounted, pytest.raises(OSError) as caught:
        names_in(mounted.root / "few")
    assert caught.value.errno == errno.EUCLEAN


# ---- symbolic links --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["hashed", "linear"])
def test_symlink_targets_are_the_kernels(name: str, image_of: Callable[[str], Encrypted]) -> None:
    image, fast = image_of(name), 0
    with kernel_mount(image.path) as mounted:
        for presented in names_in(mounted.root / "links"):
            path = os.path.join(os.fsencode(mounted.root), b"links", presented)
            status = os.lstat(path)
            inode = image.inode(f"<{status.st_ino}>")
            fast += status.st_blocks == 0
            raw = inode[0x28:0x64] if status.st_blocks == 0 else image.debugfs(f"cat <{status.st_ino}>")
            target = fscrypt.symlink_target(raw)
            assert target == os.readlink(path)
            assert status.st_size == len(target)
            assert struct.unpack_from("<I", inode, 4)[0] == struct.unpack_from("<H", raw)[0] + 2
    assert 0 < fast < len(TARGETS)


@pytest.mark.parametrize("raw", [b"", b"\1", b"\0\0", b"\0\0" + bytes(58), b"\x0f\0" + bytes(58), b"\x3b\0" + bytes(58),
                                 b"\xff\xff" + bytes(1022)])
def test_hostile_symlinks(raw: bytes) -> None:
    with pytest.raises(Corrupt) as caught:
        fscrypt.symlink_target(raw)
    assert caught.value.check is Check.SYMLINK_SIZE


# ---- contexts ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["hashed", "hashed-v1"])
def test_context(name: str, image_of: Callable[[str], Encrypted]) -> None:
    image = image_of(name)
    many, few = (fscrypt.parse_context(image.context(where)) for where in ("/many", "/few"))
    assert many.version == RECIPES[name][1]
    assert (many.contents_mode, many.filenames_mode) == (encrypted.MODE_AES_256_XTS, encrypted.MODE_AES_256_CTS)
    assert many.key == image.key
    assert many.padding_bytes == 32
    assert len(many.nonce) == 16 and many.nonce != few.nonce
    assert fscrypt.permitted(many, few)


@pytest.mark.parametrize("value", [b"", b"\1", b"\2", bytes(28), bytes(40), b"\3" + bytes(39), b"\1" + bytes(26),
                                   b"\1" + bytes(39), b"\2" + bytes(27), b"\2" + bytes(40)])
def test_malformed_contexts(value: bytes) -> None:
    with pytest.raises(Corrupt) as caught:
        fscrypt.parse_context(value)
    assert caught.value.check is Check.ENCRYPTION_CONTEXT


def test_foreign_children_are_refused_as_by_the_kernel(image_of: Callable[[str], Encrypted], tmp_path: Path) -> None:
    """debugfs links plain inodes into an encrypted directory: directories and links are EPERM, files are found."""
    path = tmp_path / "image"
    path.write_bytes(image_of("linear").path.read_bytes())
    names = {kind: f"{kind}-of-sixteen-bytes-or-more".encode() for kind in ("dir", "link", "file")}
    requests = ["mkdir plain-dir", "symlink plain-link target", "write /dev/null plain-file"]
    requests += [f"ln plain-{kind} /few/{name.decode()}" for kind, name in names.items()]
    subprocess.run(["debugfs", "-w", "-f", "-", str(path)], input="\n".join(requests) + "\n", text=True, check=True,
                   capture_output=True)
    with kernel_mount(path) as mounted:
        for kind, name in names.items():
            presented = fscrypt.present_name(name, (0, 0))
            if kind == "file":
                assert found(mounted.root / "few", presented)
                continue
            with pytest.raises(PermissionError):
                found(mounted.root / "few", presented)
    directory = fscrypt.parse_context(image_of("linear").context("/few"))
    other = fscrypt.parse_context(b"\1" + bytes(27))
    assert not fscrypt.permitted(directory, None) and not fscrypt.permitted(None, directory)
    assert not fscrypt.permitted(directory, other)
