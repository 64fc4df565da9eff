"""Medians as tables."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from bench.peers import FUSE4FS
from bench.results import Results
from bench.workload import Target, Workload, at_most
from bench.workloads import GROUPS, WORKLOADS

MEAN = at_most(2.5)
HEAD = "workload | what | kernel ext4 | fuse2fs | fusewire | target | met | fuse4fs | server CPU | spread"
RULE = "|---|---|---:|---:|---:|---:|---|---:|---:|---|"
MARKS = re.compile("(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)


def figure(value: float | None) -> str:
    """``value`` with three significant digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def reached(target: Target, value: float) -> bool:
    """Whether ``value`` is what the target asks."""
    return value >= target.bound if target.at_least else value <= target.bound


def answer(good: bool) -> str:
    """Yes or, to be seen, no."""
    return "yes" if good else "**no**"


def cell(results: Results, work: Workload, side: str) -> tuple[str, float | None]:
    """What the table says of one side, and the number that its target is about."""
    median, ratio = results.median(work.name, side), results.ratio(work, side)
    if median is None:
        return ("failed" if (work.name, side) in results.failures else "–"), None
    if work.target and not work.target.relative:
        return f"{figure(median)} {work.unit}", median
    return (f"{figure(median)} {work.unit}" if ratio is None else f"{ratio:.2f}"), ratio


def target_text(target: Target | None) -> str:
    """The bound."""
    if target is None:
        return ""
    return ("≥ " if target.at_least else "≤ ") + f"{target.bound:.3g}"


def peer_text(results: Results, work: Workload) -> str:
    """What fuse4fs had, in the direction of the row, and whether fusewire is no slower."""
    peer, ours = FUSE4FS.get(work.name), results.slowness(work, "fusewire")
    if peer is None:
        return ""
    text = f"{1 / peer if work.is_rate else peer:.2g}"
    return text if ours is None or ours <= peer else f"**{text}**"


def spread_text(spread: float | None) -> str:
    """The spread as a percentage."""
    return "–" if spread is None else f"{spread:.0%}"


def row(results: Results, work: Workload) -> str:
    """The line of one workload."""
    kernel, cost = results.median(work.name, "kernel"), results.cost(work.name, "fusewire")
    ours, number = cell(results, work, "fusewire")
    cells = [
        work.name,
        work.meaning,
        "–" if kernel is None else f"{figure(kernel)} {work.unit}",
        cell(results, work, "fuse2fs")[0],
        ours,
        target_text(work.target),
        "" if number is None or work.target is None else answer(reached(work.target, number)),
        peer_text(results, work),
        f"{figure(cost)} µs/{work.per}" if cost is not None and work.per else "",
        " / ".join(spread_text(results.spread(work.name, side)) for side in ("kernel", "fusewire")),
    ]
    return "| " + " | ".join(cells) + " |"


def as_markdown(results: Results) -> str:
    """The tables of the workloads that have results: kernel ext4 as it is, the others relative to it or with a unit."""
    shown = [work for work in WORKLOADS if results.samples.get(work.name) or fails(results, work)]
    blocks = []
    for title, works in GROUPS.items():
        lines = [row(results, work) for work in works if work in shown]
        if lines:
            blocks.append("\n".join([f"**{title}**", "", f"| {HEAD} |", RULE, *lines]))
    blocks += [text for text in (summary(results, shown), failures(results)) if text]
    return "\n\n".join([*blocks, machine()]) + "\n"


def fails(results: Results, work: Workload) -> bool:
    """Whether the workload failed on some side."""
    return any(name == work.name for name, _ in results.failures)


def summary(results: Results, works: list[Workload]) -> str:
    """The geometric means, and how many targets are met."""
    lines = []
    for side in ("fuse2fs", "fusewire"):
        if mean := results.mean_slowness(works, side):
            verdict = f" (target {target_text(MEAN)}: {answer(reached(MEAN, mean[0]))})" if side == "fusewire" else ""
            lines.append(f"- geometric mean of the time over {mean[1]} rows: {side} {mean[0]:.2f}{verdict}")
    numbers = [(work.target, cell(results, work, "fusewire")[1]) for work in works]
    aims = [reached(target, number) for target, number in numbers if target and number is not None]
    if aims:
        lines.append(f"- targets met: {sum(aims)} of {len(aims)}")
    pairs = [(FUSE4FS[work.name], results.slowness(work, "fusewire")) for work in works if work.name in FUSE4FS]
    races = [ours <= peer for peer, ours in pairs if ours is not None]
    if races:
        lines.append(f"- rows not slower than fuse4fs's constant: {sum(races)} of {len(races)}")
    return "\n".join(lines)


def failures(results: Results) -> str:
    """What went wrong, a line each."""
    return "\n".join(f"- failed: {work} on {side}: {text}" for (work, side), text in results.failures.items())


def machine() -> str:
    """Where this was measured, and how busy it was at the end."""
    release = ".".join(platform.release().split(".")[:2])
    load = os.getloadavg()[2]
    return f"Linux {release}, {os.cpu_count()} processors, Python {platform.python_version()}, load {load:.1f}."


def fill(path: Path, text: str) -> None:
    """Put ``text`` between the marks of a document."""
    changed, count = MARKS.subn(lambda found: found[1] + text + found[2], path.read_text())
    if count != 1:
        raise ValueError(f"{path}: not one pair of marks <!-- bench --> … <!-- /bench -->")
    path.write_text(changed)
