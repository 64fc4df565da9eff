"""Mounts as context managers: kernel ext4 over a loop device, fuse2fs, and fusewire in the foreground.

Whoever mounts calls `private_mounts` once: in a mount namespace of its own nothing
survives the process, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
BUSY_TRIES, BUSY_SECONDS = 50, 0.02
READY_SECONDS = 60
CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mount:
    """A mounted file system: where it is, who serves it (None: the kernel), and where that one writes its log."""

    root: Path
    image: Path
    pid: int | None = None
    log: Path | None = None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log else ""


class MountRefused(Exception):
    """A mount command ended without a mount: its exit code and what it printed."""

    def __init__(self, code: int, output: str) -> None:
        super().__init__(f"exit code {code}: {output.strip()}")
        self.code, self.output = code, output


def missing_requirements() -> list[str]:
    """What this machine lacks for mounting, one line each; empty where it can."""
    lacking = []
    if os.geteuid() != 0:
        lacking.append("root")
    lacking += [f"the device {path}" for path in ("/dev/fuse", "/dev/loop-control") if not os.path.exists(path)]
    programs = {"mke2fs": "e2fsprogs", "debugfs": "e2fsprogs", "mount": "mount", "losetup": "mount"}
    lacking += [
        f"the program {name} (Debian package {package})" for name, package in programs.items() if not which(name)
    ]
    return lacking


def which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def private_mounts() -> None:
    """Give this process (and its children) a mount namespace of its own."""
    if LIBC.unshare(CLONE_NEWNS) or LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "cannot make a mount namespace")


def fusewire_command() -> list[str]:
    """The command before its arguments: FUSEWIRE if set, the virtual environment's, or this checkout's module."""
    if "FUSEWIRE" in os.environ:
        return os.environ["FUSEWIRE"].split()
    installed = Path(sys.executable).with_name("fusewire")
    if installed.exists():
        return [str(installed)]
    return [sys.executable, "-P", "-c", "from fusewire.cli import main; raise SystemExit(main())"]


def fusewire_environment() -> dict[str, str]:
    """The environment for `fusewire_command`, which may import from the checkout."""
    return os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1"}


def run(
    *command: str | Path, check: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``command``; its output is in the error if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False, env=env)
    if check and done.returncode != 0:
        raise MountRefused(done.returncode, f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return done


def mount_table() -> dict[Path, str]:
    """The mount points of this namespace with the type of what is mounted there."""
    table = {}
    for text in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = text.split(" - ", 1)
        table[Path(before.split()[4].encode().decode("unicode_escape"))] = after.split()[0]
    return table


def wait_mounted(target: Path, process: subprocess.Popen[bytes]) -> bool:
    """Wait until something is mounted at ``target`` (True) or ``process`` has ended (False)."""
    poller = select.poll()
    pidfd = os.pidfd_open(process.pid)
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            poller.register(mounts, select.POLLPRI)
            poller.register(pidfd, select.POLLIN)
            while process.poll() is None:
                if target in mount_table():
                    return True
                if not poller.poll(READY_SECONDS * 1000):
                    raise TimeoutError(f"{target}: not mounted after {READY_SECONDS} s")
                mounts.seek(0)
                mounts.read()
    finally:
        os.close(pidfd)
    return target in mount_table()


@contextmanager
def mount_point() -> Iterator[Path]:
    """A fresh empty directory to mount on."""
    path = Path(tempfile.mkdtemp(prefix="fusewire-mnt-"))
    try:
        yield path
    finally:
        path.rmdir()


@contextmanager
def kernel_mount(image: Path, options: str = "ro,noatime", writable: bool = False) -> Iterator[Mount]:
    """``image`` mounted by the kernel's ext4 through a loop device, also when another loop device has the image.

    ``writable``: the device is, although the mount may be read-only; so the kernel can replay a journal.
    """
    read_only = ["-r"] if "ro" in options.split(",") and not writable else []
    with mount_point() as target:
        device = run("losetup", *read_only, "-f", "--show", image).stdout.strip()
        try:
            run("mount", "-t", "ext4", "-o", options, device, target)
        finally:
            run("losetup", "-d", device)  # while it is mounted: goes away with the mount
        try:
            yield Mount(target, image)
        finally:
            run("umount", target)


DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # a daemon would keep our mount namespace, and its mount, alive


@contextmanager
def served(command: list[str], target: Path, image: Path, unmount: list[str]) -> Iterator[Mount]:
    """A mount that ``command``, staying in the foreground, serves at ``target`` until ``unmount`` ends it."""
    with tempfile.NamedTemporaryFile(prefix="fusewire-log-", suffix=".txt") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=fusewire_environment(), cwd="/"
        )
        try:
            if not wait_mounted(target, process):
                raise MountRefused(process.wait(), Path(log.name).read_text(errors="replace"))
            yield Mount(target, image, process.pid, Path(log.name))
            leave(unmount, target)
            process.wait(READY_SECONDS)
        finally:
            abandon(target, process)


def leave(unmount: list[str], target: Path) -> None:
    """Unmount.  A child that another thread of ours has forked holds our open files until it runs its program."""
    for _ in range(BUSY_TRIES):
        try:
            run(*unmount, target, env=fusewire_environment())
        except MountRefused as refused:
            if "busy" not in str(refused):
                raise
            time.sleep(BUSY_SECONDS)
        else:
            return
    run(*unmount, target, env=fusewire_environment())


def abandon(target: Path, process: subprocess.Popen[bytes]) -> None:
    """Leave nothing behind, however the test went."""
    if target in mount_table():
        run("umount", "-l", target, check=False)
    if process.poll() is None:
        process.kill()
        process.wait()


@contextmanager
def fuse2fs_mount(image: Path, options: str = "ro") -> Iterator[Mount]:
    """``image`` mounted by fuse2fs."""
    with mount_point() as target:
        command = [
            *DIES_WITH_US,
            "fuse2fs",
            "-f",
            "-o",
            f"{options},allow_other,default_permissions",
            str(image),
            str(target),
        ]
        with served(command, target, image, ["umount"]) as mounted:
            yield mounted


@contextmanager
def fusewire_mount(
    image: Path, options: str = "ro,noatime", prefix: tuple[str, ...] = (), unmount: tuple[str, ...] = ()
) -> Iterator[Mount]:
    """``image`` mounted by fusewire in the foreground; ``prefix`` is put before the command (``setpriv`` …)."""
    with mount_point() as target:
        if prefix:
            os.chmod(target, 0o777)
        command = [
            *(prefix or DIES_WITH_US),
            *fusewire_command(),
            "mount",
            "-f",
            "-o",
            options,
            str(image),
            str(target),
        ]
        with served(command, target, image, [*(unmount or (*fusewire_command(), "umount"))]) as mounted:
            yield mounted


@contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """A loop device for an image, to be used by its path; it goes at the end."""
    device = run("losetup", "--find", "--show", image).stdout.strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def wait_for(condition: Callable[[], bool]) -> None:
    """Until something that nobody announces has happened."""
    poller = select.poll()
    for _ in range(READY_SECONDS * 50):
        if condition():
            return
        poller.poll(20)
    raise TimeoutError("it did not happen")


def wait_unused(image: Path) -> None:
    """Wait until no loop device and no process holds ``image`` (a detached server ends a little after its mount)."""
    deadline = time.monotonic() + READY_SECONDS
    wanted = os.stat(image)
    while holders(wanted):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{image}: still in use: {holders(wanted)}")
        os.sched_yield()


def is_given_back(number: int, image: Path | str) -> bool:
    """Whether a loop device carries ``image`` no more; another test, running beside this one, may have it already."""
    backing = Path(f"/sys/block/loop{number}/loop/backing_file")
    try:
        return not os.path.samefile(backing.read_text().rstrip("\n"), image)
    except OSError:     # it carries nothing, or a file that is gone
        return True


def holders(wanted: os.stat_result) -> list[str]:
    """The loop devices over, and the other processes that have open, the file with this identity."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(backing.read_text().rstrip("\n")), wanted):
                found.append(backing.parts[3])
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(fd), wanted) and int(fd.parts[2]) != os.getpid():
                found.append(str(fd))
    return found
