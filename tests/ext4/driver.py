"""The ext4 core driven as a library: no mount, no loop, a plain read for every block that it misses.

`Core` opens an image (a path or bytes) and runs operations of the core until they no longer wait, counting how often
they had to start again.  `image` makes images with mke2fs once per process, `Editor` changes the metadata of an image
in memory and recomputes the checksums, so that a test breaks one rule and no other.
"""

from __future__ import annotations

import atexit
import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fusewire.ext4 import checksum, directory, group, inode, iomap, layout, namespace
from fusewire.ext4.blocks import BlockCache, BlockMiss
from fusewire.ext4.errors import Ext4Error
from fusewire.ext4.features import Feature
from fusewire.ext4.filesystem import Ext4, Options
from fusewire.ext4.inode import Inode
from fusewire.ext4.superblock import Superblock

Result = TypeVar("Result")

RESTARTS_MOST = 2000
MIB = 1 << 20
HASH_SEED = "00112233-4455-6677-8899-aabbccddeeff"
UUID = "11223344-5566-7788-99aa-bbccddeeff00"
ENVIRONMENT = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "MKE2FS_CONFIG": "/nonexistent"}


class Livelock(AssertionError):
    """One operation started again more often than any operation may."""


class Core:
    """An image and the core over it; ``failing`` holds blocks that the device cannot read."""

    def __init__(self, image: Path | bytes | bytearray, options: Options | None = None,
                 cache_bytes: int | None = None) -> None:
        self.image, self.failing, self.restarts, self.reads = image, set[int](), 0, 0
        self._fd = os.open(image, os.O_RDONLY) if isinstance(image, Path) else -1
        size = os.lseek(self._fd, 0, os.SEEK_END) if self._fd >= 0 else len(image)  # type: ignore[arg-type]
        superblock = Superblock.parse(self.pread(1024, 1024), size)
        geometry = superblock.geometry
        blocks = None if cache_bytes is None else BlockCache(geometry.block_bytes, geometry.blocks, cache_bytes)
        self.fs = Ext4(superblock, blocks, options)
        self.block_bytes = geometry.block_bytes

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Core:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pread(self, offset: int, count: int) -> bytes:
        if self._fd >= 0:
            return os.pread(self._fd, count, offset)
        return bytes(self.image[offset:offset + count])  # type: ignore[index]

    def run(self, operation: Callable[..., Result], *arguments: object) -> Result:
        """What ``operation(fs, *arguments)`` returns or raises once every block that it wants is in memory."""
        self.restarts = 0
        while True:
            try:
                return operation(self.fs, *arguments)
            except BlockMiss as miss:
                self.restarts += 1
                if self.restarts > RESTARTS_MOST:
                    raise Livelock(f"{operation} {arguments} started again {self.restarts} times") from None
                self.fs.cache.admit(self.fetch(miss.runs))

    def fetch(self, runs: Iterable[tuple[int, int]]) -> dict[int, bytes | OSError]:
        """The blocks of ``runs``, each its bytes or the error of reading it."""
        found: dict[int, bytes | OSError] = {}
        for first, count in runs:
            self.reads += 1
            data = self.pread(first * self.block_bytes, count * self.block_bytes)
            for index in range(count):
                block = data[index * self.block_bytes:(index + 1) * self.block_bytes]
                failed = first + index in self.failing or len(block) < self.block_bytes
                found[first + index] = OSError(5, "device") if failed else block
        return found

    # ---- operations by path -----------------------------------------------------------------------------------

    def root(self) -> Inode:
        return self.run(Ext4.check)

    def inode(self, number: int) -> Inode:
        return self.run(inode.load, number)

    def at(self, path: str | bytes) -> Inode:
        """The inode of a path from the root."""
        found = self.root()
        for name in filter(None, os.fsencode(path).split(b"/")):
            found = self.run(namespace.lookup_inode, found, name)
        return found

    def read_directory(self, of: Inode, most: int = 1 << 20, batch: int = 500) -> list[directory.Name]:
        """All names of a directory, asked for in batches like a client does."""
        names: list[directory.Name] = []
        while len(names) < most:
            cookie = names[-1].cookie if names else 0
            more = self.run(lambda fs, cookie=cookie: list(islice(directory.read(fs, of, cookie), batch)))
            names += more
            if len(more) < batch:
                break
        return names

    def names(self, path: str | bytes) -> list[bytes]:
        """Sorted names of a directory, without "." and ".."."""
        found = (name.name for name in self.read_directory(self.at(path)))
        return sorted(name for name in found if name not in (b".", b".."))

    def mappings(self, of: Inode, size: int | None = None) -> Iterator[iomap.Mapping]:
        """The mappings of a file from its start to its end (or to ``size``)."""
        position, end = 0, of.size if size is None else size
        while position < end:
            mapping = self.run(iomap.begin, of, position, end - position)
            assert mapping.offset <= position < mapping.offset + mapping.length, (mapping, position)
            yield mapping
            position = mapping.offset + mapping.length

    def content(self, of: Inode) -> bytes:
        """The bytes of a (small) file, moved as its mappings say."""
        parts, position = [], 0
        for mapping in self.mappings(of):
            count = min(mapping.offset + mapping.length, of.size) - position
            if mapping.type == iomap.MAPPED:
                parts.append(self.pread(mapping.addr + position - mapping.offset, count))
            elif mapping.type == iomap.INLINE:
                data = self.run(iomap.inline_data, of)
                parts.append(data[position:position + count].ljust(count, b"\0"))
            else:
                parts.append(bytes(count))
            position += count
        return b"".join(parts)

    def tree(self, most: int = 1 << 20) -> Iterator[tuple[bytes, Inode]]:
        """(path, inode) of every name below the root."""
        waiting, seen = [(b"", self.root())], 0
        while waiting:
            path, parent = waiting.pop()
            for name in self.read_directory(parent):
                if name.name in (b".", b".."):
                    continue
                seen += 1
                if seen > most:
                    return
                child = self.run(namespace.lookup_inode, parent, name.name)
                yield path + b"/" + name.name, child
                if child.is_dir:
                    waiting.append((path + b"/" + name.name, child))


