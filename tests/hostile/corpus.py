"""The e2fsprogs test images: where they are, what is known of each, and how to unpack one.

``FUSEWIRE_CORPUS`` names the folder that holds ``e2fsck-images``; by default it is looked for beside the checkout.
"""

from __future__ import annotations

import csv
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from subprocess import PIPE

from tests.mounting import CHECKOUT

FOLDER = Path(os.environ.get("FUSEWIRE_CORPUS", CHECKOUT.parent / "shared" / "corpus")) / "e2fsck-images"


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
    with open(known.path, "rb") as packed, subprocess.Popen(["gzip", "-dc"], stdin=packed, stdout=PIPE) as plain:
        subprocess.run(["cp", "--sparse=always", "/dev/stdin", target], stdin=plain.stdout, check=True)
    if plain.returncode:
        raise RuntimeError(f"gzip -dc {known.path}: exit code {plain.returncode}")
