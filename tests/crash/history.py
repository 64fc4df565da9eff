"""What one thread did in its directory of a mount, step by step, and whether a recovered tree can come from that.

The tree must be the directory as it stood after one of the steps: not before what was acknowledged, and not after what
had begun when the power went.  Data have no journal, so of each byte of a file any version will do that is not older
than the last one that was acknowledged; near where those versions differ, zeroes, too, for room that was not filled.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from tests.crash.model import State, Tree
from tests.model.side import Side, fallocate, link_opened, renameat2

DEAD = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
NAMES_MOST = 16
FILE_MOST_BYTES = 50_000
SECTOR = 512
EXCHANGE = 2
KEEP_SIZE, PUNCH_HOLE = 1, 2
FSYNCS = 0.25       # of the writes


class Ended(Exception):
    """The daemon is gone."""


class Kept:
    """A file or directory, whatever its names: its contents, and when they were acknowledged."""

    def __init__(self) -> None:
        self.versions: list[tuple[int, bytes]] = [(0, b"")]     # (position before it was written, content)
        self.told: list[tuple[int, int]] = []                   # (position, version that was durable then)
        self.step = 0                                           # the last that changed it or its names

    @property
    def data(self) -> bytes:
        return self.versions[-1][1]


class Entry(NamedTuple):
    """What one name was: ``data`` is a link's target."""

    mode: int
    kept: Kept
    links: int = 1
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    data: bytes = b""

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


Names = dict[bytes, Entry]


