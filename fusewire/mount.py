"""Opening ``/dev/fuse`` and mounting it, as root, inside a user namespace, or as an ordinary user through fusermount3.

Theory of operation.  ``prepare`` opens the device and tells the kernel, where it can (6.18), that the mount shall wait
until INIT is answered.  Then ``attach`` makes the mount; with that promise it blocks, so it runs in a thread while
another reads and answers INIT: ``first_message`` waits for it.

    mounting = prepare(request)
    mounted = in_thread(mounting.attach)
    message = in_thread(mounting.first_message).result()    # answer it, start the loop
    mounted.result()                                        # MountError if there is no mount

M1  poll or epoll of the fd must not begin before ``first_message`` has returned: after SYNC_INIT both block in the
    kernel until the mount exists, without it they report an error.
M2  if ``attach`` fails, ``first_message`` may wait for ever: its thread is a daemon thread, the fd of no further use.

fusermount3 hands over the fd of a finished mount, so there ``prepare`` does all of it and ``attach`` nothing.
Sources: fuse-vanilla-notes.md 10, fuse-iomap.md 1.5, user_namespaces(7).
"""

import enum
import errno
import os
import select
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fusewire import fusermount, ioctl, mountapi
from fusewire.mountapi import MountFailed
from fusewire.mountrequest import SUBTYPE, MountError, MountRequest

DEVICE = "/dev/fuse"
_ROOT_MODE = "40000"            # S_IFDIR in octal
_INIT_BUFFER_BYTES = 8192       # FUSE_MIN_READ_BUFFER: what the kernel insists on before INIT
_CAP_SYS_ADMIN = 21
_CONNECTIONS = Path("/sys/fs/fuse/connections")

T = TypeVar("T")


class Route(enum.Enum):
    """The way in which this process can mount."""

    ROOT = "as root"
    USER_NAMESPACE = "inside a user namespace"
    FUSERMOUNT = "through fusermount3"


def may_administer() -> bool:
    """Whether this process has CAP_SYS_ADMIN in its user namespace."""
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return os.geteuid() == 0


def in_initial_namespace() -> bool:
    """Whether user ids here are those of the whole machine."""
    try:
        return Path("/proc/self/uid_map").read_text("ascii").split() == ["0", "0", "4294967295"]
    except OSError:             # a kernel without user namespaces
        return True


def route() -> Route:
    """How a mount would be made."""
    if not may_administer():
        return Route.FUSERMOUNT
    return Route.ROOT if in_initial_namespace() else Route.USER_NAMESPACE


def open_device() -> int:
    """A ``/dev/fuse`` that is not mounted yet, not blocking."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = {
            errno.ENOENT: "it does not exist; load the fuse module: modprobe fuse",
            errno.ENODEV: "the kernel has no FUSE; load the fuse module: modprobe fuse",
            errno.EACCES: "permission denied; its mode should be 0666",
            errno.EPERM: "not permitted; a container must be given the device",
        }.get(error.errno or 0, os.strerror(error.errno or 0).lower())
        raise MountError(f"{DEVICE}: {hint}") from error


@dataclass(slots=True)
class Mounting:
    """A mount on its way: see the module's theory of operation."""

    request: MountRequest
    route: Route
    fd: int                 # /dev/fuse, not blocking
    sync_init: bool         # attach() returns only when INIT is answered
    _attached: threading.Event = field(default_factory=threading.Event)

    def attach(self) -> None:
        """Make the mount; returns when it is there (and, with ``sync_init``, answers)."""
        if self.route is not Route.FUSERMOUNT:
            mount_root(self.fd, self.request)
        self._attached.set()

    def first_message(self) -> bytes:
        """The INIT request.  Blocks until the mount exists, for ever if there never is one (M2)."""
        if not self.sync_init:
            self._attached.wait()
        while True:
            try:
                return os.read(self.fd, _INIT_BUFFER_BYTES)
            except BlockingIOError:     # mounted, and INIT not queued yet
                waiter = select.poll()
                waiter.register(self.fd, select.POLLIN)
                waiter.poll()


def prepare(request: MountRequest) -> Mounting:
    """A mount ready to be made.  ``MountError`` tells what to install or do where none can be."""
    _check_target(request.target)
    way = route()
    if way is Route.FUSERMOUNT:
        return Mounting(request, way, fusermount.mount(request), sync_init=False)
    if request.fuseblk and way is Route.USER_NAMESPACE:
        raise MountError(f"{request.target}: a user namespace cannot mount block devices (use -o noloop on an image)")
    with ExitStack() as undo:
        fd = open_device()
        undo.callback(os.close, fd)
        mounting = Mounting(request, way, fd, ioctl.sync_init(fd))
        undo.pop_all()
    return mounting


