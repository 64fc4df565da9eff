"""``fusewire doctor``: what it says is what this kernel does, and its advice follows from the findings."""

import json
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fusewire import kernel, mount, mountapi, paths
from fusewire.cli import doctor, main
from fusewire.kernel import Facts, From, Hello
from fusewire.mount import Route
from fusewire.mountrequest import MountRequest
from tests.mount import tinyfuse

USER = 65534
KEYS = {
    "format": None, "can_mount": None, "problem": None, "sync_init": None, "passthrough": None, "fusectl_mounted": None,
    "paths": None,
    "kernel": {"release", "machine"},
    "protocol": {"major", "minor", "source", "init_flags"},
    "device": {"usable", "problem"},
    "filesystems": {"fuse", "fuseblk"},
    "io_uring": {"parameter", "offered"},
    "iomap": {"present", "allowed", "flags", "parameter"},
    "limits": {"max_pages", "default_request_timeout_s", "max_request_timeout_s"},
    "user": {"route", "fusermount3", "fusermount3_setuid", "user_allow_other", "user_namespaces"},
    "loop": {"usable", "problem"},
}
TOPICS = ["mount", "file_data", "requests", "start", "sync", "read_size"]


@pytest.fixture(scope="module")
def facts() -> Facts:
    return kernel.probe()


def test_json_has_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key: set(value) if isinstance(value, dict) else None for key, value in found.items()} == KEYS
    assert [path["topic"] for path in found["paths"]] == TOPICS
    assert all(set(path) == {"topic", "taken", "best", "why_not"} for path in found["paths"])
    assert found["can_mount"] is True and found["problem"] is None


def test_text_names_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("kernel", "FUSE protocol", "/dev/fuse", "fuseblk", "io_uring", "passthrough", "iomap", "fusermount3",
                 "user namespaces", "loop devices", "What fusewire makes of it", "Mounts are made as root."):
        assert word in text


def test_protocol_is_the_one_that_a_mount_gets(facts: Facts, tmp_path: Path, mounts: None) -> None:
    mounting = mount.prepare(MountRequest("x", str(tmp_path)))
    mounted, first = mount.in_thread(mounting.attach), mount.in_thread(mounting.first_message)
    message = first.result()
    os.write(mounting.fd, tinyfuse.init_reply(message))
    mounted.result()
    mountapi.umount(bytes(tmp_path))
    os.close(mounting.fd)
    hello = kernel.parse_hello(message)
    assert hello is not None
    assert (facts.protocol_minor, facts.init_flags) == (hello.minor, hello.flags)
    assert facts.protocol_from is From.ASKED
    assert facts.sync_init is mounting.sync_init


def test_findings_are_the_machines(facts: Facts) -> None:
    types = Path("/proc/filesystems").read_text().split()
    assert (facts.has_fuse, facts.has_fuseblk) == ("fuse" in types, "fuseblk" in types)
    assert facts.release == os.uname().release
    parameter = Path("/sys/module/fuse/parameters/enable_uring")
    assert facts.io_uring_parameter is (parameter.read_text().strip() == "Y" if parameter.exists() else None)
    assert facts.io_uring_offered is bool(facts.io_uring_parameter)
    limit = Path("/proc/sys/fs/fuse/max_pages_limit")
    assert facts.max_pages_limit == (int(limit.read_text()) if limit.exists() else 256)
    assert facts.route is Route.ROOT


def test_probing_leaves_nothing_behind() -> None:
    def state() -> tuple[list[str], str]:
        return sorted(os.listdir("/proc/self/fd")), Path("/proc/self/mountinfo").read_text()

    before = state()
    kernel.probe()
    assert state() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def as_other(become: Callable[[], None]) -> dict[str, object]:
    """The JSON findings of somebody else."""
    child, pipe = tinyfuse.in_child(lambda say: say(doctor.as_json(kernel.probe())), become)
    with pipe:
        found = tinyfuse.Served(child, {}, pipe).next()
    os.waitpid(child, 0)
    assert "traceback" not in found, found["traceback"]
    return found


