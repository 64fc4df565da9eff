"""Runs a sequence of operations on kernel ext4 and on fusewire at once, and finds the first difference.

    python -m tests.model.run CONFIG SEED [LENGTH] [--shrink]     replays one, and shortens a failing one
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from tests import mounting
from tests.images import MIB, mke2fs, tools_environment
from tests.model import compare
from tests.model.compare import Clock
from tests.model.generate import Generator
from tests.model.side import Operation, Side

SHOWN = 12
COMPARE_EVERY = 60


class Difference(AssertionError):
    """The two file systems are not the same; ``step`` is the number of the operation that showed it, -1 at the end."""

    def __init__(self, step: int, text: str) -> None:
        super().__init__(text)
        self.step = step


class OutOfStep(Exception):
    """One disk is full and the other is not, as they differ by blocks that map files (R3): nothing more to compare."""


@dataclass(frozen=True)
class Config:
    """A kind of file system, and the operations that it is put through."""

    name: str
    format: str
    size: int = 32 * MIB
    block_bytes: int = 4096
    whole_seconds: bool = False
    options: str = "rw,noatime"
    our_options: str = ""       # more of them, for fusewire
    weights: dict[str, int] = field(default_factory=dict)
    reach: int = 300_000
    fills: bool = False


def sequence(config: Config, seed: int, length: int) -> list[Operation]:
    return Generator(seed, config.reach, config.weights).sequence(length)


def run(config: Config, operations: Sequence[Operation]) -> None:
    """Do the operations on both; raises ``Difference``."""
    mask = os.umask(0)
    try:
        with tempfile.TemporaryDirectory(prefix="fusewire-model-") as folder:
            kernel, ours = Path(folder, "kernel.img"), Path(folder, "ours.img")
            mke2fs(kernel, f"-b {config.block_bytes} {config.format}", config.size)
            subprocess.run(["cp", "--sparse=always", kernel, ours], check=True)
            clock = Clock()
            try:
                log = _run_mounted(config, operations, kernel, ours, clock)
            except OutOfStep:
                _check(kernel, ours, "")
            else:
                _check(kernel, ours, log)
                _compare_under_the_kernel(config, operations, kernel, ours, clock)
    finally:
        os.umask(mask)


def _run_mounted(config: Config, operations: Sequence[Operation], kernel: Path, ours: Path, clock: Clock) -> str:
    with mounting.kernel_mount(kernel, config.options) as left, _our_mount(ours, config) as right:
        sides = [Side(left.root), Side(right.root)]
        try:
            for step, operation in enumerate(operations):
                clock.tick()
                free = [os.statvfs(side.root).f_bfree for side in sides] if config.fills else [0, 0]
                wanted, got = sides[0].do(operation), sides[1].do(operation)
                if not compare.agree(operation, wanted, got):
                    if free[0] != free[1] and ("full" in (wanted, got) or "ENOSPC" in (wanted, got)):
                        raise OutOfStep     # R9
                    raise Difference(step, f"{step}: {operation}\n  kernel:   {wanted}\n  fusewire: {got}\n"
                                     + right.log_text())
                if step % COMPARE_EVERY == COMPARE_EVERY - 1:
                    _compare_live(config, operations, sides, clock, step)
            _compare_live(config, operations, sides, clock, len(operations))
        finally:
            for side in sides:
                side.close_all()
        log = right
        text = log.log_text()
    if "Traceback" in text or "bug" in text or "corrupt" in text:
        raise Difference(-1, text)
    return text


def _our_mount(image: Path, config: Config) -> AbstractContextManager[mounting.Mount]:
    return mounting.fusewire_mount(image, config.options + config.our_options)


def _compare_live(config: Config, operations: Sequence[Operation], sides: list[Side], clock: Clock, step: int) -> None:
    for side in sides:
        side.syncfs()
    left, right = (Path(os.fsdecode(side.root)) for side in sides)
    shown = [compare.tree(root, clock, config.whole_seconds) for root in (left, right)]
    found = compare.tree_differences(shown[0], shown[1], config.block_bytes, operations, live=True)
    sectors = config.block_bytes // 512
    slack = abs(compare.used_blocks(shown[0]) - compare.used_blocks(shown[1])) // sectors
    if not sides[0].slots:
        found += compare.statfs_differences(left, right, slack)
    _report(step, f"after operation {step}, mounted", found)


def _report(step: int, where: str, found: list[str]) -> None:
    if found:
        raise Difference(step, f"{where}: {len(found)} differences:\n" + "\n".join(found[:SHOWN]))


def _check(kernel: Path, ours: Path, log: str) -> None:
    """What e2fsck thinks of the images."""
    for image in (kernel, ours):
        text = fsck(image, kernels=image is kernel)
        if text:
            raise Difference(-1, f"{image.name}: {text}\n{log}")


def _compare_under_the_kernel(config: Config, operations: Sequence[Operation], kernel: Path, ours: Path,
                              clock: Clock) -> None:
    with mounting.kernel_mount(kernel) as left, mounting.kernel_mount(ours) as right:
        shown = [compare.tree(mount.root, clock, config.whole_seconds) for mount in (left, right)]
    found = compare.tree_differences(shown[0], shown[1], config.block_bytes, operations, live=False)
    _report(-1, "under the kernel", found)


def fsck(image: Path, kernels: bool = False) -> str:
    """What e2fsck complains about, "" if it is content; ``kernels``: extent trees may be higher than they need be.

    That two leaves of such a tree would fit into one is no complaint: they are where extents were joined again.
    """
    done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, env=tools_environment(), check=False)
    text = done.stdout.decode("latin-1")
    better = "(shorter|narrower)" if kernels else "narrower"
    judged = re.sub(rf"Inode \d+ extent tree .* could be {better}\.  Optimize\? no", "", text)
    return text if done.returncode or re.search(r"FIXED|\? no$|ERRORS", judged, re.MULTILINE) else ""


# --- shrinking --------------------------------------------------------------------------------------------------------


def fails(config: Config, operations: Sequence[Operation]) -> Difference | None:
    try:
        run(config, operations)
    except Difference as difference:
        return difference
    return None


def shrink(config: Config, operations: Sequence[Operation], tell: Callable[[str], None],
           attempts: int = 200) -> list[Operation]:
    """A short sequence that fails: parts are left out, ever smaller ones, while what is left still fails."""
    kept = list(operations)
    first = fails(config, kept)
    if first is None:
        return []
    if first.step >= 0:
        kept = kept[:first.step + 1]
    size = max(len(kept) // 2, 1)
    while attempts > 0:
        start = 0
        while start < len(kept) and attempts > 0:
            candidate = kept[:start] + kept[start + size:]
            attempts -= 1
            difference = fails(config, candidate) if candidate else None
            if difference is None:
                start += size
                continue
            kept = candidate[:difference.step + 1] if 0 <= difference.step < len(candidate) else candidate
            tell(f"{len(kept)} operations")
        if size == 1:
            break
        size = max(size // 2, 1)
    return kept


def main() -> None:
    """Replay, and shorten."""
    from tests.model.configs import CONFIGS  # noqa: PLC0415 - only for the command

    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    config, seed, length = CONFIGS[words[0]], int(words[1]), int(words[2]) if len(words) > 2 else 300
    mounting.private_mounts()
    operations = sequence(config, seed, length)
    difference = fails(config, operations)
    print(difference or "no difference", flush=True)
    if difference is not None and "--shrink" in sys.argv:
        short = shrink(config, operations, lambda text: print(text, flush=True))
        for operation in short:
            print(f"    {operation},")
        print(fails(config, short))


if __name__ == "__main__":
    main()
