"""Records of running daemons: which process serves which mount, so that ``umount`` can wait until it is really done.

A record is ``<major>-<minor>.json``, named after the mount's ``st_dev``, in ``/run/fusewire`` or, without the right to
write there, in the user's runtime directory.  A record whose process is gone (or whose process id was given to another,
told by its start time) is stale: it counts as absent and is removed by who may.

Records only ever say whom to wait for; nothing is signalled because of them, so a forged one costs its forger's friends
nothing but patience.  Sources: proc_pid_stat(5), pidfd_open(2), XDG Base Directory Specification.
"""

import contextlib
import errno
import json
import os
import select
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusewire import mountinfo

_SYSTEM = Path("/run/fusewire")
_LARGEST_BYTES = 64 << 10       # of a record; ours have a few hundred
_LARGEST_PID = 1 << 22          # PID_MAX_LIMIT


@dataclass(frozen=True, slots=True)
class Record:
    """One running daemon."""

    pid: int
    start_ticks: int        # when the process started, in clock ticks since boot: tells a process id from its reuse
    dev: int                # st_dev of the mount
    connection: int         # its number in FUSE's control file system
    source: str             # as the user named it
    target: str
    device: str             # the block device that is mounted, or "" for a plain fuse mount
    loop: int               # number of the loop device that we made, or -1
    version: str            # of fusewire

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return _file_name(self.dev)

    def is_alive(self) -> bool:
        """Whether that very process still runs (a zombie does not)."""
        return start_ticks(self.pid) == self.start_ticks


@dataclass(slots=True)
class Registration:
    """A record on disk, to be removed when the daemon is done."""

    record: Record
    path: Path

    def remove(self) -> None:
        """Remove the file.  May be called again."""
        self.path.unlink(missing_ok=True)


def start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if there is none, or if it has ended (zombie)."""
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = line[line.rfind(b")") + 1 :].split()       # the name in parentheses may hold anything
    return int(fields[19]) if len(fields) > 19 and fields[0] not in (b"Z", b"X") else None


def _file_name(dev: int) -> str:
    return f"{os.major(dev)}-{os.minor(dev)}.json"


# --- Where ------------------------------------------------------------------------------------------------------------


def directories(uid: int | None = None) -> list[Path]:
    """Where the records of a user (default: ours) may be, best first."""
    user = os.getuid() if uid is None else uid
    private = os.environ.get("XDG_RUNTIME_DIR", "") if user == os.getuid() else ""
    homes = [Path(private)] if private.startswith("/") else []
    homes.append(Path(f"/run/user/{user}"))
    shared = Path(tempfile.gettempdir(), f"fusewire-{user}")
    return [_SYSTEM, *(home / "fusewire" for home in dict.fromkeys(homes)), shared]


def _is_trusted(directory: Path, uid: int) -> bool:
    """Whether nobody but root and the user can put records there."""
    try:
        state = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(state.st_mode) and state.st_uid in (0, uid) and not state.st_mode & 0o022


def _writable_directory() -> Path | None:
    for directory in directories():
        try:
            directory.mkdir(mode=0o755 if directory == _SYSTEM else 0o700, exist_ok=True)
        except OSError:
            continue
        if _is_trusted(directory, os.getuid()) and os.access(directory, os.W_OK | os.X_OK):
            return directory
    return None


# --- The daemon's side ------------------------------------------------------------------------------------------------


def register(source: str, target: str, *, device: str = "", loop: int = -1, version: str = "") -> Registration | None:
    """This process entered as the server of the mount at ``target``; None where no directory can be written.

    To be called when the mount exists: its ``st_dev`` is looked up in the mount table.
    """
    mount, directory = mountinfo.find(target), _writable_directory()
    if mount is None or directory is None:
        return None
    record = Record(
        pid=os.getpid(),
        start_ticks=start_ticks(os.getpid()) or 0,
        dev=mount.dev,
        connection=mount.connection,
        source=source,
        target=os.fsdecode(mount.target),
        device=device,
        loop=loop,
        version=version,
    )
    try:
        return Registration(record, _write(directory, record))
    except OSError:
        return None


def _write(directory: Path, record: Record) -> Path:
    path = directory / record.file_name
    draft = directory / f".{record.file_name}.{record.pid}"
    draft.write_text(json.dumps(asdict(record), indent=1) + "\n", "utf-8", "surrogateescape")
    draft.chmod(0o644)
    draft.replace(path)
    return path


# --- The reader's side ------------------------------------------------------------------------------------------------


def parse(text: bytes) -> Record | None:
    """The record in a file's bytes; None for anything else."""
    try:
        fields: Any = json.loads(text.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or any(
        type(fields.get(name)) is not kind for name, kind in Record.__annotations__.items()
    ):
        return None
    record = Record(**{name: fields[name] for name in Record.__annotations__})
    return record if 0 < record.pid <= _LARGEST_PID else None


def _read(path: Path) -> Record | None:
    """The live record in a file; a stale one is removed if we may."""
    try:
        with path.open("rb") as file:
            record = parse(file.read(_LARGEST_BYTES))
    except OSError:
        return None
    if record is None or record.is_alive():
        return record
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def find(target: str | bytes) -> Record | None:
    """The live record of the mount at a path; None if nothing of ours is mounted there or it left no record."""
    mount = mountinfo.find(target)
    return None if mount is None else find_mount(mount)


def find_mount(mount: mountinfo.Mount) -> Record | None:
    """The live record of a mount."""
    for directory in _readable_directories(_owner(mount)):
        record = _read(directory / _file_name(mount.dev))
        if record is not None and record.dev == mount.dev:
            return record
    return None


def _owner(mount: mountinfo.Mount) -> int:
    """The user who mounted it: ``user_id=`` of the mount table."""
    values = [word[8:] for word in mount.super_options.split(",") if word.startswith("user_id=")]
    return int(values[0]) if values and values[0].isdecimal() else os.getuid()


def _readable_directories(uid: int) -> list[Path]:
    """Where a live record of a user's mount may be trusted to be."""
    places = dict.fromkeys([*directories(), *(directories(uid) if os.getuid() == 0 else [])])
    return [directory for directory in places if _is_trusted(directory, uid) or _is_trusted(directory, os.getuid())]


def records() -> Iterator[Record]:
    """The live records that we can see."""
    for directory in _readable_directories(os.getuid()):
        for path in sorted(directory.glob("[0-9]*.json")):
            record = _read(path)
            if record is not None:
                yield record


def wait_gone(record: Record, timeout_seconds: float | None = None) -> bool:
    """True once the process has ended (its files are closed then); False if it still runs after the time given."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return True
        raise
    try:
        if not record.is_alive():       # asked after opening: from here on the id cannot change hands unnoticed
            return True
        waiter = select.poll()
        waiter.register(pidfd, select.POLLIN)
        return bool(waiter.poll(None if timeout_seconds is None else timeout_seconds * 1000))
    finally:
        os.close(pidfd)
