"""Arguments → device → mount → serve → unmount: the one module that knows all others.

The process forks before it starts a thread or a loop.  The parent waits on a pipe until the mount answers, and ends
with exit code 0; if the child ends before, with the child's code.  Until then the child has the terminal: an error is a
line there.  The order of a start:

    options → lock and open the source → superblock, root directory → loop device
    → /dev/fuse, mount in a thread, INIT answered by another's message → loop → first answer → "ready"
"""

import argparse
import asyncio
import gc
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import uvloop

from fusewire import __version__, accel, bdi, log, mount, mountinfo, remount, runtime, uevents, unmount
from fusewire.arguments import EXIT_OK, EXIT_SYSTEM, EXIT_USAGE, Failure, Parser, say
from fusewire.ext4 import errorlog
from fusewire.mount import Mounting
from fusewire.mountrequest import MountError, MountRequest
from fusewire.options import MS_RDONLY, MountOptions, OptionError, parse_options
from fusewire.server import Server
from fusewire.session import Session
from fusewire.source import Source, attach_loop, can_be_fuseblk, open_file_system, open_source
from fusewire.wire import ProtocolError
from fusewire.wirelog import WireLog

DESCRIPTION = "Mount an ext4 file system, on a device or in an image file, and serve it in the background."
EPILOG = """\
options, separated by commas: those of mount(8) and ext4(5), among them
  ro                read-only (the default)
  rw                for writing, through the journal (young: have a backup)
  noload            show the file system as it stands, its journal not replayed (with ro)
  commit=SECONDS    how long a change may wait until it is durable (5)
  sync, dirsync     every change, or every change of names, is durable before its call returns
  nobarrier         do not flush the device's cache: a power cut may damage the file system
  discard           tell the device what became free
  grpid, resuid=UID, resgid=GID, max_dir_size_kb=N, errors=…    as with the kernel's ext4
and those of fusewire
  part=N            the file system is in partition N of SOURCE, a whole disk
  offset=BYTES      … or begins at a byte (512 B, 1M …); sizelimit=BYTES where it ends
  noloop            do not put an image behind a loop device
  cache_size=MIB    memory for metadata (64)

examples:
  fusewire mount disk.img /mnt
  fusewire mount -f -o part=2 whole-disk.img /mnt
  fusewire mount -o ro,noatime /dev/sdb1 /mnt

Exit codes are those of mount(8): 0 mounted, 1 wrong usage, 2 system error, 32 mount failure."""

MOST_FUSEBLK_BLOCK_BYTES = 4096     # the kernel accepts up to a page
READAHEAD_KIB = 1024
BUSY_SECONDS = 5.0      # how long users of the mount may finish after SIGTERM, before they are cut off
WRITE_BACK_SECONDS = 60.0   # how long the kernel may then take to hand over what they wrote
LEAVING_SECONDS = 2.0   # … and to end the connection
FIRST_EVENT_SECONDS = 1.0   # after which "mounted" is logged: the import of structlog must not delay the first answers
# Objects allocated before a collection: the core makes no cycles, and a pass over a full cache stops us for 100 ms.
GC_THRESHOLDS = (100_000, 50, 100)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says."""

    source: str
    target: str             # absolute: the daemon leaves its directory
    options: MountOptions
    foreground: bool
    wirelog: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mount`` to a parser."""
    parser.add_argument("source", metavar="SOURCE", help="a block device or an image file")
    parser.add_argument("target", metavar="TARGET", help="the directory to mount on")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="OPTIONS", help="see below")
    parser.add_argument("-r", "--read-only", action="store_true", help="same as -o ro")
    parser.add_argument("-f", "--foreground", action="store_true", help="do not go into the background")
    parser.add_argument("--wirelog", metavar="FILE", help="record every request and reply as JSON lines")


