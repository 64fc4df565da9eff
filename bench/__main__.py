"""Run the workloads, interleaved, and print how fusewire and fuse2fs compare with kernel ext4."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.images import WITH_SBIN, cached, fresh_copy
from bench.report import as_markdown, fill
from bench.results import Results
from bench.sides import SIDES, Side, forget_pages, load_pages, start_detached
from bench.workload import Sample, Workload
from bench.workloads import GROUPS, WORKLOADS
from tests.mounting import missing_requirements, mount_point, mount_table, private_mounts, run, wait_unused, which


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="run workloads that match NAME (may hold *; may be repeated)"
    )
    parser.add_argument("--side", action="append", choices=list(SIDES), help="measure this side; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3; 0 only prints what --add gives)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fusewire-bench", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE, after each round")
    parser.add_argument(
        "--add", action="append", type=Path, default=[], metavar="FILE", help="add the samples of an earlier --json"
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the tables between the bench marks of FILE")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    return parser.parse_args(words)


def chosen(only: list[str] | None) -> list[Workload]:
    return [work for work in WORKLOADS if not only or any(fnmatch.fnmatch(work.name, pattern) for pattern in only)]


def listing() -> str:
    """The workloads by group, with what each does and on which sides."""
    lines = []
    for title, works in GROUPS.items():
        lines.append(f"{title}:")
        for work in works:
            lines.append(f"  {work.name:20} {work.meaning} [{work.unit}]; {', '.join(work.sides)}")
    return "\n".join([*lines, "", "python -m bench --only 'rename*' --rounds 1 --side fusewire --side kernel"])


def mount_seconds(side: Side, image: Path, mode: str) -> float:
    """From the start of the mount command to the names of the root directory [s]."""
    with mount_point() as target:
        begin = time.perf_counter()
        start_detached(side, image, target, mode)
        while target not in mount_table():  # fuse2fs returns before it is mounted
            os.sched_yield()
        os.listdir(target)
        elapsed = time.perf_counter() - begin
        run("umount", target)
        wait_unused(image)
    return elapsed


def measure_once(work: Workload, side: Side, image: Path) -> Sample:
    """One sample of ``work`` on a mount made for it; what fusewire has written is checked."""
    if not work.writes:
        return measure_on(work, side, image, "ro")
    with fresh_copy(image) as disk:
        sample = measure_on(work, side, disk, "rw")
        if side.name == "fusewire":
            run("e2fsck", "-fn", disk, env=WITH_SBIN)
    return sample


def measure_on(work: Workload, side: Side, disk: Path, mode: str) -> Sample:
    """One sample of ``work`` on this very file system."""
    forget_pages(disk)
    if work.start == "cached":
        load_pages(disk)
    if work.measure is None:
        return Sample(mount_seconds(side, disk, mode))
    with side.mount(disk, mode) as mounted:
        return work.measure(mounted)


def run_round(number: int, works: list[Workload], sides: list[str], cache: Path, results: Results) -> None:
    """One sample of each workload on each side; the side that begins changes with the round."""
    for work in works:
        names = [name for name in sides if name in work.sides and number < min(work.rounds, SIDES[name].rounds)]
        if not names:
            continue
        image = cached(work.image, cache)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.monotonic()
            try:
                sample = measure_once(work, SIDES[name], image)
                results.add(work.name, name, sample)
                said = f"{sample.value:.4g} {work.unit}"
            except Exception as error:  # one broken figure must not cost the others; the table says so
                said = f"{type(error).__name__}: {error}"
                results.fail(work.name, name, said)
            took = time.monotonic() - began
            print(f"round {number + 1}: {work.name} {name} {said} (took {took:.0f} s)", file=sys.stderr, flush=True)


def lacking() -> list[str]:
    programs = {"fuse2fs": "fuse2fs", "fio": "fio", "find": "findutils", "grep": "grep", "tar": "tar", "git": "git"}
    return missing_requirements() + [
        f"{name} (package {package})" for name, package in programs.items() if not which(name)
    ]


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    works = chosen(options.only)
    if options.list or not works:
        print(listing())
        return 0 if options.list else 2
    if missing := lacking():
        print("bench: needs " + ", ".join(missing), file=sys.stderr)
        return 1
    private_mounts()
    options.cache.mkdir(parents=True, exist_ok=True)
    results = Results()
    for path in options.add:
        results.read(path)
    for number in range(options.rounds):
        run_round(number, works, options.side or list(SIDES), options.cache, results)
        if options.json:
            results.write(options.json)
    text = as_markdown(results)
    print(text)
    if options.readme:
        fill(options.readme, text)
    return 1 if results.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
