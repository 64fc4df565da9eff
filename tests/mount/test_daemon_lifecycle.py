"""The daemon from its command line to its end: what it prints, its exit codes, what it leaves behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire import mountinfo, runtime
from tests.mounting import (
    READY_SECONDS,
    fusewire_command,
    fusewire_environment,
    fusewire_mount,
    is_given_back,
    loop_device,
    mount_point,
    mount_table,
    run,
    wait_mounted,
    wait_unused,
)
from tests.wire.kernel_peer import FILES, make_image

pytestmark = pytest.mark.usefixtures("mounts")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("daemon"))


@pytest.fixture
def target() -> Iterator[Path]:
    with mount_point() as path:
        yield path
        if path in mount_table():
            run("umount", "--lazy", path)


def fusewire(*words: str | Path, **particulars: object) -> subprocess.CompletedProcess[str]:
    """The command run to its end, with what it printed."""
    command = [*fusewire_command(), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=fusewire_environment(),
                          timeout=READY_SECONDS, **particulars)  # type: ignore[call-overload]


def copy_of(image: Path, folder: Path) -> Path:
    path = folder / "copy.img"
    path.write_bytes(image.read_bytes())
    return path


def edited(image: Path, folder: Path, offset: int, data: bytes) -> Path:
    path = copy_of(image, folder)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


# ---- in the background ---------------------------------------------------------------------------------------------


def test_the_command_returns_when_the_mount_answers(image: Path, target: Path) -> None:
    done = fusewire("mount", "-o", "ro", image, target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    mount = mountinfo.find(str(target))
    assert mount is not None and mount.fstype == "fuseblk.fusewire" and "ro" in mount.options.split(",")
    assert (target / "a").read_bytes() == FILES[b"a"]
    record = runtime.find(str(target))
    assert record is not None and record.source == str(image)
    daemon = Path(f"/proc/{record.pid}")
    assert os.readlink(daemon / "cwd") == "/", "a daemon must not keep a directory busy"
    assert {os.readlink(daemon / "fd" / number) for number in "012"} == {"/dev/null"}
    assert os.getsid(record.pid) == record.pid
    assert fusewire("umount", target).returncode == 0
    assert not record.is_alive() and is_given_back(record.loop, image)
    assert list(runtime.records()) == [] or record not in list(runtime.records())


def test_mount_is_the_default_command(image: Path, target: Path) -> None:
    assert fusewire(image, target).returncode == 0
    assert sorted(os.listdir(target)) == ["a", "big", "d", "empty", "link", "lost+found"]
    assert fusewire("umount", target).returncode == 0
    wait_unused(image)


def test_the_launcher_of_the_checkout(image: Path, target: Path) -> None:
    launcher = Path(__file__).resolve().parents[2] / "daemon.py"
    done = subprocess.run([sys.executable, str(launcher), str(image), str(target)], capture_output=True, text=True,
                          check=False, env=fusewire_environment(), cwd="/", timeout=READY_SECONDS)
    assert (done.returncode, done.stderr) == (0, f"fusewire: {image}: mounted read-only; -o rw mounts for writing\n")
    assert (target / "a").read_bytes() == FILES[b"a"]
    assert fusewire("umount", target).returncode == 0
    wait_unused(image)


def test_noloop_is_a_plain_fuse_mount(image: Path, target: Path) -> None:
    assert fusewire("mount", "-o", "ro,noloop", image, target).returncode == 0
    mount = mountinfo.find(str(target))
    assert mount is not None and mount.fstype == "fuse.fusewire"
    assert (target / "big").read_bytes() == FILES[b"big"]
    assert fusewire("umount", target).returncode == 0
    wait_unused(image)


# ---- in the foreground ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_and_ends_well(image: Path, target: Path, number: int) -> None:
    command = [*fusewire_command(), "mount", "-f", "-o", "ro", str(image), str(target)]
    process = subprocess.Popen(command, env=fusewire_environment(), stderr=subprocess.PIPE)
    assert wait_ready(process, target)
    process.send_signal(number)
    _, said = process.communicate(timeout=READY_SECONDS)
    assert process.returncode == 0, said
    assert b"Traceback" not in said
    assert target not in mount_table()
    wait_unused(image)


def test_a_signal_ends_a_mount_in_use(image: Path, target: Path) -> None:
    command = [*fusewire_command(), "mount", "-f", "-o", "ro", str(image), str(target)]
    process = subprocess.Popen(command, env=fusewire_environment(), stderr=subprocess.PIPE)
    assert wait_ready(process, target)
    user = os.open(target / "big", os.O_RDONLY)
    assert os.read(user, 10) == FILES[b"big"][:10]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=READY_SECONDS)
    with pytest.raises(OSError, match="not connected"):     # that user is cut off, and told so
        os.close(user)
    assert process.returncode == 0, said
    assert target not in mount_table()


def wait_ready(process: subprocess.Popen[bytes], target: Path) -> bool:
    """Whether the mount exists and the daemon has said that it answers (its record is written just before)."""
    if not wait_mounted(target, process):
        return False
    assert process.stderr is not None
    ready, _, _ = select.select([process.stderr], [], [], READY_SECONDS)
    return bool(ready)


def test_events_are_json_where_there_is_no_terminal(image: Path) -> None:
    with fusewire_mount(image) as mounted:
        assert mounted.pid is not None
        (mounted.root / "a").read_bytes()
    for line in mounted.log_text().splitlines() if mounted.log and mounted.log.exists() else []:
        assert json.loads(line)["event"]


def test_the_wire_log_of_a_real_mount(image: Path, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "wire.json"
    assert fusewire("mount", "-o", "ro", "--wirelog", path, image, target).returncode == 0
    assert (target / "big").read_bytes() == FILES[b"big"]
    assert fusewire("umount", target).returncode == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    requests = {r["unique"]: r["opcode"] for r in records if r["direction"] == "request"}
    replies = [r["unique"] for r in records if r["direction"] == "reply"]
    assert next(iter(requests.values())) == "INIT" and {"LOOKUP", "READ", "DESTROY"} <= set(requests.values())
    unanswered = {u for u, opcode in requests.items() if opcode in ("FORGET", "BATCH_FORGET")}
    assert len(replies) == len(set(replies)) and set(replies) == set(requests) - unanswered


# ---- refusals: one line and mount(8)'s exit codes ------------------------------------------------------------------


def refused(*words: str | Path) -> tuple[int, str]:
    """Exit code and the one line that the command printed."""
    done = fusewire(*words)
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("fusewire: ") and "Traceback" not in done.stderr
    return done.returncode, done.stderr.removeprefix("fusewire: ").rstrip("\n")


def test_wrong_usage(image: Path, target: Path) -> None:
    for words, message in (
        (["mount", image], "the following arguments are required: TARGET"),
        (["mount", "-o", "colour=red", image, target], "unknown option: colour"),
        (["mount", "-o", "cache_size=lots", image, target], "option cache_size=lots"),
        (["mount", "--speed", image, target], "unrecognized arguments: --speed"),
    ):
        code, line = refused(*words)
        assert code == 1 and message in line, line


@pytest.mark.parametrize("foreground", [[], ["-f"]], ids=["background", "foreground"])
def test_what_is_no_file_system(target: Path, tmp_path: Path, foreground: list[str]) -> None:
    nothing = tmp_path / "nothing.img"
    nothing.write_bytes(bytes(1 << 20))
    code, line = refused("mount", *foreground, nothing, target)
    assert code == 32
    assert line.startswith(f"{nothing}: superblock: not an ext2, ext3 or ext4 file system")
    short = tmp_path / "short.img"
    short.write_bytes(bytes(100))
    assert refused("mount", *foreground, short, target)[0] == 32
    assert refused("mount", *foreground, tmp_path / "absent.img", target) == (
        32, f"{tmp_path}/absent.img: no such file or directory"
    )  # fmt: skip
    assert refused("mount", *foreground, tmp_path, target) == (
        32, f"{tmp_path}: neither a block device nor a regular file"
    )  # fmt: skip
    assert target not in mount_table()


def test_where_nothing_can_be_mounted(image: Path, tmp_path: Path) -> None:
    assert refused("mount", "-o", "ro", image, tmp_path / "absent") == (
        32, f"{tmp_path}/absent: no such file or directory"
    )  # fmt: skip
    file = tmp_path / "file"
    file.touch()
    assert refused("mount", "-o", "ro", image, file) == (32, f"{file}: not a directory")
    wait_unused(image)


def test_an_unknown_feature_is_named(image: Path, target: Path, tmp_path: Path) -> None:
    path = copy_of(image, tmp_path)
    run("debugfs", "-w", "-R", "set_super_value feature_incompat 0x80000242", path)
    code, line = refused("mount", "-o", "ro", path, target)
    assert code == 32 and "feature" in line


def test_a_broken_superblock_is_told_apart(image: Path, target: Path, tmp_path: Path) -> None:
    code, line = refused("mount", "-o", "ro", edited(image, tmp_path, 1024 + 0x78, b"other name"), target)
    assert code == 32 and "superblock: superblock checksum does not match" in line


def test_a_broken_root_directory_is_told(image: Path, target: Path, tmp_path: Path) -> None:
    path = copy_of(image, tmp_path)
    run("debugfs", "-w", "-R", "sif <2> mode 0100644", path)
    code, line = refused("mount", "-o", "ro", path, target)
    assert code == 32 and "root directory" in line


def test_an_image_in_use_is_refused(image: Path, target: Path, tmp_path: Path) -> None:
    path = copy_of(image, tmp_path)
    with loop_device(path) as device:
        run("mount", "-t", "ext4", device, target)
        try:
            code, line = refused("mount", "-o", "ro", device, tmp_path)
            assert code == 32 and line.startswith(f"{device} is in use") and str(target) in line
        finally:
            run("umount", target)


def test_version_and_help() -> None:
    assert fusewire("--version").stdout.startswith("fusewire ")
    for command in ("mount", "umount", "info", "doctor"):
        done = fusewire(command, "--help")
        assert done.returncode == 0 and "usage: fusewire" in done.stdout
    assert "cache_size" in fusewire("mount", "--help").stdout
    assert "mount" in fusewire("--help").stdout


# ---- when things go wrong later ------------------------------------------------------------------------------------


def test_corruption_met_later_is_logged_and_costs_one_operation(image: Path, tmp_path: Path) -> None:
    path = copy_of(image, tmp_path)
    run("debugfs", "-w", "-R", "sif a links_count 0", path)
    with fusewire_mount(path) as mounted:
        with pytest.raises(OSError, match=r"."):
            os.stat(mounted.root / "a")
        assert (mounted.root / "big").read_bytes() == FILES[b"big"]
        assert mounted.log is not None
        logged = [json.loads(line) for line in mounted.log_text().splitlines()]
    found = [record for record in logged if record["event"] == "corrupt"]
    assert found and found[0]["check"] == "INODE_FREE" and found[0]["inode"] and found[0]["op"] == "LOOKUP"


def test_a_truncated_image_costs_what_is_gone(image: Path, tmp_path: Path) -> None:
    path = copy_of(image, tmp_path)
    with fusewire_mount(path) as mounted:
        os.truncate(path, 64 << 10)
        with pytest.raises(OSError, match="Input/output error"):
            (mounted.root / "big").read_bytes()
        assert os.path.isdir(mounted.root)


def test_a_killed_daemon_leaves_a_mount_that_can_be_removed(image: Path, target: Path) -> None:
    assert fusewire("mount", "-o", "ro", image, target).returncode == 0
    record = runtime.find(str(target))
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    runtime.wait_gone(record)
    with pytest.raises(OSError, match=r"not connected|connection abort"):   # the latter if it noticed while we asked
        os.stat(target / "a")
    assert fusewire("umount", target).returncode == 0
    assert target not in mount_table()
    wait_unused(image)
