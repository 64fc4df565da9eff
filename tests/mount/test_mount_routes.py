"""Mounting by each route, on this kernel: as root, inside a user namespace, through fusermount3; and its errors."""

import errno
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusewire import bdi, fusermount, kernel, loopdev, mount, mountapi, mountinfo
from fusewire.mountrequest import MountError, MountRequest
from fusewire.options import MS_NOATIME, MS_NODIRATIME, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_STRICTATIME
from tests.mount import tinyfuse
from tests.mount.tinyfuse import as_user, serving
from tests.mounting import is_given_back

USER = 65534
IMAGE_BYTES = 8 << 20

pytestmark = pytest.mark.usefixtures("mounts")


@pytest.fixture
def target(tmp_path: Path) -> str:
    """An empty directory that an ordinary user can reach and owns."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    os.chown(folder, USER, USER)
    for parent in folder.parents:
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return str(folder)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    return str(path)


@pytest.fixture
def device_for_all(tmp_path: Path) -> Iterator[None]:
    """``/dev/fuse`` as udev makes it, mode 0666, whatever this machine's is."""
    node = tmp_path / "fuse"
    os.mknod(node, stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
    node.chmod(0o666)
    mountapi.mount(bytes(node), b"/dev/fuse", b"none", 4096, b"")     # MS_BIND
    yield
    mountapi.umount(b"/dev/fuse", mountapi.MNT_DETACH)


def test_root_mounts_plain_fuse(target: str) -> None:
    with serving("-o", "ro,nosuid,noexec,noatime,allow_other", "a name", target) as served:
        assert served.facts["route"] == "ROOT"
        assert (served.facts["fstype"], served.facts["source"]) == ("fuse.fusewire", "a name")
        assert set(served.facts["options"].split(",")) == {"ro", "nosuid", "noexec", "noatime"}
        assert {"allow_other", "default_permissions"} <= set(served.facts["super_options"].split(","))
        assert os.listdir(target) == []
        assert os.statvfs(target).f_blocks == 7
        mountapi.umount(os.fsencode(target))
        assert served.next()["destroyed"] is False


def test_root_mounts_a_loop_device_as_fuseblk(target: str, image: str) -> None:
    with serving("--fuseblk", "--image", image, image, target) as served:
        number = served.facts["loop"]
        assert (served.facts["fstype"], served.facts["source"]) == ("fuseblk.fusewire", f"/dev/loop{number}")
        assert "blksize=4096" in served.facts["super_options"].split(",")
        assert served.facts["dev"] == os.stat(f"/dev/loop{number}").st_rdev
        assert not loopdev.is_free(number)
        mountapi.umount(os.fsencode(target))
        assert served.next()["destroyed"] is True
    assert is_given_back(number, image)


def test_killed_daemon_leaves_no_loop_device(target: str, image: str) -> None:
    with serving("--fuseblk", "--image", image, image, target) as served:
        number = served.facts["loop"]
        os.kill(served.pid, 9)
        assert served.next() == {}
        mountapi.umount(os.fsencode(target))
    assert is_given_back(number, image)


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (MS_RDONLY | MS_NODIRATIME, {"ro", "nodiratime", "relatime"}),
        (MS_RDONLY | MS_STRICTATIME | MS_NOSUID, {"ro", "nosuid"}),
        (MS_NOATIME | MS_NOEXEC, {"rw", "noatime", "noexec"}),
    ],
)
@pytest.mark.parametrize("call", ["fsopen", "mount"])
def test_both_ways_of_mounting_set_the_same_flags(
    target: str, flags: int, shown: set[str], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsopen(2) and, where a kernel or a container's filter lacks it, mount(2)."""
    if call == "mount":
        def lacking(_fstype: bytes) -> mountapi.Context:
            raise mountapi.MountFailed(errno.ENOSYS)
        monkeypatch.setattr(mountapi, "Context", lacking)
    with Mounted(MountRequest("some, source", target, flags=flags)) as found:
        assert set(found.options.split(",")) == shown
        assert (found.fstype, found.source) == ("fuse.fusewire", b"some, source")
        assert {"default_permissions", "allow_other", "max_read=1048576"} <= set(found.super_options.split(","))


class Mounted:
    """A mount in this very process that nothing but INIT is answered for: nobody may touch what is in it."""

    def __init__(self, request: MountRequest) -> None:
        self.request = request

    def __enter__(self) -> mountinfo.Mount:
        self.mounting = tinyfuse.start(self.request)
        found = mountinfo.find(self.request.target)
        assert found is not None
        return found

    def __exit__(self, *_: object) -> None:
        mountapi.umount(os.fsencode(self.request.target))
        os.close(self.mounting.fd)


def test_readahead_is_raised(target: str, image: str) -> None:
    with Mounted(MountRequest("x", target)) as found:
        shown = Path(f"/sys/class/bdi/{os.major(found.dev)}:{os.minor(found.dev)}/read_ahead_kb")
        before = int(shown.read_text())
        assert bdi.raise_readahead(target, before + 512)
        assert int(shown.read_text()) == before + 512
        assert bdi.raise_readahead(target, 64)
        assert int(shown.read_text()) == before + 512     # never lowered
    with serving("--fuseblk", "--image", image, image, target) as served:
        dev = served.facts["dev"]
        own = Path(f"/sys/class/bdi/{os.major(dev)}:{os.minor(dev)}-fuseblk/read_ahead_kb")
        of_device = Path(f"/sys/class/bdi/{os.major(dev)}:{os.minor(dev)}/read_ahead_kb")
        before = int(of_device.read_text())
        assert bdi.raise_readahead(target, 3000)
        assert int(own.read_text()) == 3000
        assert int(of_device.read_text()) == before
    assert not bdi.raise_readahead(target, 1024)      # nothing is mounted there now


def test_more_may_be_dirty(target: str) -> None:
    with Mounted(MountRequest("x", target)) as found:
        shown = Path(f"/sys/class/bdi/{os.major(found.dev)}:{os.minor(found.dev)}")
        assert [int((shown / name).read_text()) for name in ("max_ratio", "strict_limit")] == [1, 1]
        assert bdi.raise_dirty_limit(target, 30)
        assert bdi.raise_dirty_limit(target, 20)    # never lowered
        assert [int((shown / name).read_text()) for name in ("max_ratio", "strict_limit")] == [30, 0]
    assert not bdi.raise_dirty_limit(target)        # nothing is mounted there now


def test_aborted_connection_ends_the_server(target: str) -> None:
    with serving("x", target) as served:
        assert mount.abort_connection(served.facts["dev"])
        assert served.next()["destroyed"] is False
        with pytest.raises(OSError) as raised:
            os.listdir(target)
        assert raised.value.errno == errno.ENOTCONN
        assert not mount.abort_connection(os.makedev(0, (1 << 20) - 1))


def test_user_namespace_mounts_plain_fuse(target: str, device_for_all: None) -> None:
    def become() -> None:
        as_user(USER)()
        kernel.enter_namespace()

    with serving("--visit", "x.img", target, become=become) as served:
        assert served.facts["route"] == "USER_NAMESPACE"
        assert served.facts["fstype"] == "fuse.fusewire"
        assert served.next() == {"destroyed": False, "visit": {"names": [], "blocks": 7}}
    assert mountinfo.find(target) is None


def test_user_namespace_refuses_block_devices(target: str, device_for_all: None) -> None:
    with serving("--fuseblk", "/dev/loop0", target, become=kernel.enter_namespace) as served:
        expected = "a user namespace cannot mount block devices (use -o noloop on an image)"
        assert served.facts == {"error": f"{target}: {expected}"}


def test_user_namespace_without_a_mount_namespace(target: str, device_for_all: None) -> None:
    def become() -> None:
        mountapi.unshare(0x10000000)
        Path("/proc/self/uid_map").write_text("0 0 1")

    with serving("x", target, become=become) as served:
        assert "unshare --mount" in served.facts["error"]


def test_user_mounts_through_fusermount3(target: str, device_for_all: None) -> None:
    with serving("-o", "ro,noatime,noexec", "with,comma\\and more", target, become=as_user(USER)) as served:
        assert served.facts["route"] == "FUSERMOUNT"
        assert served.facts["source"] == "with,comma\\and more"
        assert served.facts["fstype"] == "fuse.fusewire"
        assert {"ro", "nosuid", "nodev", "noexec", "noatime"} == set(served.facts["options"].split(","))
        assert f"user_id={USER}" in served.facts["super_options"].split(",")
        child, pipe = tinyfuse.in_child(lambda say: say({"names": os.listdir(target)}), as_user(USER))
        with pipe:
            assert pipe.read() == b'{"names": []}\n'
        os.waitpid(child, 0)
        child, pipe = tinyfuse.in_child(lambda _say: fusermount.unmount(target), as_user(USER))
        with pipe:
            assert pipe.read() == b""
        os.waitpid(child, 0)
        assert served.next()["destroyed"] is False
    assert mountinfo.find(target) is None


def error_as_user(request: MountRequest, prepare: Callable[[], None] = tinyfuse.nobody_else) -> str:
    """The text of the ``MountError`` that a user gets."""
    def work(say: Callable[[dict[str, str]], None]) -> None:
        prepare()
        try:
            mount.prepare(request)
        except MountError as error:
            say({"error": str(error)})

    child, pipe = tinyfuse.in_child(work, as_user(USER))
    with pipe:
        told = tinyfuse.Served(child, {}, pipe).next()
    os.waitpid(child, 0)
    return str(told.get("error", told))


def test_error_of_fusermount3_is_one_line(tmp_path: Path, target: str, device_for_all: None) -> None:
    Path(target).rename(tmp_path / "away")
    (tmp_path / "mnt").mkdir()      # root's: a user may not mount over it
    text = error_as_user(MountRequest("x", target, allow_other=False))
    assert text.startswith(f"{target}: ") and "fusermount3" in text and "\n" not in text


def test_user_cannot_mount_for_everybody_unless_root_allows_it(target: str, tmp_path: Path) -> None:
    def configured(text: str | None) -> Callable[[], None]:
        path = tmp_path / "fuse.conf"
        if text is not None:
            path.write_text(text)

        def change() -> None:
            fusermount.CONFIGURATION = path
        return change

    request = MountRequest("x", target, allow_other=True)
    for text in (None, "", "#user_allow_other\n", "user_allow_others\n"):
        assert "needs the line user_allow_other" in error_as_user(request, configured(text))
    allowed = configured(" user_allow_other \n")
    assert "user_allow_other" not in error_as_user(MountRequest("x", target + "/no"), allowed)


def test_user_without_fusermount3_is_told_what_to_do(target: str) -> None:
    def hide() -> None:
        fusermount.PROGRAM = "fusermount3-that-nobody-has"

    text = error_as_user(MountRequest("x", target, allow_other=False), hide)
    assert "not installed" in text and "fuse3" in text and "unshare --user --mount" in text


def test_user_cannot_mount_block_devices(target: str) -> None:
    assert "only root can mount a block device" in error_as_user(MountRequest("/dev/loop0", target, fuseblk=True))


def failure(request: MountRequest) -> str:
    with pytest.raises(MountError) as raised:
        tinyfuse.start(request)
    assert mountinfo.find(request.target) is None
    return str(raised.value)


def test_errors_name_target_and_cause(target: str, image: str) -> None:
    assert failure(MountRequest("x", target + "/missing")) == f"{target}/missing: no such file or directory"
    assert failure(MountRequest("x", image)) == f"{image}: not a directory"
    assert failure(MountRequest(image, target, fuseblk=True)) == (
        f"{target}: cannot mount {image}: {image} is not a block device"
    )
    text = failure(MountRequest("x", target, security={"fscontext": "x"}))
    assert "kernel: " in text and "fscontext" in text


def test_claimed_device_is_reported(target: str, image: str) -> None:
    done = subprocess.run(["losetup", "-f", "--show", "-r", image], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    try:
        claim = os.open(device, os.O_RDONLY | os.O_EXCL)
        request = MountRequest(device, target, flags=MS_RDONLY, fuseblk=True)
        assert failure(request) == f"{target}: cannot mount {device}: {device} is mounted or claimed by something else"
        os.close(claim)
        assert "read-only" in failure(MountRequest(device, target, fuseblk=True))
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_missing_and_forbidden_device_nodes_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mount, "DEVICE", str(tmp_path / "none"))
    with pytest.raises(MountError, match="modprobe fuse"):
        mount.open_device()
    os.mknod(tmp_path / "none", stat.S_IFCHR | 0o666, os.makedev(10, 254))
    with pytest.raises(MountError, match=str(tmp_path)):
        mount.open_device()


def test_refused_init_fails_the_mount_where_it_waits_for_it(target: str) -> None:
    mounting = mount.prepare(MountRequest("x", target))
    mounted, first = mount.in_thread(mounting.attach), mount.in_thread(mounting.first_message)
    message = first.result()
    if mounting.sync_init:
        os.write(mounting.fd, tinyfuse.reply(message, errno.EPROTO))
        with pytest.raises(MountError, match="no valid answer to INIT"):
            mounted.result()
        assert mountinfo.find(target) is None
    else:
        mounted.result()
        mountapi.umount(os.fsencode(target))
    os.close(mounting.fd)


def test_bug_in_a_thread_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda details: seen.append(details.exc_type))

    def faulty() -> None:
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="the thread of faulty failed"):
        mount.in_thread(faulty).result()
    assert mount.in_thread(lambda: 7).result() == 7
    with pytest.raises(MountError):
        mount.in_thread(lambda: mount.prepare(MountRequest("x", "/nonexistent"))).result()
    for thread in threading.enumerate():
        if thread.name == "faulty":
            thread.join()
    assert seen == [ZeroDivisionError]
