"""A bounded walk through everything that the ext4 core can answer about an image, without a mount.

Nothing but `Ext4Error` may come out of an operation, whatever the image holds; anything else is a bug, and goes up.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TypeVar

from fusewire.ext4 import control, iomap, namespace, statfs, xattr
from fusewire.ext4.errors import Ext4Error
from fusewire.ext4.inode import Inode
from tests.ext4.driver import Core

Answer = TypeVar("Answer")

MOST_NAMES = 600
MOST_MAPPINGS = 300
READ_BYTES = 1 << 16
SECONDS = 10
GROWTH_BYTES = 200 << 20
ABSENT = (b"absent", b"n" * 255, b"n" * 256, b"\xff\xfe", b".", b"..")


class TooSlow(AssertionError):
    """A walk that should take a fraction of a second did not end."""


@contextmanager
def bounds(what: str) -> Iterator[None]:
    """Inside, time and the growth of memory are limited."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"{what}: not done after {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < GROWTH_BYTES, f"{what}: memory grew by {growth >> 20} MiB"


def walk_image(image: Path | bytes) -> list[str]:
    """The checks that failed on the way, one line each; the first is the refusal if the image cannot be opened."""
    found: list[str] = []
    try:
        with Core(image) as core:
            walk_core(core, found)
    except Ext4Error as error:
        found.append(f"open: {error!r}")
    return found


def walk_core(core: Core, found: list[str]) -> None:
    """Visit each directory once and ask everything about each name."""
    note(found, "statfs", partial(core.run, statfs.statfs))
    waiting, seen, names = [core.root()], {2}, 0
    visit(core, waiting[0], found)
    while waiting and names < MOST_NAMES:
        parent = waiting.pop()
        for name in ABSENT:
            note(found, f"lookup in {parent.number}", partial(core.run, namespace.lookup, parent, name))
        listed = note(found, f"read {parent.number}", partial(core.read_directory, parent, MOST_NAMES))
        for entry in (listed or [])[:MOST_NAMES]:
            names += 1
            lookup = partial(core.run, namespace.lookup_inode, parent, entry.name)
            child = note(found, f"lookup in {parent.number}", lookup)
            if child and child.number not in seen:
                seen.add(child.number)
                visit(core, child, found)
                if child.is_dir:
                    waiting.append(child)


def note(found: list[str], what: str, ask: Callable[[], Answer]) -> Answer | None:
    """The answer of ``ask``; None, and a line in ``found``, if the image is to blame."""
    try:
        return ask()
    except Ext4Error as error:
        found.append(f"{what}: {error!r}")
        return None


def visit(core: Core, of: Inode, found: list[str]) -> None:
    """Ask everything about one inode."""
    label = f"inode {of.number}"
    control.getflags(of)
    control.fsxattr(of)
    for name in note(found, label, partial(core.run, xattr.names, of, True)) or []:
        note(found, label, partial(core.run, xattr.get, of, name))
    note(found, label, partial(core.run, xattr.get, of, b"system.posix_acl_access"))
    note(found, label, partial(core.run, xattr.get, of, b"user.absent"))
    if of.is_symlink:
        note(found, label, partial(core.run, namespace.readlink, of))
    if of.is_regular:
        for offset in (0, 1, of.size - 1, of.size, 1 << 40):
            for data in (True, False):
                note(found, label, partial(core.run, iomap.seek, of, offset, data))
        note(found, label, partial(map_ends, core, of))


def map_ends(core: Core, of: Inode) -> None:
    """Map the file from its start and near its end, a limited number of mappings each."""
    for start in {0, max(of.size - READ_BYTES, 0)}:
        position = start
        for _ in range(MOST_MAPPINGS):
            if position >= of.size:
                break
            mapping = core.run(iomap.begin, of, position, min(of.size - position, READ_BYTES))
            assert mapping.offset <= position < mapping.offset + mapping.length, (of.number, position, mapping)
            if mapping.type == iomap.MAPPED:
                end = mapping.addr + mapping.length
                assert mapping.addr > 0 and end <= core.fs.geometry.byte_of(core.fs.geometry.blocks), mapping
            if mapping.type == iomap.INLINE:
                core.run(iomap.inline_data, of)
            position = mapping.offset + mapping.length