def main(argv: Sequence[str] | None = None) -> int:
    """``fusewire mount`` by itself: the exit code."""
    parser = Parser(prog="fusewire mount", description=DESCRIPTION, epilog=EPILOG,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"fusewire {__version__}")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Mount and serve, or start a process that does: the exit code."""
    try:
        settings = _settings(args)
        return _serve(settings, _nothing) if settings.foreground else _serve_in_background(settings)
    except Failure as failure:
        say(str(failure))
        return failure.code


def _nothing() -> None:
    """In the foreground nobody waits to hear that the mount answers."""


def _settings(args: argparse.Namespace) -> Settings:
    try:
        options = parse_options(",".join(args.options + (["ro"] if args.read_only else [])))
    except OptionError as error:
        raise Failure(str(error), EXIT_USAGE) from error
    wirelog = os.path.abspath(args.wirelog) if args.wirelog else None
    return Settings(args.source, os.path.abspath(args.target), options, args.foreground, wirelog)


# --- Going into the background ----------------------------------------------------------------------------------------


def _serve_in_background(settings: Settings) -> int:
    """In the parent: 0 once the mount answers, else the child's exit code.  In the child: its exit code, at the end."""
    heard, tell = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        raise Failure(f"{settings.source}: cannot start a process: {error.strerror}", EXIT_SYSTEM) from error
    if child:
        os.close(tell)
        return EXIT_OK if os.read(heard, 1) else _exit_code(child)
    os.close(heard)
    os.setsid()
    return _serve(settings, lambda: _leave_terminal(tell))


