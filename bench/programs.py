"""Programs that people run: tar, cp, rm, git and sqlite."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from bench.images import SMALL_TREE_FILES, cached
from bench.repository import GIT_ENVIRONMENT, HISTORY_FILES
from bench.workload import Sample, Workload, at_most, sync, timed
from tests.mounting import Mount

TRANSACTIONS = 300


def program(*words: str | Path) -> None:
    """Run a program that has nothing to say."""
    subprocess.run(words, check=True, env=GIT_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def material(mounted: Mount, name: str) -> Path:
    """A file or repository of the cache folder, its data in memory."""
    path = cached(name, mounted.image.parent)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.read_bytes()
    return path


def untar(mounted: Mount) -> Sample:
    """Unpack 4,000 files and sync [s]."""
    archive = material(mounted, "tree.tar")

    def run() -> None:
        program("tar", "-xf", archive, "-C", mounted.root)
        sync(mounted)

    return timed(mounted, SMALL_TREE_FILES, run).total()


def on_tree(*words: str) -> Callable[[Mount], Sample]:
    """The time of a command on the unpacked files, never touched since mounting; it gets ROOT replaced [s]."""

    def measure(mounted: Mount) -> Sample:
        command = [word.replace("ROOT", str(mounted.root)) for word in words]
        return timed(mounted, SMALL_TREE_FILES, lambda: program(*command)).total()

    return measure


def git_clone(mounted: Mount) -> Sample:
    """Clone the repository from the cache folder [s]."""
    origin = material(mounted, "history.git")
    command = ("git", "clone", "-q", f"file://{origin}", mounted.root / "new")
    return timed(mounted, HISTORY_FILES, lambda: program(*command)).total()


def in_clone(*words: str) -> Callable[[Mount], Sample]:
    """The time of a git command in a clone that was not touched since mounting [s]."""

    def measure(mounted: Mount) -> Sample:
        command = ("git", "-C", f"{mounted.root}/clone", *words)
        return timed(mounted, HISTORY_FILES, lambda: program(*command)).total()

    return measure


def sqlite_transactions(mode: str) -> Callable[[Mount], Sample]:
    """The time of a transaction that inserts one row, each made durable [ms]."""

    def measure(mounted: Mount) -> Sample:
        with closing(sqlite3.connect(mounted.root / "base.db", isolation_level=None)) as base:
            base.execute(f"PRAGMA journal_mode={mode}")
            base.execute("PRAGMA synchronous=FULL")
            base.execute("CREATE TABLE notes (number INTEGER PRIMARY KEY, words TEXT)")

            def run() -> None:
                for number in range(TRANSACTIONS):
                    base.execute("BEGIN")
                    base.execute("INSERT INTO notes VALUES (?, ?)", (number, f"note {number} " * 8))
                    base.execute("COMMIT")

            sync(mounted)
            timing = timed(mounted, TRANSACTIONS, run)
        return Sample(timing.seconds / TRANSACTIONS * 1e3, timing.cpu_each)

    return measure


def row(name: str, meaning: str, measure: Callable[[Mount], Sample], bound: float | None, image: str,
        unit: str = "s", per: str = "file") -> Workload:
    """A row of this module."""
    target = None if bound is None else at_most(bound)
    return Workload(name, meaning, unit, measure, target, image=image, writes=True, per=per)


CP, RM = ("cp", "-a", "ROOT/tree", "ROOT/copy"), ("rm", "-rf", "ROOT/tree")
WAL, DELETE = sqlite_transactions("WAL"), sqlite_transactions("DELETE")
WORKLOADS = (
    row("untar", "tar -x of 4,000 files, and sync", untar, 6, "empty"),
    row("cp-a", "cp -a of 4,000 files, cold", on_tree(*CP), None, "tree"),
    row("rm-rf-cold", "rm -rf of 4,000 files, cold", on_tree(*RM), 3.5, "tree"),
    row("git-clone", "git clone of 1,000 files", git_clone, 1.5, "empty"),
    row("git-status-cold", "git status, cold", in_clone("status", "--porcelain"), 1.5, "clone"),
    row("git-checkout", "git checkout of an old commit, cold", in_clone("checkout", "-q", "old"), 1.5, "clone"),
    row("sqlite-wal", "sqlite: a durable transaction, WAL", WAL, 1.5, "empty", "ms", "transaction"),
    row("sqlite-delete", "the same with a rollback journal", DELETE, 1.5, "empty", "ms", "transaction"),
)
