"""Unmounting and the records of running daemons: ``umount`` returns when the daemon is done, and not before."""

# ruff: noqa: F811 - fixtures are imported from a neighbour, and named by parameters

import argparse
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fusewire import fusermount, mountapi, mountinfo, runtime, unmount
from fusewire.cli import main, umount
from fusewire.mountrequest import MountError
from tests.mount.test_mount_routes import USER, device_for_all, image, target  # noqa: F401
from tests.mount.tinyfuse import as_user, in_child, serving
from tests.mounting import is_given_back

pytestmark = pytest.mark.usefixtures("mounts")


@pytest.fixture(autouse=True)
def own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of these tests are in a folder of their own."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(runtime, "_SYSTEM", folder)
    return folder


def refused(name: str, **how: bool) -> str:
    with pytest.raises(MountError) as raised:
        unmount.unmount(name, **how)
    return str(raised.value)


def test_umount_of_a_fuseblk_returns_when_daemon_and_loop_device_are_gone(target: str, image: str) -> None:
    with serving("--fuseblk", "--image", image, image, target) as served:
        record = runtime.find(target)
        assert record is not None
        number = served.facts["loop"]
        assert (record.pid, record.source, record.target, record.loop) == (served.pid, image, target, number)
        assert record.device == f"/dev/loop{number}"
        unmount.unmount(target)
        assert not record.is_alive()
        assert is_given_back(number, image)
        assert not Path(served.facts["record"]).exists()
        assert served.next()["destroyed"] is True


