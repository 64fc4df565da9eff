"""Mounting as an ordinary user: fusermount3, the set-user-ID helper of FUSE, and its way of handing over the fd.

The helper gets a socket's number in ``_FUSE_COMMFD``, mounts, and sends the mounted ``/dev/fuse`` over that socket as
SCM_RIGHTS with one byte; then it exits.  Its errors go to stderr.  Sources: fusermount3(1), mount.fuse3(8), unix(7).
"""

import array
import os
import shutil
import socket
import subprocess
from pathlib import Path

from fusewire import options
from fusewire.mountrequest import SUBTYPE, MountError, MountRequest

PROGRAM = "fusermount3"
CONFIGURATION = Path("/etc/fuse.conf")
_ERROR_CHARACTERS = 500     # of the helper's last line

# Those that the helper accepts from a user; it sets nosuid and nodev itself.
_FLAG_NAMES = {
    options.MS_NOEXEC: "noexec",
    options.MS_SYNCHRONOUS: "sync",
    options.MS_DIRSYNC: "dirsync",
    options.MS_NOATIME: "noatime",
}


def program() -> str:
    """Path of fusermount3.  ``MountError`` says what to install where it is missing."""
    found = shutil.which(PROGRAM) or shutil.which(PROGRAM, path="/usr/bin:/bin:/usr/local/bin")
    if found is None:
        raise MountError(
            f"{PROGRAM} is not installed, and only root mounts without it (package fuse3; or: unshare --user --mount)"
        )
    return found


def user_allow_other() -> bool:
    """Whether users may mount for everybody: ``user_allow_other`` on a line by itself in /etc/fuse.conf."""
    try:
        text = CONFIGURATION.read_text("utf-8", "replace")
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in text.splitlines())


def option_string(request: MountRequest) -> str:
    """The ``-o`` argument for a request; commas and backslashes in the source are escaped for the helper."""
    source = request.source.replace("\\", "\\\\").replace(",", "\\,")
    words = ["ro" if request.flags & options.MS_RDONLY else "rw", "nosuid", "nodev"]
    words += [name for flag, name in _FLAG_NAMES.items() if request.flags & flag]
    words += [f"fsname={source}", f"subtype={SUBTYPE}"]
    words += [name if value is None else f"{name}={value}" for name, value in request.fuse_options().items()]
    return ",".join(words)


def mount(request: MountRequest) -> int:
    """The mounted ``/dev/fuse``, not blocking.  ``MountError`` with the helper's words, or with what to do first."""
    if request.fuseblk:
        raise MountError(f"{request.target}: only root can mount a block device as such")
    if request.allow_other and os.getuid() != 0 and not user_allow_other():
        raise MountError(f"{request.target}: allow_other needs the line user_allow_other in {CONFIGURATION}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            arguments = [program(), "-o", option_string(request), "--", request.target]
            helper = _start(arguments, theirs.fileno())
        # The helper now has the only other end: its exit without a message reads as end of file.
        fd = _receive_fd(ours)
        stderr = helper.communicate()[1]
    if fd is None or helper.returncode != 0:
        if fd is not None:
            os.close(fd)
        raise MountError(f"{request.target}: {_last_line(stderr, helper.returncode)}")
    os.set_blocking(fd, False)
    return fd


def unmount(target: str, lazy: bool = False) -> None:
    """Undo a user's mount.  ``MountError`` with the helper's own words."""
    arguments = [program(), "-u", *(["-z"] if lazy else []), "--", target]
    helper = _start(arguments, None)
    stderr = helper.communicate()[1]
    if helper.returncode != 0:
        raise MountError(f"{target}: {_last_line(stderr, helper.returncode)}")


def _start(arguments: list[str], socket_fd: int | None) -> subprocess.Popen[bytes]:
    environment = dict(os.environ, LC_ALL="C")
    environment.pop("_FUSE_COMMFD", None)
    if socket_fd is not None:
        environment["_FUSE_COMMFD"] = str(socket_fd)
    try:
        return subprocess.Popen(
            arguments,
            env=environment,
            pass_fds=() if socket_fd is None else (socket_fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        raise MountError(f"{arguments[0]}: {os.strerror(error.errno or 0).lower()}") from error


def _receive_fd(connection: socket.socket) -> int | None:
    """The fd that the helper sent, close-on-exec; None if it went without sending one."""
    descriptors = array.array("i")
    _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(descriptors.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    for surplus in descriptors[1:]:
        os.close(surplus)
    return descriptors[0] if descriptors else None


def _last_line(stderr: bytes, status: int) -> str:
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:_ERROR_CHARACTERS] if lines else f"{PROGRAM} failed with status {status}"
