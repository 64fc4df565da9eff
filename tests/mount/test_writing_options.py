"""What the mount options about writing do: on the disk, after a kill, and beside kernel ext4."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusewire import options as subject
from tests.images import mke2fs
from tests.model.side import FS_IOC_SETFLAGS
from tests.mount.test_stopping import Daemon, assert_clean, daemon
from tests.mount.writable_mount import DRIVERS, MOUNTS, error_of
from tests.mounting import fusewire_mount, kernel_mount, loop_device, run, wait_for, wait_unused
from tests.walk import FS_IOC_GETFLAGS

MIB = 1 << 20
NEVER = "commit=10000"      # nothing becomes durable by itself
ALICE, HER_GROUP = 1000, 1001
NODUMP = 0x40
SHAPES = {"ext4": "-t ext4 -b 4096 -J size=4", "ext3": "-t ext3 -b 1024 -J size=4",
          "none": "-t ext4 -b 1024 -O ^has_journal"}


@pytest.fixture
def image(mounts: None, tmp_path: Path) -> Path:
    path = tmp_path / "image"
    mke2fs(path, SHAPES["ext4"], 64 * MIB)
    return path


def header(path: Path) -> dict[str, str]:
    lines = run("dumpe2fs", "-h", path).stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_in_use(path: Path) -> bool:
    shown = header(path)
    return "needs_recovery" in shown["Filesystem features"] or shown["Filesystem state"] != "clean"


def killed(mounted: Daemon) -> None:
    mounted.process.kill()
    mounted.wait()
    run("umount", "-l", mounted.root)


@contextmanager
def recovered(path: Path) -> Iterator[Path]:
    """The file system as the kernel finds it."""
    wait_unused(path)
    with kernel_mount(path, "rw") as mounted:
        yield mounted.root
    assert run("e2fsck", "-fn", path, check=False).returncode == 0


# ---- sync, dirsync, commit -----------------------------------------------------------------------------------------

Changes = dict[str, tuple[Callable[[Path], object], Callable[[Path], bool]]]
NAMES: Changes = {
    "mkdir": (lambda root: (root / "new").mkdir(), lambda root: (root / "new").is_dir()),
    "create": (lambda root: (root / "new").touch(), lambda root: (root / "new").is_file()),
    "symlink": (lambda root: os.symlink("t", root / "new"), lambda root: (root / "new").is_symlink()),
    "link": (lambda root: os.link(root / "old", root / "new"), lambda root: (root / "new").exists()),
    "rename": (lambda root: os.rename(root / "old", root / "new"), lambda root: (root / "new").exists()),
    "unlink": (lambda root: os.unlink(root / "old"), lambda root: not (root / "old").exists()),
    "rmdir": (lambda root: os.rmdir(root / "olddir"), lambda root: not (root / "olddir").exists()),
}
ATTRIBUTES: Changes = {
    "write": (lambda root: os.write(os.open(root / "old", os.O_WRONLY | os.O_APPEND), b"more" * 2500),
              lambda root: (root / "old").read_bytes() == b"old" * 3000 + b"more" * 2500),
    "chmod": (lambda root: os.chmod(root / "old", 0o421), lambda root: (root / "old").stat().st_mode & 0o777 == 0o421),
    "truncate": (lambda root: os.truncate(root / "old", 5), lambda root: (root / "old").read_bytes() == b"oldol"),
    "setxattr": (lambda root: os.setxattr(root / "old", "user.a", b"1"),
                 lambda root: "user.a" in os.listxattr(root / "old")),
    "fallocate": (lambda root: os.posix_fallocate(os.open(root / "old", os.O_WRONLY), 0, 50000),
                  lambda root: (root / "old").stat().st_size == 50000),
    "chattr": (lambda root: set_flags(root / "old", NODUMP), lambda root: bool(flags_of(root / "old") & NODUMP)),
}


def flags_of(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return int(struct.unpack("<I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4])[0])
    finally:
        os.close(fd)


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("<Q", flags_of(path) | flags))
    finally:
        os.close(fd)


def in_another_process(action: Callable[[Path], object], root: Path) -> None:
    """Files that the action leaves open are closed without our knowing."""
    child = os.fork()
    if not child:
        try:
            action(root)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def survivors(path: Path, options: str, changes: Changes) -> set[str]:
    """The changes that would have survived if the power had gone after each, looked for by the kernel."""
    with kernel_mount(path, "rw") as mounted:
        for name in changes:
            (mounted.root / name).mkdir()
            (mounted.root / name / "old").write_bytes(b"old" * 3000)
            (mounted.root / name / "olddir").mkdir()
    copies = {}
    with daemon(path, f"rw,{NEVER},{options}") as mounted:
        for name, (action, _) in changes.items():
            in_another_process(action, mounted.root / name)
            copies[name] = path.with_suffix(f".{name}")
            run("cp", "--sparse=always", path, copies[name])
    found = set()
    for name, copy in copies.items():
        with recovered(copy) as root:
            if changes[name][1](root / name):
                found.add(name)
        copy.unlink()
    return found


@pytest.mark.parametrize(("options", "durable"), [
    ("sync", NAMES | ATTRIBUTES), ("dirsync", NAMES), ("async", {})])
def test_what_is_durable_at_once(image: Path, options: str, durable: Changes) -> None:
    """Without these options nothing is, which also shows that ``commit`` is obeyed."""
    assert survivors(image, options, NAMES | ATTRIBUTES) == set(durable)


def test_a_remount_with_sync_and_without(image: Path) -> None:
    with daemon(image, f"rw,{NEVER}") as mounted:
        (mounted.root / "before").mkdir()
        run("mount", "-o", "remount,sync", mounted.root)
        number = iter(range(1000))

        def is_durable() -> bool:
            before = image.stat().st_mtime_ns
            (mounted.root / str(next(number))).mkdir()
            return image.stat().st_mtime_ns != before

        wait_for(is_durable)
        (mounted.root / "last").mkdir()
        killed(mounted)
    with recovered(image) as root:
        assert (root / "before").exists() and (root / "last").exists()


def test_commit_says_when_a_change_is_durable(image: Path) -> None:
    """Without anybody asking for it."""
    with daemon(image, "rw,commit=1") as mounted:
        (mounted.root / "made").mkdir()
        wait_for(lambda: header(image).get("Journal start", "0") != "0")     # a transaction is in the log
        killed(mounted)
    with recovered(image) as root:
        assert (root / "made").is_dir()


# ---- barrier, discard ----------------------------------------------------------------------------------------------

def flushes(device: str) -> int:
    """How often the block layer was asked to flush this device (Documentation/admin-guide/iostats)."""
    return int(Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[15])


def synced(root: Path, name: str) -> None:
    descriptor = os.open(root / name, os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"d" * 5000)
    os.fsync(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize(("options", "some"), [("barrier", True), ("nobarrier", False)])
def test_without_barriers_the_device_is_not_flushed(image: Path, options: str, some: bool) -> None:
    with loop_device(image) as device, fusewire_mount(Path(device), f"rw,{options}") as mounted:
        before = flushes(device)
        for number in range(5):
            synced(mounted.root, str(number))
        assert (flushes(device) > before) == some
        assert ("a power cut may lose" in mounted.log_text()) == (not some)
        if not some:    # what was fsynced has reached the device all the same
            assert b"d" * 5000 in image.read_bytes()
    assert_clean(image)


def test_the_superblock_may_say_that_there_are_no_barriers(image: Path) -> None:
    run("tune2fs", "-o", "nobarrier", image)
    with loop_device(image) as device, fusewire_mount(Path(device), "rw") as mounted:
        before = flushes(device)
        synced(mounted.root, "file")
        assert flushes(device) == before


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize(("options", "default", "discards"), [
    ("rw,discard", "", True), ("rw,discard,noloop", "", True), ("rw,nodiscard", "discard", False)])
def test_discard_frees_room_in_the_image(image: Path, options: str, default: str, discards: bool) -> None:
    if default:
        run("tune2fs", "-o", default, image)
    with fusewire_mount(image, options) as mounted:
        (mounted.root / "large").write_bytes(os.urandom(20 * MIB))
        (mounted.root / "kept").write_bytes(b"kept" * MIB)
        os.sync()
        full = allocated(image)
        (mounted.root / "large").unlink()
        for number in range(3):     # the file may be freed in more batches than one
            synced(mounted.root, str(number))
        assert (full - allocated(image) > 19 * MIB) == discards
    assert_clean(image)
    with kernel_mount(image, "ro") as again:
        assert (again.root / "kept").read_bytes() == b"kept" * MIB


def test_a_device_that_does_not_discard_is_said_so_once(mounts: None, tmp_path: Path) -> None:
    """Files in ramfs have no holes."""
    run("mount", "-t", "ramfs", "none", tmp_path)
    try:
        path = tmp_path / "image"
        mke2fs(path, SHAPES["ext4"], 16 * MIB)
        with fusewire_mount(path, "rw,discard,noloop") as mounted:
            for number in range(3):
                synced(mounted.root, str(number))
                (mounted.root / str(number)).unlink()
                synced(mounted.root, "other")
            assert mounted.log_text().count("discard_turned_off") == 1
        assert_clean(path)
    finally:
        run("umount", "-l", tmp_path)


# ---- remount -------------------------------------------------------------------------------------------------------

REMOUNTS = {"rw": (), "rw,noloop": ("-i",)}     # a plain fuse mount has a helper, which is not for remounts


def looked_up(path: Path, name: str) -> str:
    """What is home of a file, without what may be in the journal."""
    return run("debugfs", "-R", f"stat {name}", path).stdout


@pytest.mark.parametrize(("shape", "options"), [("ext4", "rw"), ("ext4", "rw,noloop"), ("ext3", "rw"), ("none", "rw")])
def test_remounted_read_only_it_is_clean_and_for_writing_in_use(image: Path, shape: str, options: str) -> None:
    mke2fs(image, SHAPES[shape], 64 * MIB)
    with daemon(image, f"{options},{NEVER}") as mounted:
        for turn in range(2):
            (mounted.root / f"d{turn}").mkdir()
            (mounted.root / f"d{turn}" / "file").write_bytes(b"f" * 70000)
            run("mount", *REMOUNTS[options], "-o", "remount,ro", mounted.root)
            wait_for(lambda: not is_in_use(image) and "Size: 70000" in looked_up(image, f"/d{turn}/file"))  # noqa: B023
            assert_clean(image)
            with kernel_mount(image, "ro") as other:
                assert (other.root / f"d{turn}" / "file").read_bytes() == b"f" * 70000
            assert error_of((mounted.root / "refused").mkdir) == "EROFS"
            run("mount", *REMOUNTS[options], "-o", "remount,rw", mounted.root)
        synced(mounted.root, "last")
        assert is_in_use(image)
        killed(mounted)
    if shape != "none":
        with recovered(image) as root:
            assert sorted(os.listdir(root)) == ["d0", "d1", "last", "lost+found"]


def test_everything_is_durable_when_the_remount_returns(image: Path) -> None:
    """Whether or not the daemon has heard of it."""
    with daemon(image, f"rw,{NEVER}") as mounted:
        (mounted.root / "file").write_bytes(b"f" * 70000)
        run("mount", "-o", "remount,ro", mounted.root)
        killed(mounted)
    with recovered(image) as root:
        assert (root / "file").read_bytes() == b"f" * 70000


def test_changes_follow_a_remount_at_once(image: Path) -> None:
    """However late we hear of a remount, no change that the kernel allows is refused."""
    with fusewire_mount(image, "rw") as mounted:
        for turn in range(12):
            run("mount", "-o", "remount,ro", mounted.root)
            run("mount", "-o", "remount,rw", mounted.root)
            (mounted.root / f"d{turn}").mkdir()
        run("mount", "-o", "remount,ro", mounted.root)
    assert_clean(image)
    with kernel_mount(image, "ro") as again:
        assert len(os.listdir(again.root)) == 13


def test_it_is_not_remounted_while_a_file_is_open_for_writing(image: Path) -> None:
    with fusewire_mount(image, "rw") as mounted, open(mounted.root / "open", "wb") as file:
        assert "busy" in run("mount", "-o", "remount,ro", mounted.root, check=False).stderr
        file.write(b"x")


def test_ioctls_are_refused_while_it_is_read_only(image: Path) -> None:
    label = struct.pack("=256s", b"label")
    with fusewire_mount(image, "rw") as mounted:
        run("mount", "-o", "remount,ro", mounted.root)
        wait_for(lambda: not is_in_use(image))
        directory = os.open(mounted.root, os.O_RDONLY)
        try:
            assert error_of(fcntl.ioctl, directory, 0x41009432, label) == "EROFS"
        finally:
            os.close(directory)


def test_what_was_mounted_to_be_read_does_not_become_writable(image: Path) -> None:
    with fusewire_mount(image, "ro,noloop") as mounted:
        run("mount", "-i", "-o", "remount,rw", mounted.root)
        wait_for(lambda: "stays_read_only" in mounted.log_text())
        assert "mount with -o rw" in mounted.log_text()
        assert error_of((mounted.root / "refused").mkdir) == "EROFS"
    with fusewire_mount(image, "ro") as mounted:
        assert "write-protected" in run("mount", "-o", "remount,rw", mounted.root, check=False).stderr


def test_what_an_error_made_read_only_stays_so(image: Path) -> None:
    with kernel_mount(image, "rw") as kernel:
        (kernel.root / "broken").mkdir()
    block = int(run("debugfs", "-R", "blocks /broken", image).stdout.split()[0])
    with open(image, "r+b") as file:
        file.seek(block * 4096 + 30)
        file.write(b"\xff")
    with fusewire_mount(image, "rw,errors=remount-ro") as mounted:
        assert error_of(os.listdir, mounted.root / "broken") == "EBADMSG"
        run("mount", "-o", "remount,ro", mounted.root)
        run("mount", "-o", "remount,rw", mounted.root)
        assert error_of((mounted.root / "refused").mkdir) == "EROFS"
    assert header(image)["Filesystem state"] == "clean with errors"


def test_a_mount_says_how_to_mount_for_writing(image: Path) -> None:
    with fusewire_mount(image, "noatime") as mounted:
        assert "mounted read-only; -o rw mounts for writing" in mounted.log_text()
        assert error_of((mounted.root / "refused").mkdir) == "EROFS"


# ---- who gets what, beside kernel ext4 -----------------------------------------------------------------------------

def made_in(root: Path) -> list[tuple[str, int, int]]:
    """(name, group, mode) of what is made in directories of another group."""
    found = []
    for mode in (0o777, 0o2777):
        directory = root / f"{mode:o}"
        directory.mkdir()
        os.chown(directory, 0, 777)
        os.chmod(directory, mode)
        (directory / "file").touch()
        (directory / "dir").mkdir()
        os.mkfifo(directory / "fifo")
        os.symlink("target", directory / "symlink")
        for path in sorted(directory.iterdir()):
            status = os.lstat(path)
            found.append((f"{mode:o}/{path.name}", status.st_gid, stat.S_IMODE(status.st_mode)))
    return found


@pytest.mark.parametrize(("options", "default"), [
    ("rw,grpid", ""), ("rw", "bsdgroups"), ("rw,sysvgroups", "bsdgroups")])
def test_groups_of_new_files(image: Path, options: str, default: str) -> None:
    if default:
        run("tune2fs", "-o", default, image)
    results = []
    for driver in DRIVERS:
        with MOUNTS[driver](image, options) as mounted:
            results.append(made_in(mounted.root))
            run("rm", "-r", mounted.root / "777", mounted.root / "2777")
    assert results[0] == results[1]


@pytest.mark.parametrize(("options", "default", "allowed"), [
    ("rw,resuid=1000", (), True), ("rw,resgid=1001", (), True), ("rw,resuid=7", ("-u", "1000"), False),
    ("rw,resgid=5", ("-g", "1001"), False)])
def test_who_may_use_the_reserve(image: Path, options: str, default: tuple[str, ...], allowed: bool) -> None:
    mke2fs(image, f"{SHAPES['ext4']} -m 30", 32 * MIB)
    if default:
        run("tune2fs", *default, image)
    results = []
    for driver in DRIVERS:
        with MOUNTS[driver](image, options) as mounted:
            os.chmod(mounted.root, 0o777)
            found = os.statvfs(mounted.root)
            beyond = (found.f_bavail + 100) * found.f_frsize
            done = run("setpriv", f"--reuid={ALICE}", f"--regid={HER_GROUP}", "--clear-groups", "fallocate", "-l",
                       str(beyond), mounted.root / "file", check=False)
            results.append((done.returncode, os.strerror(errno.ENOSPC) in done.stderr))
            (mounted.root / "file").unlink()
    assert results == [(0, False) if allowed else (1, True)] * 2


@pytest.mark.parametrize("limit_kib", [30])
def test_directories_do_not_grow_beyond_what_is_allowed(image: Path, limit_kib: int) -> None:
    results = []
    for driver in DRIVERS:
        with MOUNTS[driver](image, f"rw,max_dir_size_kb={limit_kib}") as mounted:
            directory = mounted.root / driver
            directory.mkdir()
            made = 0
            while error_of((directory / f"{made:0200}").touch) == "ok" and made < 1000:
                made += 1
            results.append((made, error_of((directory / ("x" * 200)).mkdir)))
    assert results[0] == results[1] and 0 < results[0][0] < 1000


# ---- every option --------------------------------------------------------------------------------------------------

# ext4(5) of util-linux and the kernel's documentation "ext4 General Information", with a value where one is needed
EVERY_OPTION = """
    ro rw journal_checksum nojournal_checksum journal_async_commit journal_path=/dev/x journal_dev=0x801
    norecovery noload data=journal data=ordered data=writeback commit=30 barrier=0 barrier=1 barrier nobarrier
    inode_readahead_blks=64 bsddf minixdf debug abort errors=remount-ro errors=continue errors=panic
    data_err=ignore data_err=abort grpid bsdgroups nogrpid sysvgroups resgid=7 resuid=7 sb=8193 quota noquota
    usrquota grpquota prjquota usrjquota=aquota.user grpjquota=aquota.group jqfmt=vfsv1 stripe=16 delalloc
    nodelalloc max_batch_time=15000 min_batch_time=10 journal_ioprio=3 auto_da_alloc noauto_da_alloc noinit_itable
    init_itable=10 discard nodiscard nouid32 block_validity noblock_validity dioread_lock dioread_nolock
    max_dir_size_kb=8 i_version nombcache no_mbcache dax dax=never inlinecrypt acl noacl user_xattr nouser_xattr
    nomblk_io_submit mblk_io_submit lazytime nolazytime sync async dirsync prefetch_block_bitmaps
    no_prefetch_block_bitmaps warn_on_error nowarn_on_error debug_want_extra_isize=32 mb_optimize_scan=1 bh nobh
    orlov oldalloc check=none nocheck reservation noreservation
"""
# what they say is so in any case, or what is said by not saying it
SATISFIED = {"rw", "data=ordered", "bsddf", "noquota", "acl", "user_xattr", "nolazytime", "async"}


@pytest.mark.parametrize("text", EVERY_OPTION.split())
def test_no_option_is_swallowed(text: str) -> None:
    """It changes what is parsed, or is noted in one sentence that names it, or is refused by its name."""
    plain = subject.parse_options("rw")
    try:
        parsed = subject.parse_options(f"rw,{text}")
    except subject.OptionError as error:
        assert text.partition("=")[0] in str(error)
        return
    noted = [note for note in parsed.notes() if f"option {text} has no effect here" in note]
    parsed.for_writing.clear()
    obeyed = parsed != plain and not parsed.ignored
    assert (text in SATISFIED) + obeyed + len(noted) == 1