class History:
    """The thread: ``work`` does random things, each at a position (in bytes) of the log of the device."""

    def __init__(self, root: bytes, number: int, chance: random.Random, position: Callable[[], int],
                 has_extents: bool, options: frozenset[str]) -> None:
        """``options`` of the mount: with "noloop" the kernel does not tell fusewire of syncfs(2); "sync" and "dirsync"
        make everything, or the names, durable at once."""
        self.root, self.top, self.chance, self.position = root, b"/w%d" % number, chance, position
        self.names: Names = {self.top: Entry(stat.S_IFDIR | 0o755, Kept(), 2)}
        self.steps: list[tuple[int, Names]] = [(0, self.names)]
        self.floors: list[tuple[int, int]] = []
        self.serial, self.ended = 0, False
        self.sync, self.dirsync = "sync" in options, not options.isdisjoint(("sync", "dirsync"))
        self.held: list[int] = []
        self.kinds: list[tuple[Callable[[], None], int]] = [
            (self.create, 8), (self.mkdir, 3), (self.symlink, 2), (self.link, 3), (self.unlink, 6), (self.rmdir, 2),
            (self.rename, 6), (self.exchange, 2), (self.replace, 4), (self.tmpfile, 2), (self.hold, 2),
            (self.write, 20), (self.append, 8), (self.write_direct, 4), (self.truncate, 5), (self.chmod, 2),
            (self.set_xattr, 4), (self.fsync, 6)]
        if "noloop" not in options:
            self.kinds += [(self.syncfs, 1)]
        if has_extents:
            self.kinds += [(self.reserve, 3), (self.punch, 3)]

    def begin(self) -> None:
        """Make this thread's directory, durably."""
        os.mkdir(self.root + self.top, 0o755)
        self._sync_path(self.top)

    def work(self, operations: int, at: Callable[[int], None]) -> None:
        """So many things, each after ``at`` was called with its number; ends early when the daemon does."""
        try:
            for number in range(operations):
                at(number)
                self.chance.choices([kind for kind, _ in self.kinds], [weight for _, weight in self.kinds])[0]()
        except Ended:
            self.ended = True
        finally:
            for fd in self.held:
                self._close(fd)

    # ---- steps

    def _name(self, after: Names, touched: list[Kept], call: Callable[..., object], *arguments: object) -> bool:
        """Change names; False if there was no room."""
        done = self._step(after, touched, call, *arguments)
        if done and self.dirsync:
            self.floors.append((self.position(), len(self.steps) - 1))
        return done

    def _step(self, after: Names, touched: list[Kept], call: Callable[..., object], *arguments: object) -> bool:
        """Change what names show; False if there was no room."""
        self.steps.append((self.position(), after))
        try:
            call(*arguments)
        except OSError as error:
            if error.errno in DEAD:     # it may have been done
                raise Ended from error
            self.steps.pop()
            if error.errno != errno.ENOSPC:
                raise
            return False
        self.names = after
        for kept in touched:
            kept.step = len(self.steps) - 1
        if self.sync:
            self.floors.append((self.position(), len(self.steps) - 1))
        return True

    def _put(self, kept: Kept, data: bytes, call: Callable[..., object], *arguments: object) -> None:
        """Change the content of a file."""
        kept.versions.append((self.position(), data))
        self._alive(call, *arguments)
        if self.sync:
            self._told(kept, len(kept.versions) - 1)

    def _alive(self, call: Callable[..., Any], *arguments: object) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            if error.errno in DEAD:
                raise Ended from error
            raise

    def _sync(self, kept: Kept, fd: int, how: Callable[[int], None] = os.fsync) -> None:
        version, step = len(kept.versions) - 1, kept.step
        self._alive(how, fd)
        self._told(kept, version)
        self.floors.append((self.position(), step))

    def _told(self, kept: Kept, version: int) -> None:
        kept.told.append((self.position(), version))

    def _open(self, path: bytes, flags: int) -> int:
        fd: int = self._alive(os.open, self.root + path, flags)
        return fd

    def _close(self, fd: int) -> None:
        with suppress(Ended):
            self._alive(os.close, fd)

    # ---- choosing

    def _some(self, wanted: Callable[[Entry], bool]) -> bytes | None:
        found = [path for path, entry in self.names.items() if wanted(entry) and path != self.top]
        return self.chance.choice(found) if found else None

    def _new(self) -> tuple[bytes, bytes]:
        """A directory, and a path in it that is free."""
        folder = self.chance.choice([path for path, entry in self.names.items() if entry.is_dir])
        self.serial += 1
        return folder, folder + b"/%d" % self.serial + b"n" * self.chance.choice((0, 0, 5, 60))

    def _folder(self, path: bytes) -> bytes:
        return path.rpartition(b"/")[0]

    def _linked(self, names: Names, kept: Kept, more: int) -> None:
        for path, entry in names.items():
            if entry.kept is kept:
                names[path] = entry._replace(links=entry.links + more)

    def _bytes(self, most: int = 12_000) -> bytes:
        return self.chance.randbytes(self.chance.choice((1, 100, 512, 1024, 4096, self.chance.randrange(1, most))))

    # ---- names

    def create(self) -> None:
        if len(self.names) > NAMES_MOST:
            return self.unlink()
        folder, path = self._new()
        kept = Kept()
        self._name(self.names | {path: Entry(stat.S_IFREG | 0o644, kept)}, [kept, self.names[folder].kept],
                   os.mknod, self.root + path, stat.S_IFREG | 0o644)
        return None

    def mkdir(self) -> None:
        folder, path = self._new()
        if path.count(b"/") > 5 or len(self.names) > NAMES_MOST:
            return
        kept, parent = Kept(), self.names[folder].kept
        after = self.names | {path: Entry(stat.S_IFDIR | 0o755, kept, 2)}
        self._linked(after, parent, 1)
        self._name(after, [kept, parent], os.mkdir, self.root + path, 0o755)

    def symlink(self) -> None:
        folder, path = self._new()
        if len(self.names) > NAMES_MOST:
            return
        kept, target = Kept(), b"t" * self.chance.choice((5, 59, 60, 500))
        self._name(self.names | {path: Entry(stat.S_IFLNK | 0o777, kept, data=target)},
                   [kept, self.names[folder].kept], os.symlink, target, self.root + path)

    def link(self) -> None:
        old, (folder, path) = self._some(lambda entry: entry.is_file), self._new()
        if old is None or len(self.names) > NAMES_MOST:
            return
        kept = self.names[old].kept
        after = self.names | {path: self.names[old]}
        self._linked(after, kept, 1)
        self._name(after, [kept, self.names[folder].kept], os.link, self.root + old, self.root + path)

    def unlink(self) -> None:
        path = self._some(lambda entry: not entry.is_dir)
        if path is None:
            return
        kept, after = self.names[path].kept, dict(self.names)
        del after[path]
        self._linked(after, kept, -1)
        self._name(after, [kept, self.names[self._folder(path)].kept], os.unlink, self.root + path)

    def rmdir(self) -> None:
        path = self._some(lambda entry: entry.is_dir)
        if path is None or any(other.startswith(path + b"/") for other in self.names):
            return
        parent, after = self.names[self._folder(path)].kept, dict(self.names)
        del after[path]
        self._linked(after, parent, -1)
        self._name(after, [parent], os.rmdir, self.root + path)

    def rename(self) -> None:
        """To a new name, or over a file."""
        old = self._some(lambda entry: True)
        if old is None:
            return
        over = self._some(lambda entry: not entry.is_dir and entry.kept is not self.names[old].kept)
        new = self._new()[1]
        if over is not None and not self.names[old].is_dir and self.chance.random() < 0.5:
            new = over
        if (new + b"/").startswith(old + b"/"):
            return
        self._rename(old, new)

    def _rename(self, old: bytes, new: bytes) -> bool:
        moved, after = self.names[old], dict(self.names)
        touched = [moved.kept, *(self.names[self._folder(path)].kept for path in (old, new))]
        gone = after.pop(new, None)
        if gone is not None:
            touched.append(gone.kept)
            self._linked(after, gone.kept, -1)
        for path in [path for path in after if (path + b"/").startswith(old + b"/")]:
            after[new + path[len(old):]] = after.pop(path)
        if moved.is_dir:
            self._linked(after, touched[1], -1)
            self._linked(after, touched[2], 1)
        return self._name(after, touched, os.rename, self.root + old, self.root + new)

    def exchange(self) -> None:
        one, other = (self._some(lambda entry: not entry.is_dir) for _ in range(2))
        if one is None or other is None or self.names[one].kept is self.names[other].kept:
            return
        after = self.names | {one: self.names[other], other: self.names[one]}
        touched = [self.names[path].kept for path in (one, other, self._folder(one), self._folder(other))]
        self._name(after, touched, renameat2, self.root + one, self.root + other, EXCHANGE)

    def replace(self) -> None:
        """A new content by the usual steps: write aside, fsync, rename over, fsync the directory."""
        old = self._some(lambda entry: entry.is_file)
        if old is None:
            return
        folder = self._folder(old)
        aside, kept = folder + b"/aside-%d" % self.serial, Kept()
        self.serial += 1
        if not self._name(self.names | {aside: Entry(stat.S_IFREG | 0o644, kept)},
                          [kept, self.names[folder].kept], os.mknod, self.root + aside, stat.S_IFREG | 0o644):
            return
        self._write(kept, aside, 0, self._bytes(), os.fsync)
        if self._rename(aside, old) and self.chance.random() < 0.5:
            self._sync_path(folder)

    def tmpfile(self) -> None:
        """A file that gets its name last."""
        folder, path = self._new()
        if len(self.names) > NAMES_MOST:
            return
        fd = self._open(folder, os.O_TMPFILE | os.O_RDWR)
        kept, data = Kept(), self._bytes()
        try:
            self._put(kept, data, os.pwrite, fd, data, 0)
            self._alive(os.fchmod, fd, 0o644)
            if self._name(self.names | {path: Entry(stat.S_IFREG | 0o644, kept)}, [kept, self.names[folder].kept],
                          link_opened, fd, self.root + path) and self.chance.random() < 0.5:
                self._sync(kept, fd)
        finally:
            self._close(fd)

    def hold(self) -> None:
        """A file that lost its name stays open."""
        fd = self._open(self._new()[0], os.O_TMPFILE | os.O_RDWR)
        self.held.append(fd)
        self._alive(os.pwrite, fd, self._bytes(), 0)
        if len(self.held) > 3:
            self._close(self.held.pop(0))

    # ---- attributes

    def chmod(self) -> None:
        path = self._some(lambda entry: entry.is_file or entry.is_dir)
        if path is not None:
            mode = self.chance.choice((0o600, 0o755, 0o700, 0o1755))
            kept = self.names[path].kept
            after = {other: entry._replace(mode=stat.S_IFMT(entry.mode) | mode) if entry.kept is kept else entry
                     for other, entry in self.names.items()}
            self._step(after, [kept], os.chmod, self.root + path, mode)

    def set_xattr(self) -> None:
        path = self._some(lambda entry: entry.is_file or entry.is_dir)
        if path is not None:
            name, value = self.chance.choice((b"a", b"b")), self.chance.randbytes(self.chance.choice((0, 5, 60, 300)))
            kept = self.names[path].kept
            after = {other: entry._replace(xattrs=tuple(sorted((dict(entry.xattrs) | {name: value}).items())))
                     if entry.kept is kept else entry for other, entry in self.names.items()}
            self._step(after, [kept], os.setxattr, self.root + path, b"user." + name, value)

    # ---- data

    def write(self) -> None:
        path = self._some(lambda entry: entry.is_file)
        if path is not None:
            kept = self.names[path].kept
            sync = self.chance.choice((os.fsync, os.fdatasync)) if self.chance.random() < FSYNCS else None
            self._write(kept, path, self.chance.randrange(min(len(kept.data) + 5000, FILE_MOST_BYTES)), self._bytes(),
                        sync)

    def append(self) -> None:
        path = self._some(lambda entry: entry.is_file and len(entry.kept.data) < FILE_MOST_BYTES)
        if path is not None:
            kept = self.names[path].kept
            self._write(kept, path, len(kept.data), self._bytes(4000), os.fsync if self.chance.random() < 0.5 else None)

    def write_direct(self) -> None:
        path = self._some(lambda entry: entry.is_file)
        if path is not None:
            start = self.chance.randrange(40) * 512
            data = self.chance.randbytes(512 * self.chance.randrange(1, 12))
            self._write(self.names[path].kept, path, start, data, None, os.O_DIRECT)

    def _write(self, kept: Kept, path: bytes, start: int, data: bytes, sync: Callable[[int], None] | None,
               flags: int = 0) -> None:
        fd = self._open(path, os.O_WRONLY | flags)
        try:
            whole = kept.data[:start].ljust(start, b"\0") + data + kept.data[start + len(data):]
            self._put(kept, whole, os.pwrite, fd, data, start)
            if sync is not None:
                self._sync(kept, fd, sync)
        finally:
            self._close(fd)

    def truncate(self) -> None:
        path = self._some(lambda entry: entry.is_file)
        if path is not None:
            kept = self.names[path].kept
            size = self.chance.choice((0, self.chance.randrange(len(kept.data) + 1), self.chance.randrange(30_000)))
            self._put(kept, kept.data[:size].ljust(size, b"\0"), os.truncate, self.root + path, size)

    def reserve(self) -> None:
        self._fallocate(0, self.chance.randrange(30_000), self.chance.randrange(1, 20_000))

    def punch(self) -> None:
        self._fallocate(PUNCH_HOLE | KEEP_SIZE, self.chance.randrange(30_000), self.chance.randrange(1, 20_000))

    def _fallocate(self, mode: int, start: int, length: int) -> None:
        path = self._some(lambda entry: entry.is_file)
        if path is None:
            return
        kept = self.names[path].kept
        data = kept.data if mode else kept.data.ljust(start + length, b"\0")
        if mode:
            data = data[:start] + bytes(min(length, max(len(data) - start, 0))) + data[start + length:]
        fd = self._open(path, os.O_WRONLY)
        try:
            self._put(kept, data, fallocate, fd, mode, start, length)
        finally:
            self._close(fd)

    # ---- durability

    def fsync(self) -> None:
        path = self._some(lambda entry: entry.is_file or entry.is_dir)
        if path is not None:
            self._sync_path(path)

    def _sync_path(self, path: bytes) -> None:
        fd = self._open(path, os.O_RDONLY)
        try:
            self._sync(self.names[path].kept, fd)
        finally:
            self._close(fd)

    def syncfs(self) -> None:
        """Everything of this thread becomes durable."""
        self._alive(Side(self.root).syncfs)
        for entry in self.names.values():
            self._told(entry.kept, len(entry.kept.versions) - 1)
        self.floors.append((self.position(), len(self.steps) - 1))

    # ---- the judgement

    def judge(self, tree: Tree, at: int) -> str | None:
        """Why a tree cannot be what a power cut at a position left, None if it can."""
        mine = {path: state for path, state in tree.items() if (path + b"/").startswith(self.top + b"/")}
        floor = max((step for position, step in self.floors if position <= at), default=0)
        complaints = []
        for index in range(floor, len(self.steps)):
            begun, names = self.steps[index]
            if begun > at:
                break
            wrong = _differs(names, mine, at)
            if wrong is None:
                return None
            complaints.append(f"  not as after step {index} of {self.top!r}: {wrong}")
        return "\n".join(complaints[-8:])


