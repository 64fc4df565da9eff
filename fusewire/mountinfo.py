"""The mounts of this mount namespace, from ``/proc/self/mountinfo`` (proc(5)).

No mounted file system is asked anything, so a dead one cannot hang us.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table."""

    mount_id: int
    dev: int            # what stat(2) calls st_dev of the files in it
    target: bytes
    options: str        # of this mount: ro, nosuid, …
    fstype: str         # with subtype: fuseblk.fusewire
    source: bytes
    super_options: str  # of the file system: rw, user_id=0, …

    @property
    def connection(self) -> int:
        """The number that FUSE's control file system gives to the connection: ``dev`` as the kernel counts it."""
        return os.major(self.dev) << 20 | os.minor(self.dev)


def unescape(field: bytes) -> bytes:
    """A path as it is: the table writes space, tab, newline, backslash and ``#`` as three octal digits."""
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field)


def parse_line(line: bytes) -> Mount | None:
    """The mount that a line describes; None for a line of another form."""
    left, separator, right = line.partition(b" - ")
    head, tail = left.split(b" "), right.rstrip(b"\n").split(b" ")
    if not separator or len(head) < 6 or len(tail) < 3:
        return None
    try:
        major, minor = map(int, head[2].split(b":"))
        return Mount(
            mount_id=int(head[0]),
            dev=os.makedev(major, minor),
            target=unescape(head[4]),
            options=head[5].decode("ascii", "replace"),
            fstype=unescape(tail[0]).decode("ascii", "replace"),
            source=unescape(tail[1]),
            super_options=tail[2].decode("ascii", "replace"),
        )
    except ValueError:
        return None


def mounts() -> list[Mount]:
    """Every mount that this process can see, in the order in which they were made."""
    lines = _TABLE.read_bytes().split(b"\n")
    return [mount for mount in map(parse_line, lines) if mount is not None]


def mounts_of_device(dev: int) -> list[Mount]:
    """The mounts of a file system that lives on a block device (its ``st_rdev``)."""
    return [mount for mount in mounts() if mount.dev == dev]


def canonical(path: bytes) -> bytes:
    """An absolute path without links and dots, the last name not followed: a dead mount there is not asked anything."""
    parent, name = os.path.split(os.path.normpath(os.path.join(os.getcwdb(), path)))
    return os.path.join(os.path.realpath(parent), name) if name else parent


def find(target: str | bytes) -> Mount | None:
    """The topmost mount at a path, also where the path is a symbolic link to it; None if nothing is mounted there."""
    path = canonical(os.fsencode(target))
    table = mounts()
    return _topmost(table, path) or _topmost(table, os.path.realpath(path))


def _topmost(table: list[Mount], path: bytes) -> Mount | None:
    return next((mount for mount in reversed(table) if mount.target == path), None)