def _exit_code(child: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code > 0 else EXIT_SYSTEM    # killed, or ended without serving


def _leave_terminal(tell: int) -> None:
    """The mount answers: let go of the terminal and the directory, and tell the parent."""
    log.to_syslog()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.write(tell, b"\n")
    os.close(tell)


# --- From the source to the mount -------------------------------------------------------------------------------------


def _serve(settings: Settings, ready: Callable[[], None]) -> int:
    """Mount, call ``ready`` when the mount answers, serve until the end; the exit code.  ``Failure`` before ready."""
    options = settings.options
    accel.install()
    with ExitStack() as stack:
        wirelog = _open_wirelog(settings.wirelog)
        if wirelog is not None:
            stack.callback(wirelog.close)
        source = open_source(settings.source, options)
        stack.callback(source.close)
        fs, journal, notes = open_file_system(source, options)
        for sentence in (*options.notes(), *source.lock.warnings, *notes, *fs.superblock.warnings()):
            say(f"{settings.source}: {sentence}")
        mounted = remount.asked_for(_flags(options))
        session = Session(fs, read_only=fs.writing is None, target=os.fsencode(settings.target), mounted=mounted)
        mounting = _prepare(settings, source, fs.geometry.block_bytes)
        stack.callback(os.close, mounting.fd)
        attached = mount.in_thread(mounting.attach)
        source.device.barrier = options.barrier is not False
        server = Server(mounting.fd, session, source.device, wirelog, journal,
                        commit_seconds=options.commit_seconds, discard=bool(options.discard),
                        errors=errorlog.policy(fs.superblock.fields["errors"], options.errors))
        _answer_init(settings, mounting, server, attached)
        uvloop.run(_serve_mounted(settings, source, server, mounting, attached, ready))
    return EXIT_OK


def _open_wirelog(path: str | None) -> WireLog | None:
    if path is None:
        return None
    try:
        return WireLog(path)
    except OSError as error:
        raise Failure(f"{path}: {(error.strerror or str(error)).lower()}", EXIT_USAGE) from error


def _flags(options: MountOptions) -> int:
    """MS_* of the mount: read-only unless the options say otherwise."""
    return options.flags | (0 if options.writes else MS_RDONLY)


def _prepare(settings: Settings, source: Source, block_bytes: int) -> Mounting:
    """A mount ready to be made, behind a loop device where that is possible and wanted."""
    options = settings.options
    fuseblk = can_be_fuseblk(source, options, mount.route() is mount.Route.ROOT)
    if fuseblk and not source.is_device:
        attach_loop(source, not options.writes)
    request = MountRequest(
        source=source.mount_name,
        target=settings.target,
        flags=_flags(options),
        fuseblk=fuseblk,
        block_bytes=min(block_bytes, MOST_FUSEBLK_BLOCK_BYTES),
        allow_other=os.getuid() == 0 if options.allow_other is None else options.allow_other,
        security=options.security,
    )
    try:
        mounting = mount.prepare(request)
    except MountError as error:
        raise Failure(str(error)) from error
    if fuseblk and source.is_device:
        source.lock.release()   # the kernel claims the device now, as the mount's
    return mounting


def _answer_init(settings: Settings, mounting: Mounting, server: Server, attached: Future[None]) -> None:
    """Wait for INIT, or for the mount to fail, and answer it."""
    first = mount.in_thread(mounting.first_message)
    both: tuple[Future[Any], ...] = (attached, first)
    wait(both, return_when=FIRST_COMPLETED)
    if attached.done():
        _check_attached(attached)
    try:
        server.answer_first(first.result())
    except (ProtocolError, OSError) as error:
        raise Failure(f"{settings.target}: the kernel's first message: {error}", EXIT_SYSTEM) from error


def _check_attached(attached: Future[None]) -> None:
    try:
        attached.result()
    except MountError as error:
        raise Failure(str(error)) from error
    except OSError as error:
        raise Failure(f"mount: {error.strerror or error}", EXIT_SYSTEM) from error


# --- The loop ---------------------------------------------------------------------------------------------------------


async def _serve_mounted(settings: Settings, source: Source, server: Server, mounting: Mounting,
                         attached: Future[None], ready: Callable[[], None]) -> None:
    """Serve; as soon as the mount is there and answers, say so."""
    loop = asyncio.get_running_loop()
    bdi.clean_pages()   # before there are threads
    serving: asyncio.Future[Any] = asyncio.ensure_future(server.serve())
    ending: list[asyncio.Task[None]] = []

    def end() -> None:
        if not ending:
            ending.append(asyncio.ensure_future(_end(settings, server, serving, attached)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    await asyncio.wait([serving, _awaitable(attached)], return_when=asyncio.FIRST_COMPLETED)
    if attached.done():
        _check_attached(attached)
    # What asks our own mount must not run in the loop's thread, which answers it.
    started = _awaitable(mount.in_thread(lambda: _after_mount(settings, source, mounting, server)))
    await asyncio.wait([serving, started], return_when=asyncio.FIRST_COMPLETED)
    if source.loop is not None:
        source.loop.close()     # the mount keeps it now
    ready()
    gc.freeze()     # what start-up made stays; without a collection before, which would stop us for 13 ms
    gc.set_threshold(*GC_THRESHOLDS)
    loop.call_later(FIRST_EVENT_SECONDS, _settle, settings, source)
    await serving
    if started.done() and not started.exception():
        registration = started.result()
        if registration is not None:
            registration.remove()


def _settle(settings: Settings, source: Source) -> None:
    """What can wait until the first requests are answered: their answers must not wait for large imports."""
    access = "for writing" if settings.options.writes else "read-only (-o rw mounts for writing)"
    log.info("mounted", source=settings.source, target=settings.target, access=access, version=__version__)
    if source.is_device:
        uevents.watch(source.device)


def _awaitable(result: Future[Any]) -> "asyncio.Future[Any]":
    return asyncio.wrap_future(result)


def _after_mount(settings: Settings, source: Source, mounting: Mounting,
                 server: Server) -> runtime.Registration | None:
    """What is left to do once the mount exists, and a first request to it."""
    if not mounting.sync_init:
        with suppress(OSError):
            os.stat(settings.target)
    bdi.raise_readahead(settings.target, READAHEAD_KIB)
    if settings.options.access == "rw":
        bdi.raise_dirty_limit(settings.target)
    found = mountinfo.find(settings.target)
    if found is not None:
        remount.watch(found.dev, remount.asked_for(mounting.request.flags), server.remounted)
    device = source.mount_name if mounting.request.fuseblk else ""
    loop = source.loop.number if source.loop is not None else -1
    return runtime.register(settings.source, settings.target, device=device, loop=loop, version=__version__)


async def _end(settings: Settings, server: Server, serving: "asyncio.Future[None]", attached: Future[None]) -> None:
    """SIGTERM: unmount as soon as nobody uses the mount.  Users that do not leave in time are cut off.

    Either way everything that was written until then is fetched from the kernel, and on the device when we end.
    """
    await asyncio.wait([serving, _awaitable(attached)], return_when=asyncio.FIRST_COMPLETED, timeout=BUSY_SECONDS)
    left = _awaitable(mount.in_thread(lambda: _leave(settings.target)))
    await asyncio.wait([serving, left], return_when=asyncio.FIRST_COMPLETED, timeout=BUSY_SECONDS + WRITE_BACK_SECONDS)
    if not serving.done():
        await asyncio.wait([serving], timeout=LEAVING_SECONDS)
    server.stop()


def _leave(target: str) -> None:
    with suppress(MountError, OSError):
        unmount.leave(target, BUSY_SECONDS)