def _differs(names: Names, found: Tree, at: int) -> str | None:
    if names.keys() != found.keys():
        return f"lacks {sorted(names.keys() - found.keys())}, has {sorted(found.keys() - names.keys())}"
    for path, entry in names.items():
        state = found[path]
        if (entry.mode, entry.links, entry.xattrs) != (state.mode, state.links, state.xattrs):
            return f"{path!r}: {entry} expected, found {state._replace(data=b'')}"
        wrong = _differs_in_data(entry, state, at)
        if wrong is not None:
            return f"{path!r}: {wrong}"
    return None


def _differs_in_data(entry: Entry, state: State, at: int) -> str | None:
    if not entry.is_file:
        return None if entry.data == state.data else "another target"
    kept = entry.kept
    first = max((version for position, version in kept.told if position <= at), default=0)
    versions = [data for position, data in kept.versions[first:] if position <= at]
    sizes = [len(data) for data in versions]
    if not min(sizes) <= state.size <= max(sizes):
        return f"{state.size} bytes long, not {sizes}"
    for start in range(0, state.size, SECTOR):
        piece = state.data[start:start + SECTOR]
        allowed = {data[start:start + len(piece)].ljust(len(piece), b"\0") for data in versions}
        if len(allowed) > 1:
            allowed.add(bytes(len(piece)))
        foreign = () if piece in allowed else [at for at in range(len(piece)) if piece[at] not in {each[at] for each in
                                                                                                 allowed}]
        if foreign:
            return f"{state.size} bytes, at {start + foreign[0]} {piece[foreign[0]:][:16]!r} was never written there"
    return None
