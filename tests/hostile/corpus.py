"""The e2fsprogs test images: where they are, what is known of each, and how to unpack one.

``FUSEWIRE_CORPUS`` names the folder that holds ``e2fsck-images``; by default it is looked for beside the checkout.
"""

from __future__ import annotations

import csv
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

from tests.mounting import CHECKOUT

FOLDER = Path(os.environ.get("FUSEWIRE_CORPUS", CHECKOUT.parent / "shared" / "corpus")) / "e2fsck-images"
ZEROS = bytes(1 << 20)
AHEAD = 3

Result = TypeVar("Result")


@dataclass(frozen=True)
class Known:
    """One image and what e2fsck and the kernel said of it."""

    name: str
    kind: str
    block_bytes: int
    features: frozenset[str]
    fsck_clean: bool
    kernel_mounts: bool
    kernel_entries: int
    kernel_errors: int
    replay: bool

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.img.gz"


@cache
def corpus() -> dict[str, Known]:
    """Every image by name; empty where the corpus is missing."""
    index = FOLDER / "index.tsv"
    if not index.exists():
        return {}
    with open(index, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {known.name: known for row in rows if (known := known_from(row)).path.exists()}


def known_from(row: dict[str, str]) -> Known:
    features = frozenset(row["features"].split())
    return Known(
        name=row["name"],
        kind=row["kind"],
        block_bytes=int(row["bs"] or 0),
        features=features,
        fsck_clean=row["e2fsck_fn_1.47.4"] == "0",
        kernel_mounts=row["kernel_ro"] == "mounted",
        kernel_entries=int(row["kernel_entries"] or 0),
        kernel_errors=int(row["kernel_errors"] or 0),
        replay="needs_recovery" in features,
    )


def unpack(known: Known, target: Path) -> None:
    """Write the image to ``target``, zeros as holes."""
    inflate, rest = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), known.path.read_bytes()
    with open(target, "wb") as file:
        size = 0
        while rest and not inflate.eof:
            chunk = inflate.decompress(rest, len(ZEROS))
            rest = inflate.unconsumed_tail
            if chunk != ZEROS[: len(chunk)]:
                os.pwrite(file.fileno(), chunk, size)
            size += len(chunk)
        file.truncate(size)


class Ahead(Generic[Result]):
    """The results of ``work`` for a sequence of names, computed by two threads a few names ahead of who asks."""

    def __init__(self, work: Callable[[str], Result], names: Sequence[str]) -> None:
        self.work, self.names = work, names
        self.places = {name: place for place, name in enumerate(names)}
        self.pool, self.futures = ThreadPoolExecutor(2), dict[str, Future[Result]]()

    def __call__(self, name: str) -> Result:
        place = self.places[name]
        for following in self.names[place : place + AHEAD]:
            if following not in self.futures:
                self.futures[following] = self.pool.submit(self.work, following)
        return self.futures[name].result()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
