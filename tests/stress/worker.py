"""One of the processes that use a mount at once: it owns a directory, does random things there, and keeps a model.

Besides it takes part in a directory that all share.  Nobody can say which of several wins there, so only what must hold
whoever wins is judged: the answers that such calls may give, and that records appended to one file are all there.

It reads one command a line from its standard input (a JSON list: a method's name and its arguments) and answers each
with one line: a number, or what went wrong.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import stat
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.crash.model import Node, Snapshot, State, state_of_path, tree_of_mount, walk
from tests.model.side import fallocate, link_opened, renameat2

NODES_MOST = 300
FILE_MOST_BYTES = 200_000
XATTRS = (b"a", b"b", b"a-longer-name")
XATTR_LENGTHS = (0, 3, 20, 100, 700)
CROWD_MOST = 150
RECORD_BYTES = 16
SHARED_FOLDERS = (b"", b"/d0", b"/d1", b"/d0/e")
SHARED_NAMES = tuple(b"n%d" % index for index in range(12)) + (b"d0", b"d1", b"e")
RACES = {errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EINVAL, errno.EPERM,
         errno.EBUSY, errno.ELOOP, errno.ENODATA}
NOREPLACE, EXCHANGE = 1, 2
KEEP_SIZE, PUNCH_HOLE = 1, 2

Place = tuple[bytes, Node, bytes, Node]     # of a name: the path of its directory, that, the name, what it names


class Wrong(Exception):
    """The file system did what it must not."""


class Worker:
    """One process.  ``full``: the disk may be full, so anything that needs room may fail with ENOSPC."""

    def __init__(self, number: int, seed: int, has_extents: bool) -> None:
        self.number, self.chance = number, random.Random(f"{seed}:{number}")
        self.model = Node(0, stat.S_IFDIR | 0o755, 2)
        self.own = self.shared = self.records = b""
        self.full = False
        self.refused = self.serial = self.appended = 0
        self.held: list[tuple[int, bytes]] = []
        self.kinds: list[tuple[Callable[[], None], int]] = [
            (self.create, 10), (self.mkdir, 4), (self.symlink, 4), (self.special, 1), (self.link, 5), (self.unlink, 6),
            (self.rmdir, 3), (self.rename, 8), (self.exchange, 2), (self.append, 10), (self.overwrite, 8),
            (self.store, 4), (self.write_far, 3), (self.truncate, 6), (self.set_xattr, 6), (self.remove_xattr, 2),
            (self.chmod, 3), (self.tmpfile, 2), (self.crowd, 1), (self.replace, 4), (self.hold, 2), (self.list, 5),
            (self.look, 8), (self.fsync, 3), (self.race, 40), (self.append_record, 6)]
        if has_extents:
            self.kinds += [(self.reserve, 3), (self.punch, 4)]

    # ---- commands

    def begin(self, mount: str) -> int:
        """Make this process's directory."""
        self._at(mount)
        os.mkdir(self.own, 0o755)
        return 0

    def work(self, mount: str, count: int, full: bool) -> int:
        """Do so many random things; the number of those that a full disk refused."""
        self._at(mount)
        self.full, self.refused = full, 0
        for _ in range(count):
            kind = self.chance.choices([kind for kind, _ in self.kinds], [weight for _, weight in self.kinds])[0]
            try:
                kind()
            except OSError as error:
                if error.errno != errno.ENOSPC or not full:
                    raise Wrong(f"{kind.__name__}: {error}") from error
                self.refused += 1
        self._let_go()
        return self.refused

    def verify(self, mount: str) -> int:
        """Compare the directory with the model; the number of names in it."""
        self._at(mount)
        expected, found = Snapshot(self.model).tree, tree_of_mount(Path(os.fsdecode(self.own)))
        for path in sorted(expected.keys() | found.keys()):
            if expected.get(path) != found.get(path):
                raise Wrong(f"{path!r}: {_short(expected.get(path))} expected, found {_short(found.get(path))}")
        self._verify_records()
        return len(found)

    def _at(self, mount: str) -> None:
        names = f"own-{self.number}", "shared", "records"
        self.own, self.shared, self.records = (os.fsencode(f"{mount}/{name}") for name in names)

    def _let_go(self) -> None:
        """Close the files that have no name; what they hold is still as it was written."""
        while self.held:
            fd, data = self.held.pop()
            try:
                if os.pread(fd, len(data) + 1, 0) != data:
                    raise Wrong("a file that was open while it was deleted has other content")
            finally:
                os.close(fd)

    # ---- choosing

    def places(self, wanted: Callable[[Node], bool]) -> list[Place]:
        folders = [(b"", self.model), *((path, node) for path, node in walk(self.model) if node.is_dir)]
        return [(path, parent, name, node) for path, parent in folders for name, node in parent.children.items()
                if wanted(node)]

    def some(self, wanted: Callable[[Node], bool]) -> Place | None:
        found = self.places(wanted)
        return self.chance.choice(found) if found else None

    def folder(self) -> tuple[bytes, Node]:
        return self.chance.choice([(b"", self.model), *((path, node) for path, node in walk(self.model) if node.is_dir
                                                        and path.count(b"/") < 6)])

    def name(self) -> bytes:
        self.serial += 1
        return b"%d" % self.serial + b"n" * self.chance.choice((0, 0, 3, 30, 200))

    def bytes(self, count: int) -> bytes:
        return self.chance.randbytes(count)

    def length(self) -> int:
        return self.chance.choice((1, 100, 512, 1024, 4096, 5000, 20_000, self.chance.randrange(1, 60_000)))

    @property
    def crowded(self) -> bool:
        return sum(1 for _ in walk(self.model)) > NODES_MOST

    def path(self, folder: bytes, name: bytes) -> bytes:
        return self.own + folder + b"/" + name

    # ---- names

    def create(self) -> None:
        if self.crowded:
            return self.unlink()
        (folder, parent), name, mode = self.folder(), self.name(), self.chance.choice((0o644, 0o600, 0o755))
        os.close(os.open(self.path(folder, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        parent.children[name] = Node(0, stat.S_IFREG | mode)
        return None

    def mkdir(self) -> None:
        (folder, parent), name = self.folder(), self.name()
        os.mkdir(self.path(folder, name), 0o755)
        parent.children[name] = Node(0, stat.S_IFDIR | 0o755, 2)
        parent.links += 1

    def symlink(self) -> None:
        (folder, parent), name, target = self.folder(), self.name(), b"t" * self.chance.choice((5, 59, 60, 900))
        os.symlink(target, self.path(folder, name))
        parent.children[name] = Node(0, stat.S_IFLNK | 0o777, data=target)

    def special(self) -> None:
        (folder, parent), name = self.folder(), self.name()
        kind = self.chance.choice((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR))
        os.mknod(self.path(folder, name), kind | 0o600, os.makedev(1, 300))
        parent.children[name] = Node(0, kind | 0o600)

    def link(self) -> None:
        place = self.some(lambda node: not node.is_dir)
        if place is None or self.crowded:
            return
        (folder, parent), name = self.folder(), self.name()
        os.link(self.path(place[0], place[2]), self.path(folder, name), follow_symlinks=False)
        place[3].links += 1
        parent.children[name] = place[3]

    def unlink(self) -> None:
        place = self.some(lambda node: not node.is_dir)
        if place is not None:
            os.unlink(self.path(place[0], place[2]))
            _forget(place)

    def rmdir(self) -> None:
        place = self.some(lambda node: node.is_dir)
        if place is None:
            return
        folder, parent, name, node = place
        try:
            os.rmdir(self.path(folder, name))
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not node.children:
                raise
            return
        if node.children:
            raise Wrong(f"a directory with {len(node.children)} names was removed")
        del parent.children[name]
        parent.links -= 1

    def rename(self) -> None:
        """To a new name; now and then over another file."""
        place = self.some(lambda node: True)
        if place is None:
            return
        folder, parent, name, node = place
        goal, target = self.folder()
        over = self.some(lambda other: not other.is_dir and other is not node)
        if self.inside(goal, folder, name, node) or (node.is_dir and goal.count(b"/") > folder.count(b"/")):
            return      # trees do not become higher
        new = self.name()
        if over is not None and not node.is_dir and self.chance.random() < 0.4:
            goal, target, new, _ = over
            os.rename(self.path(folder, name), self.path(goal, new))
            _forget(over)
        else:
            renameat2(self.path(folder, name), self.path(goal, new), self.chance.choice((0, NOREPLACE)))
        del parent.children[name]
        target.children[new] = node
        if node.is_dir:
            parent.links -= 1
            target.links += 1

    def inside(self, goal: bytes, folder: bytes, name: bytes, node: Node) -> bool:
        """Whether a directory lies in what is to be moved there; the file system must see that, too."""
        if not node.is_dir or not (goal + b"/").startswith(folder + b"/" + name + b"/"):
            return False
        with suppress(OSError):
            os.rename(self.path(folder, name), self.path(goal, b"impossible"))
            raise Wrong("a directory was moved into itself")
        return True

    def exchange(self) -> None:
        one, other = (self.some(lambda node: not node.is_dir) for _ in range(2))
        if one is None or other is None:
            return
        renameat2(self.path(one[0], one[2]), self.path(other[0], other[2]), EXCHANGE)
        one[1].children[one[2]], other[1].children[other[2]] = other[3], one[3]

    def crowd(self) -> None:
        """Many names in one directory, which then go in another order."""
        folder, parent = self.folder()
        names = [b"crowd-%d-" % index + self.name() for index in range(self.chance.randrange(CROWD_MOST))]
        done = []
        try:
            for name in names:
                os.mknod(self.path(folder, name), stat.S_IFREG | 0o644)
                done.append(name)
        finally:
            if not {*done, *parent.children} == set(os.listdir(self.own + folder)):
                raise Wrong(f"{folder!r}: other names than were made")
            self.chance.shuffle(done)
            for name in done:
                os.unlink(self.path(folder, name))

    def list(self) -> None:
        folder, parent = self.folder()
        found = os.listdir(self.own + folder)
        if len(found) != len(set(found)) or set(found) != parent.children.keys():
            raise Wrong(f"{folder!r}: listed {sorted(found)}, not {sorted(parent.children)}")

    # ---- data

    def file(self) -> Place | None:
        return self.some(lambda node: node.is_file)

    def append(self) -> None:
        place = self.file()
        if place is not None and len(place[3].data) < FILE_MOST_BYTES:
            self._write(place, len(place[3].data), self.bytes(self.length()))

    def overwrite(self) -> None:
        place = self.file()
        if place is not None:
            self._write(place, self.chance.randrange(len(place[3].data) + 1), self.bytes(self.length()))

    def write_far(self) -> None:
        place = self.file()
        if place is not None and len(place[3].data) < FILE_MOST_BYTES:
            self._write(place, len(place[3].data) + self.chance.randrange(50_000), self.bytes(self.length()))

    def _write(self, place: Place, offset: int, data: bytes) -> None:
        """Write; a file that there is no room for is deleted, as nobody can say how much of it is there."""
        folder, _, name, node = place
        sync = self.chance.random() < 0.2
        try:
            _write_all(self.path(folder, name), offset, data, os.O_WRONLY, sync)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._lose(node)
            raise
        node.data = node.data[:offset].ljust(offset, b"\0") + data + node.data[offset + len(data):]

    def _lose(self, node: Node) -> None:
        for place in self.places(lambda other: other is node):
            os.unlink(self.path(place[0], place[2]))
            _forget(place)

    def store(self) -> None:
        """Through a shared mapping."""
        place = self.some(lambda node: node.is_file and bool(node.data))
        if place is None:
            return
        folder, _, name, node = place
        start = self.chance.randrange(len(node.data))
        data = self.bytes(min(self.length(), len(node.data) - start))
        fd = os.open(self.path(folder, name), os.O_RDWR)
        try:
            with mmap.mmap(fd, len(node.data)) as mapped:
                mapped[start:start + len(data)] = data
                if self.chance.random() < 0.5:
                    mapped.flush()
            os.fsync(fd)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._lose(node)
            raise
        finally:
            os.close(fd)
        node.data = node.data[:start] + data + node.data[start + len(data):]

    def truncate(self) -> None:
        place = self.file()
        if place is None:
            return
        folder, _, name, node = place
        size = self.chance.choice((0, self.chance.randrange(len(node.data) + 1), self.chance.randrange(100_000)))
        os.truncate(self.path(folder, name), size)
        node.data = node.data[:size].ljust(size, b"\0")

    def reserve(self) -> None:
        place = self.file()
        if place is None:
            return
        offset, length, mode = self.chance.randrange(100_000), self.length(), self.chance.choice((0, KEEP_SIZE))
        try:
            self._fallocate(place, mode, offset, length)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._lose(place[3])
            raise
        if not mode:
            place[3].data = place[3].data.ljust(offset + length, b"\0")

    def punch(self) -> None:
        place = self.some(lambda node: node.is_file and bool(node.data))
        if place is None:
            return
        node = place[3]
        start = self.chance.randrange(len(node.data))
        end = min(start + self.length(), len(node.data))
        self._fallocate(place, PUNCH_HOLE | KEEP_SIZE, start, end - start)
        node.data = node.data[:start] + bytes(end - start) + node.data[end:]

    def _fallocate(self, place: Place, mode: int, offset: int, length: int) -> None:
        fd = os.open(self.path(place[0], place[2]), os.O_WRONLY)
        try:
            fallocate(fd, mode, offset, length)
        finally:
            os.close(fd)

    def replace(self) -> None:
        """A new content by the usual steps: write aside, fsync, rename over."""
        place = self.file()
        if place is None:
            return
        folder, parent, name, _ = place
        aside, data = self.path(folder, self.name()), self.bytes(self.length())
        try:
            _write_all(aside, 0, data, os.O_CREAT | os.O_EXCL | os.O_WRONLY, sync=True)
            os.rename(aside, self.path(folder, name))
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(aside)
            raise
        _forget(place)
        parent.children[name] = Node(0, stat.S_IFREG | 0o644, data=data)

    def tmpfile(self) -> None:
        """A file that gets its name last."""
        (folder, parent), name, data = self.folder(), self.name(), self.bytes(self.length())
        fd = os.open(self.own + folder, os.O_TMPFILE | os.O_RDWR, 0o644)
        try:
            _write_through(fd, data)
            if self.chance.random() < 0.7:
                link_opened(fd, self.path(folder, name))
                parent.children[name] = Node(0, stat.S_IFREG | 0o644, data=data)
        finally:
            os.close(fd)

    def hold(self) -> None:
        """A file that loses its name while it is open."""
        (folder, _), name, data = self.folder(), self.name(), self.bytes(self.length())
        fd = os.open(self.path(folder, name), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        try:
            os.unlink(self.path(folder, name))
            _write_through(fd, data)
        except OSError:
            os.close(fd)
            raise
        self.held.append((fd, data))

    def fsync(self) -> None:
        place = self.some(lambda node: node.is_file or node.is_dir)
        if place is not None:
            fd = os.open(self.path(place[0], place[2]), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def look(self) -> None:
        """One name in all its parts."""
        place = self.some(lambda node: True)
        if place is None:
            return
        folder, _, name, node = place
        found = state_of_path(self.path(folder, name))
        if found != node.state():
            raise Wrong(f"{folder!r}/{name!r}: {_short(node.state())} expected, found {_short(found)}")

    # ---- attributes

    def set_xattr(self) -> None:
        place = self.some(lambda node: node.is_file or node.is_dir)
        if place is not None:
            name, value = self.chance.choice(XATTRS), self.bytes(self.chance.choice(XATTR_LENGTHS))
            try:
                os.setxattr(self.path(place[0], place[2]), b"user." + name, value)
            except OSError as error:
                if error.errno == errno.ENOSPC:     # all attributes of a file share one block
                    return
                raise
            place[3].xattrs[name] = value

    def remove_xattr(self) -> None:
        place = self.some(lambda node: bool(node.xattrs))
        if place is not None:
            name = self.chance.choice(sorted(place[3].xattrs))
            os.removexattr(self.path(place[0], place[2]), b"user." + name)
            del place[3].xattrs[name]

    def chmod(self) -> None:
        place = self.some(lambda node: node.is_file or node.is_dir)
        if place is not None:
            mode = self.chance.choice((0o700, 0o644, 0o755, 0o1777))
            os.chmod(self.path(place[0], place[2]), mode)
            place[3].mode = stat.S_IFMT(place[3].mode) | mode

    # ---- with the others

    def race(self) -> None:
        """One call in the shared directory."""
        one, other = (self.shared + self.chance.choice(SHARED_FOLDERS) + b"/" + self.chance.choice(SHARED_NAMES)
                      for _ in range(2))
        calls: list[Callable[[], object]] = [
            lambda: os.mknod(one, stat.S_IFREG | 0o644),
            lambda: _write_all(one, self.chance.randrange(9000), self.bytes(3000), os.O_CREAT | os.O_WRONLY, False),
            lambda: os.unlink(one), lambda: os.mkdir(one), lambda: os.rmdir(one),
            lambda: os.link(one, other, follow_symlinks=False), lambda: os.symlink(other, one),
            lambda: renameat2(one, other, self.chance.choice((0, 0, NOREPLACE, EXCHANGE))),
            lambda: os.truncate(one, self.chance.randrange(9000)), lambda: os.listdir(one), lambda: os.lstat(one),
            lambda: os.setxattr(one, b"user.race", self.bytes(200)), lambda: os.removexattr(one, b"user.race"),
            lambda: os.chmod(one, 0o755), lambda: os.utime(one)]
        try:
            self.chance.choice(calls)()
        except OSError as error:
            if error.errno not in RACES:
                raise

    def append_record(self) -> None:
        """To a file that all append to."""
        if self.full:
            return
        fd = os.open(self.records, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, (b"%d:%d" % (self.number, self.appended)).ljust(RECORD_BYTES - 1) + b"\n")
        finally:
            os.close(fd)
        self.appended += 1

    def _verify_records(self) -> None:
        with open(self.records, "rb") as file:
            lines = file.read().split(b"\n")
        mine = [int(text.split(b":")[1]) for text in lines if text.startswith(b"%d:" % self.number)]
        if mine != list(range(self.appended)):
            raise Wrong(f"{len(mine)} of {self.appended} records are in the file that all append to")


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _forget(place: Place) -> None:
    del place[1].children[place[2]]
    place[3].links -= 1


def _write_through(fd: int, data: bytes) -> None:
    if os.pwrite(fd, data, 0) < len(data):
        raise OSError(errno.ENOSPC, "a short write")
    os.fsync(fd)


def _write_all(path: bytes, offset: int, data: bytes, flags: int, sync: bool) -> None:
    fd = os.open(path, flags, 0o644)
    try:
        if os.pwrite(fd, data, offset) < len(data):
            raise OSError(errno.ENOSPC, "a short write")
        if sync:
            os.fsync(fd)
    except OSError:
        with suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)    # tells what writing back could not do


def _short(state: State | None) -> str:
    if state is None:
        return "nothing"
    return f"{state._replace(data=state.data[:40])} with sum {hashlib.blake2b(state.data, digest_size=6).hexdigest()}"


def main(number: str, seed: str, has_extents: str) -> None:
    """Answer commands until there are no more."""
    os.umask(0o022)
    worker = Worker(int(number), int(seed), has_extents == "True")
    for text in sys.stdin:
        name, *arguments = json.loads(text)
        try:
            answer = getattr(worker, name)(*arguments)
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
