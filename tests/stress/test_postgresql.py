"""PostgreSQL on a mount: initdb, pgbench, and the daemon killed under both.  Only in long runs: it needs the server.

FUSEWIRE_SEED repeats a run, as far as the moment of a kill can be.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import require
from tests.model.run import fsck
from tests.mount.writable_mount import stale_image
from tests.mounting import READY_SECONDS, kernel_mount
from tests.stress.killable import Daemon, killable

USER = "postgres"
SEED = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 30)))
SECONDS = "20"
KILLS = 4
ROWS_MOST = 300
SIZE = 768 << 20
FORMS = {"ext4-4k": "-t ext4 -b 4096", "ext4-1k": "-t ext4 -b 1024", "ext3-4k": "-t ext3 -b 4096"}
AS_USER = ("setpriv", "--reuid", USER, "--regid", USER, "--init-groups", "--pdeathsig", "KILL", "--")
ASKING = ("-v", "ON_ERROR_STOP=1", "-X", "-q", "-A", "-t")
QUIET = ("listen_addresses=", "log_min_messages=log", "log_checkpoints=off", "logging_collector=off")


def programs() -> Path:
    """Where the server's programs are."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    require([] if found else ["the program initdb (Debian package postgresql)"])
    return found[-1].parent


class Cluster:
    """A database cluster in a directory of a mount."""

    def __init__(self, root: Path) -> None:
        self.bin, self.root, self.data, self.sockets = programs(), root, root / "data", root / "sockets"
        self.environment = os.environ | {"PGHOST": str(self.sockets), "PGDATABASE": USER}

    def command(self, *command: str | Path) -> list[str]:
        return [str(word) for word in (*AS_USER, self.bin / command[0], *command[1:])]

    def run(self, *command: str | Path) -> str:
        """What a program says, run as the server's user; it must succeed."""
        done = subprocess.run(self.command(*command), capture_output=True, text=True, env=self.environment, cwd="/",
                              check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def make(self) -> None:
        """An empty cluster."""
        self.sockets.mkdir()
        for path in (self.root, self.sockets):
            shutil.chown(path, USER)
        self.run("initdb", "-k", "-D", self.data, "--locale=C.UTF-8", "-A", "trust")

    @contextmanager
    def running(self) -> Iterator[None]:
        """The server runs until the block ends."""
        settings = [word for setting in (*QUIET, f"unix_socket_directories={self.sockets}") for word in ("-c", setting)]
        server = subprocess.Popen(self.command("postgres", "-D", self.data, *settings), stderr=subprocess.PIPE,
                                  stdout=subprocess.DEVNULL, env=self.environment, cwd="/", text=True)
        assert server.stderr is not None
        try:
            said = []
            for text in server.stderr:
                said.append(text)
                if "ready to accept connections" in text:
                    break
            else:
                raise AssertionError("".join(said))
            yield
            server.send_signal(signal.SIGINT)   # those who are connected are not waited for
            server.communicate(timeout=READY_SECONDS)
        finally:
            server.send_signal(signal.SIGQUIT)  # at once
            server.communicate(timeout=READY_SECONDS)

    def ask(self, statement: str) -> list[str]:
        """The fields of the one row that a statement gives."""
        return self.run("psql", *ASKING, "-c", statement).strip().split("|")

    def dump(self) -> list[str]:
        """All that is in the database, as statements."""
        return [text for text in self.run("pg_dump").splitlines() if "restrict" not in text]   # that one is random


def assert_consistent(cluster: Cluster) -> None:
    """What the transactions of pgbench keep equal is equal."""
    sums = cluster.ask("select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from "
                       "pgbench_branches), (select sum(tbalance) from pgbench_tellers), "
                       "(select coalesce(sum(delta), 0) from pgbench_history)")
    assert len(set(sums)) == 1, sums


@pytest.mark.parametrize("form", FORMS)
def test_pgbench(form: str, mounts: None, tmp_path: Path) -> None:
    image = tmp_path / "image"
    stale_image(image, FORMS[form], SIZE)
    with killable(image, "rw,noatime") as daemon:
        cluster = Cluster(daemon.root)
        cluster.make()
        with cluster.running():
            cluster.run("pgbench", "-i", "-s", "3", "-q")
            cluster.run("pgbench", "-c", "4", "-j", "2", "-T", SECONDS)
            assert_consistent(cluster)
            cluster.run("vacuumdb", "--full", "--analyze")
            dump = cluster.dump()
        cluster.run("pg_checksums", "--check", "-D", cluster.data)
    assert not fsck(image), fsck(image)
    with kernel_mount(image, "rw,noatime") as mounted:
        cluster = Cluster(mounted.root)
        with cluster.running():
            assert cluster.dump() == dump


@pytest.mark.parametrize("form", FORMS)
def test_what_was_committed_survives_a_kill(form: str, mounts: None, tmp_path: Path) -> None:
    print(f"FUSEWIRE_SEED={SEED}")
    image, chance, committed = tmp_path / "image", random.Random(f"{SEED}:{form}"), 0
    stale_image(image, FORMS[form], SIZE)
    with killable(image) as daemon:
        cluster = Cluster(daemon.root)
        cluster.make()
        with cluster.running():
            cluster.run("pgbench", "-i", "-s", "2", "-q")
            cluster.ask("create table t (k integer primary key, v text)")
    for _ in range(KILLS):
        with killable(image) as daemon, Cluster(daemon.root).running():
            committed = insert_until_killed(daemon, committed, chance.randrange(ROWS_MOST))
        with killable(image) as daemon:
            cluster = Cluster(daemon.root)
            with cluster.running():
                count, last = map(int, cluster.ask("select count(*), coalesce(max(k), 0) from t"))
                assert count == last and committed <= last <= committed + 1, (count, last, committed)
                committed = last
                assert_consistent(cluster)
                cluster.dump()
            cluster.run("pg_checksums", "--check", "-D", cluster.data)
    assert not fsck(image), fsck(image)


def insert_until_killed(daemon: Daemon, last: int, rows: int) -> int:
    """Commit a row after the other while pgbench runs, and kill the daemon after some; the last that was committed."""
    cluster = Cluster(daemon.root)
    load = subprocess.Popen(cluster.command("pgbench", "-n", "-c", "2", "-T", "600"), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env=cluster.environment, cwd="/")
    client = subprocess.Popen(cluster.command("psql", *ASKING), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, env=cluster.environment, cwd="/", text=True, bufsize=1)
    assert client.stdin is not None and client.stdout is not None
    try:
        while daemon.process.poll() is None:
            client.stdin.write(f"insert into t values ({last + 1}, repeat('{last + 1} ', 300)) returning k;\n")
            answer = client.stdout.readline()
            if not answer.strip():
                break
            last = int(answer)
            if not rows:
                daemon.kill()
            rows -= 1
    finally:
        for process in (load, client):
            process.kill()
            process.wait()
    return last
