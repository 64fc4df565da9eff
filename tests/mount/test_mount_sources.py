"""Loop devices and the lock on a source: what is attached, who is refused, and how the other user is named."""

import fcntl
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusewire import ioctl, loopdev, sourcelock
from fusewire.loopdev import Part, SourceError
from fusewire.sourcelock import SourceBusy, lock_source
from tests.mount import tinyfuse
from tests.mounting import is_given_back

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("mounts")


@pytest.fixture
def image(tmp_path: Path) -> str:
    """A file of 8 MiB whose every MiB holds its own number."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([number]) * MIB for number in range(8)))
    return str(path)


@contextmanager
def opened(path: str, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def busy(path: str, write: bool) -> str:
    with pytest.raises(SourceBusy) as raised:
        lock_source(path, write)
    return str(raised.value)


# --- Loop devices -----------------------------------------------------------------------------------------------------


def test_part_of_an_image_is_shown_and_freed(image: str) -> None:
    with opened(image) as fd, loopdev.attach(fd, image, Part(2 * MIB, 3 * MIB)) as device:
        assert ioctl.device_bytes(device.fd) == 3 * MIB
        assert os.pread(device.fd, 1, 0) == b"\2" and os.pread(device.fd, 1, 3 * MIB - 1) == b"\4"
        assert stat.S_ISBLK(os.stat(device.path).st_mode)
        status = ioctl.loop_status(device.fd)
        assert status is not None
        assert (status.offset_bytes, status.sizelimit_bytes, status.number) == (2 * MIB, 3 * MIB, device.number)
        assert status.flags == ioctl.LO_FLAGS_AUTOCLEAR
        assert status.file_name == os.fsencode(image)[: ioctl.LO_NAME_BYTES - 1]
        assert loopdev.attached_to(os.fstat(fd)) == [(device.path, status)]
        assert not loopdev.is_free(device.number)
        os.pwrite(device.fd, b"x" * 4096, 0)
        os.fsync(device.fd)
        assert os.pread(fd, 1, 2 * MIB) == b"x"
    assert is_given_back(device.number, image)
    device.close()      # again: nothing
    assert loopdev.attached_to(os.stat(image)) == []


def test_read_only_device_refuses_writing(image: str) -> None:
    with opened(image, os.O_RDONLY) as fd, loopdev.attach(fd, image, Part(read_only=True)) as device:
        assert device.read_only and ioctl.is_read_only(device.fd)
        with pytest.raises(OSError), opened(device.path, os.O_RDWR) as again:
            os.pwrite(again, bytes(4096), 0)
    assert Path(image).read_bytes()[:1] == b"\0"


def test_sector_size_and_direct_io(image: str) -> None:
    with opened(image) as fd, loopdev.attach(fd, image, Part(sector_bytes=4096, direct_io=True)) as device:
        assert ioctl.logical_sector_bytes(device.fd) == 4096
        status = ioctl.loop_status(device.fd)
        assert status is not None
        assert device.direct_io is bool(status.flags & ioctl.LO_FLAGS_DIRECT_IO)
        assert os.pread(device.fd, 1, 5 * MIB) == b"\5"


def test_detach_with_another_opener_waits_for_it(image: str) -> None:
    with opened(image) as fd:
        device = loopdev.attach(fd, image)
        with opened(device.path, os.O_RDONLY):
            device.detach()
            assert not loopdev.is_free(device.number)
        assert is_given_back(device.number, image)
        device.detach()     # again: nothing


def test_racing_for_free_devices(image: str) -> None:
    """All get one although LOOP_CTL_GET_FREE promises the same device to several."""
    found: list[loopdev.LoopDevice] = []
    start = threading.Barrier(6)

    def race() -> None:
        start.wait()
        for _ in range(5):
            found.append(loopdev.attach(fd, image, Part(read_only=True)))

    with opened(image) as fd:
        threads = [threading.Thread(target=race) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            assert len({device.number for device in found}) == 30
        finally:
            for device in found:
                device.close()
    assert all(is_given_back(device.number, image) for device in found)


def test_lost_races_are_tried_again_but_not_for_ever(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(image) as fd, loopdev.attach(fd, image) as taken:
        asked = []

        def always_taken(_control: int) -> int:
            asked.append(1)
            return taken.number

        monkeypatch.setattr(ioctl, "loop_get_free", always_taken)
        with pytest.raises(SourceError, match="others took every free one first"):
            loopdev.attach(fd, image)
        assert len(asked) > 10


def test_error_without_loop_control_says_what_to_do(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopdev, "_CONTROL", "/dev/none-such")
    with opened(image) as fd, pytest.raises(SourceError) as raised:
        loopdev.attach(fd, image)
    assert str(raised.value).startswith(f"{image}: cannot make a loop device: /dev/none-such: no such file")
    assert "noloop" in str(raised.value)


def test_status_of_what_is_no_loop_device(image: str) -> None:
    assert loopdev.status_of(image) is None
    assert loopdev.status_of("/dev/null") is None
    assert loopdev.status_of("/nonexistent") is None


# --- The lock ---------------------------------------------------------------------------------------------------------


def test_one_writer_or_many_readers_of_an_image(image: str) -> None:
    me = f"(process {os.getpid()})"
    with lock_source(image, write=True) as lock:
        assert not lock.is_device and lock.warnings == []
        for write in (True, False):
            text = busy(image, write)
            assert text.startswith(f"{image} is in use: ") and me in text
    with lock_source(image, write=False), lock_source(image, write=False):
        assert me in busy(image, write=True)
    lock_source(image, write=True).release()


def test_lock_of_another_process_names_it(image: str) -> None:
    with opened(image) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        child, pipe = tinyfuse.in_child(lambda say: say({"text": busy(image, False)}), tinyfuse.nobody_else)
        with pipe:
            text = tinyfuse.Served(child, {}, pipe).next()["text"]
        os.waitpid(child, 0)
    name = Path("/proc/self/comm").read_text().strip()
    assert text == f"{image} is in use: {name} (process {os.getpid()})"


def test_image_behind_a_loop_device_has_no_second_writer(image: str) -> None:
    with opened(image) as fd:
        with loopdev.attach(fd, image) as device:
            assert busy(image, write=True) == f"{image} is in use by {device.path} (losetup -d {device.path} frees it)"
            with lock_source(image, write=False) as lock:
                assert lock.warnings == [
                    f"{image} is in use by {device.path}, which may change it while it is read here"
                ]
        with loopdev.attach(fd, image, Part(read_only=True)) as device:
            assert device.path in busy(image, write=True)
            with lock_source(image, write=False) as lock:
                assert lock.warnings == []
        with lock_source(image, write=True):
            pass


def test_device_in_use_names_its_mount(image: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    target = tmp_path / "mnt"
    target.mkdir()
    with opened(image) as fd, loopdev.attach(fd, image) as device:
        with lock_source(device.path, write=True) as lock:
            assert lock.is_device
            assert busy(device.path, write=False) == f"{device.path} is in use"
        subprocess.run(["mount", device.path, target], check=True)
        try:
            assert busy(device.path, write=False) == f"{device.path} is in use: mounted on {target} (ext4)"
            assert f"in use by {device.path} (mounted on {target})" in busy(image, write=True)
        finally:
            subprocess.run(["umount", target], check=True)
        lock_source(device.path, write=True).release()


def test_writing_to_a_read_only_device_is_refused(image: str) -> None:
    with opened(image) as fd, loopdev.attach(fd, image, Part(read_only=True)) as device:
        with pytest.raises(SourceError, match="mount with -o ro"):
            lock_source(device.path, write=True)
        lock_source(device.path, write=False).release()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nonexistent/disk", "/nonexistent/disk: no such file or directory"),
        ("/dev/null", "/dev/null: neither a block device nor a regular file"),
        ("/tmp", "/tmp: neither a block device nor a regular file"),
    ],
)
def test_sources_that_cannot_be(path: str, message: str) -> None:
    with pytest.raises(SourceError) as raised:
        lock_source(path, write=False)
    assert str(raised.value) == message


def test_no_descriptors_are_left_open(image: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with opened(image) as fd, loopdev.attach(fd, image) as device:
        for path in (image, device.path):
            lock_source(path, write=False).release()
        busy(image, write=True)
        with lock_source(device.path, write=True):
            busy(device.path, write=True)
    assert len(os.listdir("/proc/self/fd")) == before
    assert sourcelock.flock_holders(os.stat(image)) == []
