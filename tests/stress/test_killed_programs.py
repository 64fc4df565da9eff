"""The daemon is killed under a program that keeps data safe: after a replay, everything that it had committed is there.

FUSEWIRE_STRESS_SECONDS makes these runs longer, FUSEWIRE_SEED repeats one, as far as the moment of a kill can be.
"""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.run import fsck
from tests.mount.writable_mount import stale_image
from tests.stress.killable import killable

LONG = bool(os.environ.get("FUSEWIRE_STRESS_SECONDS"))
SEED = int(os.environ.get("FUSEWIRE_SEED", random.randrange(1 << 30)))
ROUNDS = 10 if LONG else 2
ROWS_MOST = 300
FORMS = {"ext4-4k": "-t ext4 -b 4096 -J size=4", "ext4-1k": "-t ext4 -b 1024 -J size=1",
         "ext3-1k": "-t ext3 -b 1024 -J size=1"}
WRITER = """
import random, sqlite3, sys
path, mode, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
chance = random.Random(first)
connection = sqlite3.connect(path, isolation_level=None)
connection.execute(f"pragma journal_mode={mode}")
connection.execute("pragma synchronous=EXTRA")      # FULL does not sync the directory of a journal that it has deleted
connection.execute("create table if not exists t (k integer primary key, v blob)")
for number in range(first, first + 100_000):
    connection.execute("begin")
    connection.execute("insert into t values (?, ?)", (number, bytes([number % 256]) * chance.randrange(9000)))
    if number % 5 == 0:
        connection.execute("update t set v = zeroblob(length(v)) where k % 7 = ?", (number % 7,))
    connection.execute("commit")
    print(number, flush=True)
"""


@pytest.mark.parametrize("form", FORMS if LONG else ["ext4-4k"])
@pytest.mark.parametrize("mode", ["DELETE", "TRUNCATE", "PERSIST", "WAL"] if LONG else ["DELETE", "WAL"])
def test_sqlite_has_what_it_committed(mode: str, form: str, mounts: None, tmp_path: Path) -> None:
    print(f"FUSEWIRE_SEED={SEED}")
    image, chance, committed = tmp_path / "image", random.Random(f"{SEED}:{mode}:{form}"), -1
    stale_image(image, FORMS[form], 64 << 20)
    heard = -1
    for _ in range(ROUNDS):
        with killable(image) as daemon:
            path = daemon.root / "data.db"
            if committed >= 0:
                committed = last_row(path, committed, heard)
            rows = chance.randrange(1, ROWS_MOST // ROUNDS)
            with subprocess.Popen([sys.executable, "-c", WRITER, str(path), mode, str(committed + 1)],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as writer:
                assert writer.stdout is not None
                for text in writer.stdout:
                    heard = int(text)
                    if rows:
                        rows, committed = rows - 1, heard
                    else:   # sqlite takes it for success when it cannot open a directory that it wants to sync
                        daemon.process.kill()
            assert not rows, "the writer ended by itself"
            daemon.kill()
    with killable(image) as daemon:
        last_row(daemon.root / "data.db", committed, heard)
    assert not fsck(image), fsck(image)


def last_row(path: Path, committed: int, heard: int) -> int:
    """The last row of a database, which is whole and has all up to the last that was committed before the kill; there
    may be more, and one whose commit nobody heard of."""
    connection = sqlite3.connect(path)
    assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]
    count, last = connection.execute("select count(*), max(k) from t").fetchone()
    connection.close()
    assert count == last + 1 and committed <= last <= heard + 1, (count, last, committed, heard)
    return int(last)