def check_of(image: Path | bytes | bytearray, operation: Callable[[Core], object]) -> Ext4Error:
    """The error of ext4 that ``operation`` ends in, which may be raised when the image is opened."""
    try:
        with Core(image) as core:
            operation(core)
    except Ext4Error as error:
        return error
    raise AssertionError("nothing was raised")


def seeded() -> random.Random:
    """Random choices whose seed is printed, and replayed from the environment variable FUSEWIRE_SEED."""
    seed = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 32)))
    print("FUSEWIRE_SEED =", seed)
    return random.Random(seed)


# ---- images ------------------------------------------------------------------------------------------------------

def run_tool(*command: str | Path, allowed: tuple[int, ...] = (0,)) -> str:
    """The output of a program of e2fsprogs, which must end with an ``allowed`` exit code."""
    done = subprocess.run([str(word) for word in command], capture_output=True, env=ENVIRONMENT, check=False)
    text = done.stdout.decode("latin-1")
    if done.returncode not in allowed:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {text}{done.stderr.decode('latin-1')}")
    return text


def debugfs(path: Path, *commands: str, write: bool = False) -> str:
    """What debugfs prints for a script of commands."""
    script = "\n".join(commands).encode("latin-1") + b"\n"
    words = ["debugfs", *(["-w"] if write else []), "-f", "/dev/stdin", str(path)]
    done = subprocess.run(words, input=script, capture_output=True, env=ENVIRONMENT, check=True)
    printed = done.stderr.decode("latin-1").splitlines()
    complaints = [line for line in printed if line and not line.startswith("debugfs ")]
    if complaints:
        raise RuntimeError(f"debugfs {path}: {complaints}")
    return done.stdout.decode("latin-1")


