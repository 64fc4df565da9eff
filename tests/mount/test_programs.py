"""Programs that people keep data with, on a mount for writing; e2fsck is asked afterwards."""

from __future__ import annotations

import compileall
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import populate
from tests.conftest import require
from tests.mount.writable_mount import Writable, writable
from tests.mounting import CHECKOUT, which
from tests.walk import Fields, differences, entries

MIB = 1 << 20
SIZE = 256 * MIB
# What a copy cannot have: its own times of change and birth, its numbers, its place on the disk.
OF_THE_COPY = frozenset(("ino", "d_ino", "dots", "generation", "ctime", "btime", "atime", "blocks", "blksize", "map",
                         "flags", "fsxattr", "attributes", "mask"))
OF_DIRECTORIES = frozenset(("size",))    # they grow in their own ways
RSYNC = ("rsync", "-aHAXS", "--modify-window=-1")   # times to the nanosecond


@pytest.fixture(scope="module")
def mounted(mounts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writable]:
    path = tmp_path_factory.mktemp("programs") / "programs.img"
    with writable("fusewire", path, "-t ext4 -b 4096", SIZE) as made:
        yield made
    path.unlink()


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a program prints; it must succeed."""
    environment = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "HOME": "/nowhere",
                                "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
                                "GIT_COMMITTER_EMAIL": "a@b"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False,
                          env=environment)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def programs(*names: str) -> None:
    require([f"the program {name}" for name in names if not which(name)])


def shown(root: Path) -> list[tuple[str, Fields]]:
    """A tree as copies of it must show it."""
    return [(path, {key: value for key, value in fields.items()
                    if key not in OF_THE_COPY and not (key in OF_DIRECTORIES and fields["mode"].startswith("4"))})
            for path, fields in entries(root) if "mode" in fields and "lost+found" not in path]


def source_tree(root: Path) -> Path:
    """Every kind of file, with attributes, lists and hard links."""
    root.mkdir()
    for write in (*populate.ORDINARY, populate.xattrs, populate.acls):
        write(root)
    (root / "holes" / "far").unlink()       # programs that do not know of holes read it for minutes
    return root


def assert_copied(left: Path, right: Path) -> None:
    found = differences(shown(left), shown(right), {})
    assert not found, "\n".join(found[:20])


# --- git --------------------------------------------------------------------------------------------------------------


def test_git(mounted: Writable) -> None:
    programs("git")
    require([] if (CHECKOUT / ".git").exists() else ["a checkout that is a git repository"])
    here = mounted.root / "git"
    here.mkdir()
    safe = ("-c", "safe.directory=*")
    run("git", *safe, "clone", "-q", "--no-hardlinks", CHECKOUT, here / "clone")
    repository = here / "clone"
    git = ("git", *safe, "-C", repository)
    assert run(*git, "status", "--porcelain") == ""
    run(*git, "fsck", "--full", "--strict")
    for index in range(5):
        (repository / f"new-{index}").write_text("text\n" * index * 1000)
        run(*git, "add", "-A")
        run(*git, "commit", "-q", "-m", f"number {index}")
    run(*git, "checkout", "-q", "HEAD~3")
    assert not (repository / "new-4").exists()
    run(*git, "checkout", "-q", "-")
    run(*git, "gc", "-q", "--aggressive", "--prune=now")
    run(*git, "fsck", "--full")
    assert run(*git, "status", "--porcelain") == ""
    run(*git, "worktree", "add", "-q", here / "second", "HEAD~1")
    run("git", *safe, "clone", "-q", repository, here / "again")     # hard links
    assert run("git", *safe, "-C", here / "again", "rev-parse", "HEAD") == run(*git, "rev-parse", "HEAD")
    run("rm", "-rf", here)


# --- sqlite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronous", ["OFF", "FULL"])
@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST", "MEMORY", "WAL", "OFF"])
def test_sqlite(mounted: Writable, mode: str, synchronous: str) -> None:
    path = mounted.root / f"data-{mode}-{synchronous}.db"
    connection = sqlite3.connect(path)
    assert connection.execute(f"pragma journal_mode={mode}").fetchone()[0].upper() == mode
    connection.execute(f"pragma synchronous={synchronous}")
    connection.execute("create table t (k integer primary key, v blob)")
    for batch in range(10):
        with connection:
            connection.executemany("insert into t (v) values (?)", [(bytes([batch]) * (i * 7),) for i in range(200)])
    if mode != "OFF":
        with pytest.raises(ZeroDivisionError), connection:
            connection.execute("delete from t")
            raise ZeroDivisionError
    with connection:
        connection.execute("delete from t where k % 3 = 0")
    connection.execute("vacuum")
    connection.close()
    again = sqlite3.connect(path)
    assert again.execute("pragma integrity_check").fetchall() == [("ok",)]
    assert again.execute("select count(*) from t").fetchone()[0] == 2000 - 2000 // 3
    again.close()


def test_two_connections_of_sqlite(mounted: Writable) -> None:
    """Locks and shared memory: a reader sees what was committed, and the writer is not disturbed."""
    path = mounted.root / "shared.db"
    writer, reader = sqlite3.connect(path), sqlite3.connect(path)
    writer.execute("pragma journal_mode=WAL")
    writer.execute("create table t (v)")
    for number in range(100):
        with writer:
            writer.execute("insert into t values (?)", (number,))
        assert reader.execute("select max(v), count(*) from t").fetchone() == (number, number + 1)
    writer.close()
    reader.close()


# --- copies of trees --------------------------------------------------------------------------------------------------


def test_rsync_there_and_back(mounted: Writable, tmp_path: Path) -> None:
    programs("rsync")
    source = source_tree(tmp_path / "source")
    there = mounted.root / "rsync"
    run(*RSYNC, f"{source}/", f"{there}/")
    assert_copied(source, there)
    run(*RSYNC, "-c", "--delete", f"{there}/", f"{tmp_path / 'back'}/")
    assert_copied(source, tmp_path / "back")
    assert run(*RSYNC, "-nic", "--delete", f"{source}/", f"{there}/") == ""
    run("rm", "-rf", there)


def test_tar_there_and_back(mounted: Writable, tmp_path: Path) -> None:
    programs("tar")
    source = source_tree(tmp_path / "source")
    there = mounted.root / "tar"
    there.mkdir()
    kept = ("--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--sparse")
    run("tar", "-cf", mounted.root / "tree.tar", *kept, "--exclude=./special/socket", "-C", source, ".")
    run("tar", "-xpf", mounted.root / "tree.tar", *kept, "-C", there)
    run("tar", "-cf", tmp_path / "back.tar", *kept, "-C", there, ".")
    back = tmp_path / "back"
    back.mkdir()
    run("tar", "-xpf", tmp_path / "back.tar", *kept, "-C", back)
    assert_copied(there, back)
    sockets = [path for path, fields in entries(source) if fields.get("d_type") == "s"]
    left = [(path, fields) for path, fields in shown(source) if path not in sockets]
    assert not [line for line in differences(left, shown(there), {}) if "mtime" not in line]


def test_cp_and_rm(mounted: Writable, tmp_path: Path) -> None:
    source = source_tree(tmp_path / "source")
    before = os.statvfs(mounted.root)
    for number in range(3):
        run("cp", "-a", source, mounted.root / f"copy-{number}")
        assert_copied(source, mounted.root / f"copy-{number}")
    run("cp", "-a", mounted.root / "copy-0", mounted.root / "copy-3")
    assert_copied(source, mounted.root / "copy-3")
    for number in range(4):
        run("rm", "-rf", mounted.root / f"copy-{number}")
    os.sync()
    after = os.statvfs(mounted.root)
    assert after.f_ffree == before.f_ffree
    assert after.f_bfree == before.f_bfree


def test_compileall(mounted: Writable) -> None:
    there = mounted.root / "package"
    run("cp", "-r", CHECKOUT / "fusewire", there)
    assert compileall.compile_dir(there, quiet=1, workers=2, force=True)
    assert list(there.rglob("*.pyc"))
