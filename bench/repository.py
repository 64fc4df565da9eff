"""A git repository with a made-up history, the same on every machine."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

from bench.texts import SEED, WORDS, source_text

HISTORY_FILES = 1000
FOLDERS = 60
COMMITS = 120
OLD = 40  # the commit that the branch "old" stands at
CHANGED = 30  # files changed by a commit
BEGIN = 1_700_000_000

GIT_ENVIRONMENT = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}


def git(*words: str | Path, data: bytes | None = None) -> None:
    """Run git without anybody's configuration."""
    subprocess.run(["git", *words], input=data, check=True, env=GIT_ENVIRONMENT, stdout=subprocess.DEVNULL)


def make_history(path: Path) -> None:
    """A bare repository of 1,000 files in 60 directories, 120 commits, and a branch ``old`` at the 40th."""
    git("init", "-q", "--bare", "-b", "main", path)
    git("-C", path, "fast-import", "--quiet", data=b"".join(history()))
    git("-C", path, "repack", "-q", "-a", "-d")


def history() -> list[bytes]:
    """The commands of git-fast-import(1) for it."""
    rng = random.Random(SEED)
    folders = [f"{rng.choice(WORDS)}{index}" for index in range(FOLDERS)]
    paths = [f"{folders[index % FOLDERS]}/{rng.choice(WORDS)}_{index}.py" for index in range(HISTORY_FILES)]
    stream = []
    for number in range(COMMITS):
        changed = paths if number == 0 else rng.sample(paths, CHANGED)
        stream.append(commit(number, [(name, text(rng)) for name in changed]))
        if number == OLD:
            stream.append(b"reset refs/heads/old\nfrom refs/heads/main\n\n")
    return [*stream, b"done\n"]


def text(rng: random.Random) -> bytes:
    """The content of one file."""
    return source_text(rng, min(int(rng.lognormvariate(7.8, 1.3)), 100_000))


def commit(number: int, files: list[tuple[str, bytes]]) -> bytes:
    """One commit of the branch ``main`` that sets these files."""
    message = b"Change %d" % number
    lines = [b"commit refs/heads/main\ncommitter A Person <person@example.org> %d +0000\n" % (BEGIN + 60 * number)]
    lines.append(b"data %d\n%s\n" % (len(message), message))
    lines += [b"M 100644 inline %s\ndata %d\n%s\n" % (name.encode(), len(data), data) for name, data in files]
    return b"".join(lines)