def mapped_blocks(text: str) -> dict[int, int]:
    """File block → device block, as ``debugfs stat`` lists them for extents and block maps."""
    blocks: dict[int, int] = {}
    for first, last, start in re.findall(r"\((\d+)(?:-(\d+))?(?:\[u\])?\):(\d+)", text):
        count = int(last or first) - int(first) + 1
        blocks.update((int(first) + index, int(start) + index) for index in range(count))
    return blocks


@cache
def folder() -> Path:
    """A directory for this process's images; removed when it ends."""
    path = Path(tempfile.mkdtemp(prefix="fusewire-core-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def new_path(suffix: str = ".img") -> Path:
    """An unused name in ``folder``."""
    descriptor, name = tempfile.mkstemp(dir=folder(), suffix=suffix)
    os.close(descriptor)
    return Path(name)


def copied(source: Path) -> Path:
    """A copy of an image to be changed, as sparse as it."""
    path = new_path()
    run_tool("cp", "--sparse=always", source, path)
    return path


def stored(data: bytes | bytearray) -> Path:
    """A file that holds an image from memory, with holes where it is zero."""
    path, chunk = new_path(), 1 << 16
    with open(path, "wb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), chunk):
            if any(data[at:at + chunk]):
                os.pwrite(file.fileno(), data[at:at + chunk], at)
    return path


@cache
def image(arguments: str, kib: int = 4096, tree: Path | None = None, commands: tuple[str, ...] = ()) -> Path:
    """An image by mke2fs with ``arguments``, copied from ``tree`` and changed by debugfs; do not write to it."""
    path = new_path()
    os.truncate(path, kib << 10)
    extended = [] if "-E" in arguments.split() else ["-E", f"hash_seed={HASH_SEED}"]
    source = ["-d", str(tree)] if tree else []
    run_tool("mke2fs", "-q", "-F", "-U", UUID, *extended, *arguments.split(), *source, path)
    if commands:
        debugfs(path, *commands, write=True)
    return path


def rebuilt(path: Path) -> Path:
    """The image after e2fsck has made the directory indexes anew."""
    run_tool("e2fsck", "-fyD", path, allowed=(0, 1))
    run_tool("e2fsck", "-fn", path)
    return path


# ---- changing images ---------------------------------------------------------------------------------------------

class Editor:
    """An image in memory whose metadata can be changed; every ``with`` seals what it changed."""

    def __init__(self, path: Path) -> None:
        self.data = bytearray(path.read_bytes())
        self.core = Core(bytes(self.data))
        self.fs = self.core.fs
        self.geometry, self.seed = self.fs.geometry, self.fs.superblock.seed
        self.sealed = self.fs.has_checksums

    def _edit(self, offset: int, count: int, seal: Callable[[bytearray], object] | None) -> _Part:
        return _Part(self, offset, count, seal if self.sealed else None)

    def super(self) -> _Part:
        """The superblock's 1024 bytes."""
        return self._edit(1024, 1024, checksum.seal_superblock)

    def put_super(self, **fields: int) -> Editor:
        """Change fields of the superblock by name."""
        with self.super() as raw:
            put(raw, layout.SUPERBLOCK, 0, fields)
        return self

    def desc(self, number: int) -> _Part:
        """A group's descriptor."""
        block, offset = self.fs.superblock.descriptor_block(number)
        if Feature.GDT_CSUM in self.fs.superblock.features:
            uuid = self.fs.superblock.uuid
            return _Part(self, self.geometry.byte_of(block) + offset, self.geometry.group_desc_bytes,
                         lambda raw: checksum.seal_group_desc_crc16(raw, number, uuid))
        return self._edit(self.geometry.byte_of(block) + offset, self.geometry.group_desc_bytes,
                          lambda raw: checksum.seal_group_desc(raw, number, self.seed))

    def inode_offset(self, number: int) -> int:
        """Where an inode's record stands in the image."""
        in_group, index = self.geometry.group_of_inode(number)
        block, offset = self.geometry.inode_place(index)
        table = self.core.run(group.load, in_group).inode_table
        return self.geometry.byte_of(table + block) + offset

    def inode(self, number: int) -> _Part:
        """An inode's record."""
        return self._edit(self.inode_offset(number), self.geometry.inode_bytes,
                          lambda raw: checksum.seal_inode(raw, number, self.seed))

    def put_inode(self, number: int, **fields: int | bytes) -> Editor:
        """Change fields of an inode by name."""
        with self.inode(number) as raw:
            put(raw, layout.INODE, 0, {key: value for key, value in fields.items() if key in layout.INODE.offsets})
            put(raw, layout.INODE_EXTRA, 128,
                {key: value for key, value in fields.items() if key in layout.INODE_EXTRA.offsets})
        return self

    def block(self, number: int, seal: Callable[[bytearray], object] | None = None) -> _Part:
        """A block, sealed by ``seal``."""
        return self._edit(self.geometry.byte_of(number), self.geometry.block_bytes, seal)

    def owner_seed(self, number: int) -> int:
        """The checksum seed of an inode's blocks."""
        return self.fs.seed_of(self.core.inode(number))

    def device_block(self, number: int, file_block: int) -> int:
        """The device block of a file's block."""
        run = self.core.run(iomap.find, self.core.inode(number), file_block)
        assert run.start is not None
        return int(run.start + file_block - run.file_block)

    def dir_block(self, number: int, file_block: int = 0) -> _Part:
        """A block of entries of a directory."""
        seed = self.owner_seed(number)
        return self.block(self.device_block(number, file_block), lambda raw: checksum.seal_dir_block(raw, seed))

    def htree_node(self, number: int, file_block: int = 0) -> _Part:
        """The root or an inner node of a directory's hash tree."""
        seed, at = self.owner_seed(number), 8 if file_block else 32
        return self.block(self.device_block(number, file_block), lambda raw: checksum.seal_htree_node(raw, seed, at))

    def extent_block(self, number: int, block: int) -> _Part:
        """A block of an inode's extent tree."""
        seed = self.owner_seed(number)
        return self.block(block, lambda raw: checksum.seal_extent_block(raw, seed))

    def xattr_block(self, number: int) -> _Part:
        """The attribute block of an inode."""
        block = self.core.inode(number).file_acl
        return self.block(block, lambda raw: checksum.seal_xattr_block(raw, block, self.seed))

    def number(self, path: str) -> int:
        """The inode number of a path in the image as it was."""
        return self.core.at(path).number


class _Part:
    """A piece of an image as a ``bytearray``: sealed and written back when the ``with`` ends."""

    def __init__(self, editor: Editor, offset: int, count: int, seal: Callable[[bytearray], object] | None) -> None:
        self.editor, self.offset, self.seal = editor, offset, seal
        self.raw = bytearray(editor.data[offset:offset + count])

    def __enter__(self) -> bytearray:
        return self.raw

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            if self.seal:
                self.seal(self.raw)
            self.editor.data[self.offset:self.offset + len(self.raw)] = self.raw


_FORMATS = {"u8": "<B", "u16": "<H", "s16": "<h", "u32": "<I", "u64": "<Q"}


def put(raw: bytearray, record: layout.Record, base: int, fields: dict[str, Any]) -> None:
    """Store fields of a record that begins at ``base``."""
    for name, value in fields.items():
        at, kind = base + record.offsets[name], record.types[name]
        if kind in _FORMATS:
            struct.pack_into(_FORMATS[kind], raw, at, value)
        else:
            raw[at:at + int(kind[1:])] = value.ljust(int(kind[1:]), b"\0")