def test_user_is_told_how_the_version_was_learned(mounts: None, tmp_path: Path) -> None:
    """With access to /dev/fuse the kernel is asked in a user namespace; without, its release must do."""
    node = tmp_path / "fuse"
    os.mknod(node, stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    node.chmod(0o600)
    for parent in node.parents:
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    mountapi.mount(bytes(node), b"/dev/fuse", b"none", 4096, b"")
    try:
        denied = as_other(tinyfuse.as_user(USER))
        node.chmod(0o666)
        allowed = as_other(tinyfuse.as_user(USER))
    finally:
        mountapi.umount(b"/dev/fuse", mountapi.MNT_DETACH)
    assert denied["protocol"]["source"] == "release" and denied["iomap"]["present"] is None     # type: ignore[index]
    assert not denied["can_mount"] and "permission denied" in str(denied["problem"])
    assert allowed["protocol"]["source"] == "asked_in_namespace"                                # type: ignore[index]
    assert allowed["user"]["route"] == "fusermount" and allowed["can_mount"]                    # type: ignore[index]
    assert allowed["protocol"]["minor"] == denied["protocol"]["minor"]                          # type: ignore[index]


def test_inside_a_user_namespace(mounts: None) -> None:
    found = as_other(kernel.enter_namespace)
    assert found["user"]["route"] == "user_namespace"       # type: ignore[index]
    first = found["paths"][0]                               # type: ignore[index]
    assert first["taken"] == "plain fuse, inside a user namespace" and "user namespace" in first["why_not"]


# --- Conclusions ------------------------------------------------------------------------------------------------------

IDEAL = Facts(
    release="9.9", machine="m", device_problem="", protocol_minor=99, protocol_from=From.ASKED, init_flags=0,
    has_fuse=True, has_fuseblk=True, sync_init=True, io_uring_parameter=True, io_uring_offered=True, passthrough=True,
    iomap_support=3, iomap_parameter=True, max_pages_limit=256, default_request_timeout_s=0, max_request_timeout_s=0,
    fusermount="/f", fusermount_is_setuid=True, user_allow_other=False, loop_problem="", user_namespaces=True,
    route=Route.ROOT, fusectl=True,
)


def reason(topic: str, **changes: object) -> str:
    """Why the best way of a topic is not taken when the ideal machine is changed so."""
    found = {path.topic: path for path in paths.choose(replace(IDEAL, **changes))}     # type: ignore[arg-type]
    path = found[topic]
    assert path.is_best is (path.taken == path.best)
    return path.why_not


def test_ideal_machine_takes_the_best_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in paths.choose(IDEAL):
        assert path.is_best or path.topic in ("file_data", "requests")
    monkeypatch.setattr(paths, "WAYS_NOT_USED_YET", frozenset())
    assert all(path.is_best for path in paths.choose(IDEAL))


@pytest.mark.parametrize(
    ("topic", "changes", "words"),
    [
        ("mount", {"has_fuseblk": False}, "no fuseblk"),
        ("mount", {"route": Route.FUSERMOUNT}, "only root"),
        ("mount", {"route": Route.USER_NAMESPACE}, "user namespace"),
        ("mount", {"route": Route.FUSERMOUNT, "fusermount": ""}, "package fuse3"),
        ("mount", {"route": Route.FUSERMOUNT, "fusermount_is_setuid": False}, "not set-user-ID"),
        ("mount", {"has_fuse": False}, "CONFIG_FUSE_FS"),
        ("mount", {"device_problem": "/dev/fuse: gone"}, "/dev/fuse: gone"),
        ("mount", {"loop_problem": "/dev/loop-control: gone"}, "/dev/loop-control: gone"),
        ("file_data", {"iomap_support": None}, "does not have the fuse iomap"),
        ("file_data", {"iomap_support": None, "device_problem": "closed"}, "cannot be asked: closed"),
        ("file_data", {"iomap_support": 0, "iomap_parameter": False}, "enable_iomap"),
        ("file_data", {"iomap_support": 0}, "CAP_SYS_RAWIO"),
        ("requests", {"io_uring_parameter": None}, "6.14"),
        ("requests", {"io_uring_parameter": False}, "enable_uring"),
        ("start", {"sync_init": False}, "6.18"),
        ("start", {"route": Route.FUSERMOUNT}, "already made"),
        ("sync", {"protocol_minor": 44}, "6.18"),
        ("sync", {"protocol_minor": None}, "6.18"),
        ("sync", {"route": Route.USER_NAMESPACE}, "only fuseblk"),
        ("read_size", {"max_pages_limit": 32}, "fs.fuse.max_pages_limit"),
    ],
)
def test_reasons(topic: str, changes: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "WAYS_NOT_USED_YET", frozenset())
    assert words in reason(topic, **changes)


def test_what_is_not_used_yet_is_said_so() -> None:
    assert "does not use it yet" in reason("file_data") and "does not use it yet" in reason("requests")


def test_text_of_every_machine() -> None:
    """Unknowns and problems have words too."""
    bare = replace(
        IDEAL, device_problem="/dev/fuse: none", protocol_minor=None, protocol_from=From.RELEASE, sync_init=None,
        io_uring_parameter=None, io_uring_offered=None, passthrough=None, iomap_support=None, fusermount="",
        max_request_timeout_s=60, route=Route.FUSERMOUNT,
    )
    text = doctor.as_text(bare)
    assert "Mounting is not possible: only root can mount here" in text and "unknown" in text and "60 s" in text
    assert json.loads(json.dumps(doctor.as_json(bare)))["iomap"]["present"] is None
    assert "yes, not allowed to this process" in doctor.as_text(replace(IDEAL, iomap_support=0))
    assert "yes, allowed" in doctor.as_text(IDEAL)


def test_exit_code_when_nothing_can_be_mounted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel, "probe", lambda: replace(IDEAL, has_fuse=False))
    assert main(["doctor"]) == 32
    assert "no FUSE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("release", "minor"),
    [
        ("5.15.0-91-generic", 34), ("6.1.0-13-amd64", 37), ("6.5.3", 38), ("6.6", 39), ("6.8.0", 39), ("6.9.1", 40),
        ("6.12.0", 41), ("6.18.44", 45), ("7.0-rc1", 45), ("7.3.0", 46), ("8.0", 46), ("4.19.0", None),
        ("odd", None), ("", None),
    ],
)
def test_version_table(release: str, minor: int | None) -> None:
    assert kernel.minor_of_release(release) == minor


def test_table_agrees_with_this_kernel(facts: Facts) -> None:
    """Stable trees may have moved on from the release they began with, never back."""
    expected = kernel.minor_of_release(os.uname().release)
    assert facts.protocol_minor is not None and expected is not None
    assert facts.protocol_minor >= expected


def test_hello_of_short_and_foreign_messages() -> None:
    header = struct.pack("=IIQQIIIHH", 104, 26, 2, 0, 0, 0, 0, 0, 0)
    whole = header + struct.pack("=IIIII", 7, 45, 131072, 1 << 30, 1 << 5).ljust(64, b"\0")
    assert kernel.parse_hello(whole) == Hello(45, 131072, 1 << 30 | 1 << 37)
    without_extension = header + struct.pack("=IIIII", 7, 35, 4096, 1, 1 << 5).ljust(64, b"\0")
    assert kernel.parse_hello(without_extension) == Hello(35, 4096, 1)
    for length in range(len(whole)):
        assert kernel.parse_hello(whole[:length]) is None
    assert kernel.parse_hello(whole[:4] + b"\3" + whole[5:]) is None