def test_umount_waits_for_a_daemon_that_still_works(target: str, tmp_path: Path) -> None:
    """The daemon lives on after the unmount until a FIFO is written; so long umount must not return."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    said: list[str] = []
    heard = threading.Event()
    with serving("--hold", str(fifo), "x", target) as served:
        def say(text: str) -> None:
            said.append(text)
            heard.set()

        waiting = threading.Thread(target=lambda: unmount.unmount(target, say=say))
        waiting.start()
        assert heard.wait(60)       # it says for whom it waits: so it waits
        assert mountinfo.find(target) is None
        assert waiting.is_alive()
        with fifo.open("wb"):
            pass
        waiting.join(60)
        assert not waiting.is_alive()
        assert said == [f"{target}: waiting for process {served.pid} to finish"]


def test_lazy_umount_does_not_wait(target: str, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with serving("--hold", str(fifo), "x", target) as served:
        held = os.open(target, os.O_RDONLY)
        assert "is busy" in refused(target)
        unmount.unmount(target, lazy=True)
        assert mountinfo.find(target) is None
        os.close(held)
        with fifo.open("wb"):
            pass
        assert served.next()["destroyed"] is False


def test_busy_mount_names_its_user(target: str) -> None:
    with serving("x", target), subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=target) as user:
        try:
            text = refused(target)
            assert text.startswith(f"{target}: is busy: used by ") and f"cat (process {user.pid})" in text
            assert mountinfo.find(target) is not None
        finally:
            user.kill()


def test_force_ends_a_daemon_that_does_not_answer(target: str) -> None:
    said: list[str] = []
    with serving("x", target) as served:
        os.kill(served.pid, signal.SIGSTOP)
        with subprocess.Popen(["stat", "-f", target], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as stuck:
            while "fuse" not in Path(f"/proc/{stuck.pid}/stack").read_text():
                assert stuck.poll() is None     # it waits inside the kernel for an answer, or is about to
            unmount.unmount(target, force=True, say=said.append)
            assert stuck.wait(60) != 0
        assert mountinfo.find(target) is None
        assert said == [f"{target}: unmounted, but process {served.pid} has not ended"]
        os.kill(served.pid, signal.SIGCONT)
        assert served.next()["destroyed"] is False


def test_mount_seen_twice_keeps_the_daemon(target: str, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    with serving("x", target) as served:
        mountapi.mount(os.fsencode(target), bytes(second), b"none", 4096, b"")
        said: list[str] = []
        unmount.unmount(target, say=said.append)
        assert said == [f"{target}: still mounted on {second}"]
        unmount.unmount(str(second))
        assert served.next()["destroyed"] is False


def test_umount_by_source_and_through_a_link(target: str, image: str, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    for name in (image, str(link), os.path.relpath(target), f"{target}/../mnt/"):
        with serving("--fuseblk", "--image", image, image, target) as served:
            unmount.unmount(name)
            assert mountinfo.find(target) is None
            assert served.next()["destroyed"] is True


def test_user_unmounts_through_fusermount3(target: str, device_for_all: None, tmp_path: Path) -> None:
    folder = tmp_path / "user"
    folder.mkdir()
    os.chown(folder, USER, USER)
    user = as_user(USER, str(folder))
    with serving("x", target, become=user) as served:
        assert served.facts["record"] == str(folder / "fusewire" / Path(served.facts["record"]).name)
        child, pipe = in_child(lambda say: say({"error": refused(target, force=True)}), user)
        with pipe:
            assert json.loads(pipe.readline()) == {"error": f"{target}: only root can force an unmount"}
        os.waitpid(child, 0)
        child, pipe = in_child(lambda _say: unmount.unmount(target), user)
        with pipe:
            assert pipe.read() == b""
        os.waitpid(child, 0)
        assert mountinfo.find(target) is None
        assert served.next()["destroyed"] is False


def test_error_of_fusermount3_is_one_line(target: str) -> None:
    with pytest.raises(MountError) as raised:
        fusermount.unmount(target)
    assert str(raised.value).startswith(f"{target}: ") and "\n" not in str(raised.value)


def test_what_is_not_ours_is_left_alone(target: str, tmp_path: Path) -> None:
    assert refused(target) == f"{target}: not mounted"
    assert refused("/proc") == "/proc: mounted as proc, not by fusewire; use umount(8)"
    assert refused("/nonexistent") == "/nonexistent: not mounted"


# --- The command ------------------------------------------------------------------------------------------------------


def test_command_and_its_exit_codes(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("x", target):
        assert main(["umount", target]) == 0
    with serving("x", target):
        assert main(["umount", "/proc", target]) == 64
    assert main(["umount", target, "/proc"]) == 32
    told = capsys.readouterr().err.splitlines()
    assert told[-2:] == [
        f"fusewire: {target}: not mounted", "fusewire: /proc: mounted as proc, not by fusewire; use umount(8)"
    ]
    with pytest.raises(SystemExit) as ended:
        main(["umount"])
    assert ended.value.code == 1


def test_interrupted_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(umount, "unmount", interrupted)
    args = argparse.Namespace(target=["/mnt"], lazy=False, force=False, quiet=True)
    assert umount.run(args) == 8
    assert capsys.readouterr().err == "fusewire: /mnt: interrupted; the daemon finishes by itself\n"


# --- Records ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def registered(target: str) -> Iterator[runtime.Registration]:
    """The record of this very process, as if it served a mount."""
    with serving("x", target):
        registration = runtime.register("source", target, version="v")
        assert registration is not None
        yield registration


def test_record_says_who_serves(registered: runtime.Registration, target: str) -> None:
    record = registered.record
    found = mountinfo.find(target)
    assert found is not None
    assert runtime.find(target) == record
    assert record.pid == os.getpid() and record.dev == found.dev and record.connection == found.connection
    assert record in list(runtime.records())
    assert not runtime.wait_gone(record, 0)
    registered.remove()
    registered.remove()
    assert runtime.find(target) is None


def test_stale_record_is_nobody_and_is_removed(registered: runtime.Registration, target: str) -> None:
    """The process id is in use, by a process that started at another time."""
    stale = replace(registered.record, start_ticks=registered.record.start_ticks - 1)
    registered.path.write_text(json.dumps(asdict(stale)))
    assert runtime.wait_gone(stale)
    assert runtime.find(target) is None
    assert not registered.path.exists()


def test_zombie_counts_as_gone() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert runtime.start_ticks(child) is None
    os.waitpid(child, 0)
    assert runtime.start_ticks(child) is None
    assert runtime.wait_gone(runtime.Record(child, 1, 1, 1, "", "", "", -1, ""))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"pid": 1}', b'{"pid": "1"}',
        b"-1", b"0", b"4194305", b"true", b"1e3", b'"x"',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_malformed_records_are_ignored(content: bytes, registered: runtime.Registration, target: str) -> None:
    if content[:1] in b"-0123456789t\"" and content:
        fields = json.dumps(asdict(registered.record))
        content = fields.replace(f'"pid": {os.getpid()}', f'"pid": {content.decode()}').encode()
    registered.path.write_bytes(content)
    assert runtime.parse(content) is None
    assert runtime.find(target) is None
    assert registered.record not in list(runtime.records())


def test_records_where_anybody_may_write_are_not_believed(
    registered: runtime.Registration, target: str, own_records: Path
) -> None:
    assert runtime.find(target) is not None
    own_records.chmod(0o777)
    assert runtime.find(target) is None
    assert runtime.register("source", target) is None or own_records not in registered.path.parents


def test_no_record_for_what_is_not_mounted(tmp_path: Path) -> None:
    assert runtime.register("source", str(tmp_path)) is None


# --- The mount table --------------------------------------------------------------------------------------------------


def test_mount_table_with_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "a b\tc\\d\n#é"
    folder.mkdir()
    mountapi.mount(b"so urce", bytes(folder), b"tmpfs", 0, b"size=64k")
    try:
        found = mountinfo.find(str(folder))
        assert found is not None
        assert (found.target, found.source, found.fstype) == (bytes(folder), b"so urce", "tmpfs")
        assert found.dev == folder.stat().st_dev
        assert found in mountinfo.mounts_of_device(found.dev)
    finally:
        mountapi.umount(bytes(folder))
    assert mountinfo.find(str(folder)) is None


@pytest.mark.parametrize(
    "line", [b"", b" - ", b"1 2 3", b"x 1 0:1 / /mnt rw - t s o", b"1 1 0 / /mnt rw - t s o", b"1 1 0:1 / /mnt rw - t"]
)
def test_unknown_lines_of_the_mount_table_are_skipped(line: bytes) -> None:
    assert mountinfo.parse_line(line) is None
