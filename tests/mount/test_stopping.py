"""However a writable mount ends, nothing that was made durable is lost, and e2fsck finds nothing (after a replay)."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mounting import (
    READY_SECONDS,
    abandon,
    fusewire_command,
    fusewire_environment,
    fusewire_mount,
    kernel_mount,
    mount_point,
    mount_table,
    run,
    wait_mounted,
    wait_unused,
)

SHAPES = {
    "ext4-1k": "-t ext4 -b 1024 -J size=4 -O orphan_file",
    "ext4-2k": "-t ext4 -b 2048 -J size=8 -O ^orphan_file",
    "ext4-4k": "-t ext4 -b 4096 -J size=16 -O orphan_file,metadata_csum_seed",
    "ext3-1k": "-t ext3 -b 1024 -I 128 -J size=4",
    "ext3-4k": "-t ext3 -b 4096 -I 128 -J size=16",
}
UNJOURNALED = {"none-ext4": "-t ext4 -b 1024 -O ^has_journal", "ext2": "-t ext2 -b 1024 -I 128"}
JOURNALED = SHAPES
SHAPES = JOURNALED | UNJOURNALED


@pytest.fixture
def image(request: pytest.FixtureRequest, mounts: None, tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, 48 << 20)
    run("mke2fs", "-q", "-F", *SHAPES[request.param].split(), path)
    return path


class Daemon:
    """A mount whose daemon a test ends by itself."""

    def __init__(self, path: Path, target: Path, options: str) -> None:
        self.root = target
        command = [*fusewire_command(), "mount", "-f", "-o", options, str(path), str(target)]
        self.process = subprocess.Popen(command, env=fusewire_environment(), cwd="/", stdin=subprocess.DEVNULL)

    def wait(self) -> int:
        return self.process.wait(READY_SECONDS)


@contextmanager
def daemon(path: Path, options: str = "rw") -> Iterator[Daemon]:
    with mount_point() as target:
        started = Daemon(path, target, options)
        try:
            assert wait_mounted(target, started.process)
            yield started
        finally:
            abandon(target, started.process)
    wait_unused(path)


def assert_clean(path: Path) -> None:
    done = run("e2fsck", "-fn", path, check=False)
    assert done.returncode == 0, done.stdout
    shown = run("dumpe2fs", "-h", path).stdout
    assert "Filesystem state:         clean\n" in shown
    assert "needs_recovery" not in shown and "orphan_present" not in shown


def work(root: Path) -> dict[str, bytes]:
    """Changes of every kind, and at the end an fsync; the files that must be there then."""
    for number in range(40):
        (root / f"d{number}").mkdir()
        (root / f"d{number}" / "file").write_bytes(os.urandom(700 * number))
    for number in range(0, 40, 3):
        shutil.rmtree(root / f"d{number}")
    os.rename(root / "d1", root / "renamed")
    os.link(root / "d2" / "file", root / "linked")
    os.symlink("t" * 100, root / "symlink")
    os.truncate(root / "d4" / "file", 100)
    kept = {}
    for number in range(12):
        path, data = root / f"kept{number}", os.urandom(5000 * number)
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        kept[path.name] = data
    return kept


def contents(root: Path, names: dict[str, bytes]) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in names}


# ---- killed --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("image", JOURNALED, indirect=True)
def test_after_a_kill_everybody_recovers_what_was_fsynced(image: Path) -> None:
    """The daemon dies with a file open that has no name; ours, the kernel's and e2fsck's recovery are all clean."""
    with daemon(image) as mounted:
        kept = work(mounted.root)
        handle = os.open(mounted.root / "gone", os.O_RDWR | os.O_CREAT)
        os.write(handle, b"g" * 9000)
        os.fsync(handle)
        os.unlink(mounted.root / "gone")
        os.fsync(handle)
        mounted.process.kill()
        mounted.wait()
        with pytest.raises(OSError) as cut:
            os.listdir(mounted.root)
        assert cut.value.errno == errno.ENOTCONN
        os.close(handle)
        run("umount", "-l", mounted.root)
    by_kernel, by_e2fsck = (Path(shutil.copyfile(image, image.with_suffix(suffix))) for suffix in (".kernel", ".fsck"))
    with fusewire_mount(image, "ro") as again:
        assert contents(again.root, kept) == kept
    with fusewire_mount(image, "rw") as again:
        assert contents(again.root, kept) == kept and not (again.root / "gone").exists()
    with kernel_mount(by_kernel, "rw") as again:
        assert contents(again.root, kept) == kept
    assert run("e2fsck", "-fp", by_e2fsck, check=False).returncode in (0, 1)
    for path in (image, by_kernel, by_e2fsck):
        assert_clean(path)


@pytest.mark.parametrize("image", ["ext4-1k"], indirect=True)
def test_killed_again_and_again(image: Path) -> None:
    """Each mount replays what the one before has left."""
    expected: dict[str, bytes] = {}
    for turn in range(6):
        with daemon(image) as mounted:
            assert contents(mounted.root, expected) == expected
            for number in range(15):
                name, data = f"t{turn}-{number}", os.urandom(1000 * number)
                with open(mounted.root / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                expected[name] = data
            (mounted.root / f"lost{turn}").mkdir()
            mounted.process.kill()
            mounted.wait()
            run("umount", "-l", mounted.root)
    with fusewire_mount(image, "rw") as mounted:
        assert contents(mounted.root, expected) == expected
    assert_clean(image)


@pytest.mark.parametrize("image", UNJOURNALED, indirect=True)
def test_without_a_journal_a_kill_leaves_a_mark(image: Path) -> None:
    with fusewire_mount(image, "rw") as mounted:
        assert "there is no journal" in mounted.log_text()
    assert_clean(image)
    with daemon(image) as mounted_:
        work(mounted_.root)
        mounted_.process.kill()
        mounted_.wait()
        run("umount", "-l", mounted_.root)
    assert "not clean" in run("dumpe2fs", "-h", image).stdout
    run("e2fsck", "-fy", image, check=False)
    assert_clean(image)


# ---- asked to stop -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("image", SHAPES, indirect=True)
def test_sigterm_finishes_commits_unmounts_and_ends_with_0(image: Path) -> None:
    with daemon(image) as mounted:
        kept = work(mounted.root)
        (mounted.root / "late").write_bytes(b"l" * 70000)
        mounted.process.send_signal(signal.SIGTERM)
        assert mounted.wait() == 0
        assert mounted.root not in mount_table()
    assert_clean(image)
    with kernel_mount(image, "ro") as again:
        assert contents(again.root, kept) == kept
        assert (again.root / "late").read_bytes() == b"l" * 70000


@pytest.mark.parametrize("image", ["ext4-4k"], indirect=True)
def test_sigterm_cuts_off_users_after_what_they_wrote_was_fetched(image: Path) -> None:
    with daemon(image) as mounted:
        named = open(mounted.root / "open", "wb")  # noqa: SIM115 - it stays open on purpose
        named.write(b"o" * 60000)
        named.flush()
        nameless = os.open(mounted.root / "gone", os.O_RDWR | os.O_CREAT)
        os.write(nameless, b"g" * 9000)
        os.unlink(mounted.root / "gone")
        mounted.process.send_signal(signal.SIGTERM)
        mounted.process.send_signal(signal.SIGTERM)
        assert mounted.wait() == 0
        assert mounted.root not in mount_table()
        for close in (lambda: os.close(nameless), named.close):
            with suppress(OSError):     # the kernel tells the daemon of it, which is gone
                close()
    assert_clean(image)
    with kernel_mount(image, "ro") as again:
        assert (again.root / "open").read_bytes() == b"o" * 60000 and not (again.root / "gone").exists()


@pytest.mark.parametrize("image", ["ext4-1k", "ext3-4k", "none-ext4"], indirect=True)
@pytest.mark.parametrize("options", ["rw", "rw,noloop"])
@pytest.mark.parametrize("command", [("umount",), ("umount", "-l"), (*fusewire_command(), "umount")],
                         ids=["umount", "lazy", "fusewire"])
def test_every_unmount_ends_clean(image: Path, options: str, command: tuple[str, ...]) -> None:
    """``noloop``: a plain fuse mount, whose unmount does not wait for the daemon, which ends a little later."""
    with daemon(image, options) as mounted:
        kept = work(mounted.root)
        run(*command, mounted.root, env=fusewire_environment())
        assert mounted.wait() == 0
    assert_clean(image)
    with kernel_mount(image, "ro") as again:
        assert contents(again.root, kept) == kept


@pytest.mark.parametrize("image", ["ext4-1k"], indirect=True)
def test_a_lazy_unmount_ends_when_its_last_user_leaves(image: Path) -> None:
    with daemon(image) as mounted:
        file = open(mounted.root / "open", "wb")  # noqa: SIM115 - it stays open on purpose
        run("umount", "-l", mounted.root)
        file.write(b"after" * 1000)
        file.close()
        assert mounted.wait() == 0
    assert_clean(image)
    with kernel_mount(image, "ro") as again:
        assert (again.root / "open").read_bytes() == b"after" * 1000


# ---- errors= -------------------------------------------------------------------------------------------------------

def break_directory(image: Path) -> int:
    """Give the image a directory whose block has a wrong checksum; its inode number."""
    with kernel_mount(image, "rw") as mounted:
        (mounted.root / "broken").mkdir()
        (mounted.root / "broken" / "name").touch()
        number = (mounted.root / "broken").stat().st_ino
    block = int(run("debugfs", "-R", "blocks /broken", image).stdout.split()[0])
    with open(image, "r+b") as file:
        file.seek(block * 1024 + 30)
        file.write(b"\xff")
    return number


def header(image: Path) -> dict[str, str]:
    lines = run("dumpe2fs", "-h", image).stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("image", ["ext4-1k"], indirect=True)
@pytest.mark.parametrize("policy", ["continue", "remount-ro"])
def test_corruption_is_recorded_as_the_kernel_does(image: Path, policy: str) -> None:
    number = break_directory(image)
    with fusewire_mount(image, f"rw,errors={policy}") as mounted:
        (mounted.root / "before").write_bytes(b"b")
        for _ in range(2):
            with pytest.raises(OSError) as broken:
                os.listdir(mounted.root / "broken")
        assert broken.value.errno == errno.EBADMSG
        os.sync()
        if policy == "continue":
            (mounted.root / "after").write_bytes(b"a")
        else:
            with pytest.raises(OSError) as refused:
                (mounted.root / "after").mkdir()
            assert refused.value.errno == errno.EROFS
            assert "turned_read_only" in mounted.log_text()
    shown = header(image)
    assert shown["Filesystem state"] == "clean with errors"
    assert shown["FS Error count"] == ("2" if policy == "continue" else "1")
    for which in ("First", "Last"):
        assert shown[f"{which} error inode #"] == str(number) and shown[f"{which} error err"] == "EFSBADCRC"
        assert shown[f"{which} error function"] and int(shown[f"{which} error line #"])
    with kernel_mount(image, "ro") as again:
        assert (again.root / "before").read_bytes() == b"b"
        assert (again.root / "after").exists() == (policy == "continue")


@pytest.mark.parametrize("image", ["ext4-1k"], indirect=True)
def test_panic_stops_serving(image: Path) -> None:
    break_directory(image)
    with daemon(image, "rw,errors=panic") as mounted:
        (mounted.root / "before").write_bytes(b"b" * 5000)
        descriptor = os.open(mounted.root / "before", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        with pytest.raises(OSError):
            os.listdir(mounted.root / "broken")
        mounted.wait()
        with pytest.raises(OSError) as gone:
            os.listdir(mounted.root)
        assert gone.value.errno == errno.ENOTCONN
        run("umount", "-l", mounted.root)
    assert header(image)["Filesystem state"] == "clean with errors"
    with kernel_mount(image, "ro") as again:
        assert (again.root / "before").read_bytes() == b"b" * 5000


@pytest.mark.parametrize("image", ["ext4-1k"], indirect=True)
def test_the_superblock_says_what_to_do_unless_an_option_does(image: Path) -> None:
    break_directory(image)
    run("tune2fs", "-e", "remount-ro", image)
    assert struct.unpack_from("<H", image.read_bytes(), 1024 + 0x3C) == (2,)
    with fusewire_mount(image, "rw") as mounted:
        with pytest.raises(OSError):
            os.listdir(mounted.root / "broken")
        with pytest.raises(OSError) as refused:
            (mounted.root / "after").mkdir()
        assert refused.value.errno == errno.EROFS