def in_thread(function: Callable[[], T]) -> "Future[T]":
    """The result of a function that runs in a thread which does not keep the process alive."""
    future: Future[T] = Future()
    name = getattr(function, "__name__", "mount")

    def run() -> None:
        try:
            future.set_result(function())
        except (MountError, OSError) as error:
            future.set_exception(error)
        finally:
            if not future.done():   # a bug, whose traceback the thread prints: nobody shall wait for ever
                future.set_exception(RuntimeError(f"the thread of {name} failed"))

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _check_target(target: str) -> None:
    try:
        is_directory = stat.S_ISDIR(os.stat(target).st_mode)
    except OSError as error:
        dead = error.errno == errno.ENOTCONN
        hint = f"; a mount whose daemon has died is there: fusewire umount {target}" if dead else ""
        raise MountError(f"{target}: {os.strerror(error.errno or 0).lower()}{hint}") from error
    if not is_directory:
        raise MountError(f"{target}: not a directory")


# --- The mount itself -------------------------------------------------------------------------------------------------


def mount_root(fd: int, request: MountRequest) -> None:
    """Mount an opened ``/dev/fuse`` with the rights of this process; blocks as long as INIT is to be waited for."""
    try:
        try:
            context = mountapi.Context(request.fstype.encode())
        except MountFailed as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):      # EPERM: a container's filter knows only mount(2)
                raise
            _mount_old(fd, request)
        else:
            with context:
                _mount_new(context, fd, request)
    except MountFailed as error:
        raise MountError(_explain(error, request)) from error


def _identity(fd: int) -> dict[str, str]:
    return {"fd": str(fd), "rootmode": _ROOT_MODE, "user_id": str(os.getuid()), "group_id": str(os.getgid())}


def _mount_new(context: mountapi.Context, fd: int, request: MountRequest) -> None:
    context.set(b"source", os.fsencode(request.source))
    context.set(b"subtype", SUBTYPE.encode())
    for name, value in (_identity(fd) | request.fuse_options()).items():
        context.set(name.encode(), None if value is None else value.encode())
    context.create(request.flags)
    context.attach(os.fsencode(request.target), request.flags)


def _mount_old(fd: int, request: MountRequest) -> None:
    pairs = (_identity(fd) | request.fuse_options()).items()
    quoted = {name: f'"{value}"' if value and "," in value else value for name, value in pairs}
    data = ",".join(name if value is None else f"{name}={value}" for name, value in quoted.items())
    fstype = f"{request.fstype}.{SUBTYPE}"
    mountapi.mount(
        os.fsencode(request.source), os.fsencode(request.target), fstype.encode(), request.flags, data.encode()
    )


def _explain(error: MountFailed, request: MountRequest) -> str:
    hints = {
        errno.EBUSY: f"{request.source} is mounted or claimed by something else",
        errno.ENODEV: f"this kernel has no {request.fstype}",
        errno.ENOTBLK: f"{request.source} is not a block device",
        errno.EROFS: f"{request.source} is read-only; mount with -o ro",
        errno.EACCES: f"no access to {request.source}, or it is read-only: mount with -o ro",
        errno.EPERM: "not permitted here; inside a user namespace a mount namespace is needed too: unshare --mount",
        errno.ENOTCONN: "the daemon gave the kernel no valid answer to INIT",
        errno.ENOSPC: "this mount namespace has reached fs.mount-max",
    }
    kernel = f" (kernel: {error.kernel_says})" if error.kernel_says else ""
    words = hints.get(error.errno or 0, (error.strerror or "").lower() + kernel)
    return f"{request.target}: cannot mount {request.source}: {words}"


# --- Of a mount that is there -----------------------------------------------------------------------------------------


def abort_connection(dev: int) -> bool:
    """True when the connection of the mount with this ``st_dev`` was cut: all its callers get ENOTCONN.

    Needs root, or FUSE's control file system mounted and the connection being ours.
    """
    number = os.major(dev) << 20 | os.minor(dev)
    name = f"{number}/abort"
    try:
        _write_file(os.open(_CONNECTIONS / name, os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        return _abort_unmounted(name)
    return True


def _write_file(fd: int) -> None:
    with os.fdopen(fd, "wb", buffering=0) as file:
        file.write(b"1")


def _abort_unmounted(name: str) -> bool:
    """The same through an instance of the control file system that is mounted nowhere: few containers mount it."""
    try:
        with mountapi.Context(b"fusectl") as context:
            context.create(0)
            root = context.mounted()
            try:
                _write_file(os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=root))
            finally:
                os.close(root)
    except OSError:
        return False
    return True
