"""A FUSE server of an empty directory, for the tests of mounting alone: it uses ``fusewire.mount``, nothing above it.

``serving`` starts it in a child process, which may first become somebody else; the child tells in JSON lines what it
has mounted and how it ended.  The wire records are written by hand from linux/fuse.h: these tests need no other part.
"""

import argparse
import ctypes
import encodings.ascii  # noqa: F401 - a user may not be able to read the interpreter's own files when it is needed
import errno
import json
import os
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

import pytest

from fusewire import loopdev, mount, mountapi, mountinfo, runtime
from fusewire.mountrequest import MountError, MountRequest
from fusewire.options import parse_options

LOOKUP, FORGET, GETATTR, STATFS, INIT, OPENDIR, READDIR, RELEASEDIR, DESTROY = 1, 2, 3, 17, 26, 27, 28, 29, 38
BATCH_FORGET, INTERRUPT = 42, 36
_PR_SET_DUMPABLE = 4
Say = Callable[[dict[str, Any]], None]
_IN_HEADER = struct.Struct("=IIQQ")


def init_reply(message: bytes) -> bytes:
    """The answer to an INIT message that accepts nothing optional."""
    minor, readahead = struct.unpack_from("=II", message, 44)
    body = struct.pack("=IIIIHHII", 7, min(minor, 31), readahead, 0, 12, 9, 131072, 1).ljust(64, b"\0")
    return reply(message, 0, body)


def reply(message: bytes, error: int, body: bytes = b"") -> bytes:
    """A reply to a request."""
    return struct.pack("=IiQ", 16 + len(body), -error, _IN_HEADER.unpack_from(message)[2]) + body


def attributes() -> bytes:
    """fuse_attr of the root directory."""
    return struct.pack("=6Q10I", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)


def answer(message: bytes) -> bytes | None:
    """The reply to a request; None where there is none."""
    opcode = _IN_HEADER.unpack_from(message)[1]
    if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
        return None
    bodies = {
        INIT: None,
        GETATTR: struct.pack("=QII", 0, 0, 0) + attributes(),
        STATFS: struct.pack("=5Q4I24x", 7, 5, 5, 3, 2, 4096, 255, 4096, 0),
        OPENDIR: bytes(16), READDIR: b"", RELEASEDIR: b"", DESTROY: b"",
    }
    if opcode == INIT:
        return init_reply(message)
    body = bodies.get(opcode)
    if body is None:
        return reply(message, errno.ENOENT if opcode == LOOKUP else errno.ENOSYS)
    return reply(message, 0, body)


def serve(fd: int) -> bool:
    """Answer until unmounted; whether DESTROY came."""
    destroyed = False
    os.set_blocking(fd, True)
    while True:
        try:
            message = os.read(fd, 1 << 20)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return destroyed
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue
            raise
        destroyed = destroyed or _IN_HEADER.unpack_from(message)[1] == DESTROY
        response = answer(message)
        if response is not None:
            os.write(fd, response)


def start(request: MountRequest) -> mount.Mounting:
    """A mount that has answered INIT."""
    mounting = mount.prepare(request)
    mounted = mount.in_thread(mounting.attach)
    first = mount.in_thread(mounting.first_message)
    while not first.done() and not (mounted.done() and mounted.exception()):
        time.sleep(0.001)
    if first.done():
        os.write(mounting.fd, init_reply(first.result()))
    mounted.result()
    return mounting


def run(arguments: Sequence[str], say: Say) -> None:
    """Mount, tell about it, serve until unmounted, tell about that."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fuseblk", action="store_true")
    parser.add_argument("--image", help="what to put behind a loop device, and mount")
    parser.add_argument("--hold", help="a FIFO: after unmounting, live on until it has been read")
    parser.add_argument("--visit", action="store_true", help="look into the mount and unmount it, from a thread")
    parser.add_argument("-o", default="ro")
    parser.add_argument("source")
    parser.add_argument("target")
    args = parser.parse_args(arguments)
    try:
        mounting, loop = _mount(args)
    except MountError as error:
        say({"error": str(error)})
        return
    device = f"/dev/loop{loop}" if loop >= 0 else ""
    entry = runtime.register(args.source, args.target, device=device, loop=loop, version="test")
    found = mountinfo.find(args.target)
    say({
        "sync_init": mounting.sync_init, "route": mounting.route.name, "loop": loop,
        "record": str(entry.path) if entry else None,
        "fstype": found and found.fstype, "source": found and os.fsdecode(found.source), "dev": found and found.dev,
        "options": found and found.options, "super_options": found and found.super_options,
    })
    visit = mount.in_thread(lambda: _visit(args.target)) if args.visit else None
    destroyed = serve(mounting.fd)
    if args.hold:
        with open(args.hold, "rb") as fifo:
            fifo.read()
    if entry:
        entry.remove()
    say({"destroyed": destroyed, "visit": visit.result() if visit else None})


def _mount(args: argparse.Namespace) -> tuple[mount.Mounting, int]:
    options = parse_options(args.o)
    source, device = args.source, None
    if args.image:
        image = os.open(args.image, os.O_RDONLY | os.O_CLOEXEC)
        device = loopdev.attach(image, args.image, loopdev.Part(read_only=True))
        source = device.path
    mounting = start(MountRequest(
        source, args.target, flags=options.flags, fuseblk=args.fuseblk, allow_other=bool(options.allow_other),
        security=options.security,
    ))
    if device:
        device.close()
    return mounting, device.number if device else -1


def _visit(target: str) -> dict[str, Any]:
    names, blocks = os.listdir(target), os.statvfs(target).f_blocks
    mountapi.umount(os.fsencode(target))
    return {"names": names, "blocks": blocks}


# --- In a child process -----------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A child that serves: what it told first, and how to hear the next line."""

    pid: int
    facts: dict[str, Any]
    pipe: IO[bytes]

    def next(self) -> dict[str, Any]:
        """The child's next line; empty at its end."""
        line = self.pipe.readline()
        return dict(json.loads(line)) if line else {}


def as_user(uid: int, runtime_directory: str = "/nonexistent") -> Callable[[], None]:
    """Become an ordinary user for good."""
    def become() -> None:
        os.environ["XDG_RUNTIME_DIR"] = runtime_directory
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)    # as after an execve: /proc/self belongs to the user
    return become


def nobody_else() -> None:
    """Stay who one is."""


def in_child(work: Callable[[Say], None], become: Callable[[], None]) -> tuple[int, IO[bytes]]:
    """(process id, pipe) of a child that does some work as somebody, and may say JSON objects."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become()
            work(lambda fact: _say(theirs, fact))
        except BaseException:
            _say(theirs, {"traceback": traceback.format_exc()})
        finally:
            os._exit(0)
    os.close(theirs)
    return child, os.fdopen(ours, "rb")


def _say(fd: int, fact: dict[str, Any]) -> None:
    os.write(fd, json.dumps(fact).encode() + b"\n")


@contextmanager
def serving(*arguments: str, become: Callable[[], None] = nobody_else) -> Iterator[Served]:
    """The server in a child, ended with the ``with`` block if it still runs then."""
    child, pipe = in_child(lambda say: run(arguments, say), become)
    served = Served(child, {}, pipe)
    try:
        served.facts = served.next()
        if "traceback" in served.facts:
            pytest.fail(served.facts["traceback"])
        yield served
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, 9)
        os.waitpid(child, 0)
        pipe.close()
        with suppress(OSError):
            mountapi.umount(os.fsencode(arguments[-1]), mountapi.MNT_DETACH)
