"""Samples into medians, medians into a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from bench.workload import Sample, Target, Workload


@dataclass
class Results:
    """Every sample by workload and side, fusewire's processor time per operation [µs], and what went wrong."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    costs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, work: str, side: str, sample: Sample) -> None:
        self.samples[work][side].append(sample.value)
        if side == "fusewire" and sample.cpu is not None:
            self.costs[work].append(sample.cpu)

    def fail(self, work: str, side: str, message: str) -> None:
        self.failures[work, side] = message

    def median(self, work: str, side: str) -> float | None:
        values = self.samples[work][side]
        return statistics.median(values) if values else None

    def spread(self, work: str, side: str) -> float:
        """Half the distance between the quartiles, as a part of the median."""
        values = self.samples[work][side]
        if len(values) < 3:
            return 0.0
        low, middle, high = statistics.quantiles(values, n=4)
        return (high - low) / 2 / middle if middle else 0.0


def figure(value: float | None) -> str:
    """``value`` with three significant digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def reached(target: Target, value: float) -> bool:
    return value >= target.bound if target.at_least else value <= target.bound


def cell(results: Results, work: Workload, side: str) -> tuple[str, float | None]:
    """What the table says of one side, and the number that its target is about."""
    median, kernel = results.median(work.name, side), results.median(work.name, "kernel")
    if median is None:
        return ("failed" if (work.name, side) in results.failures else "–"), None
    if work.target and not work.target.relative:
        return f"{figure(median)} {work.unit}", median
    if not kernel:
        return f"{figure(median)} {work.unit}", None
    return f"{median / kernel:.2f}", median / kernel


def target_text(target: Target | None) -> str:
    if target is None:
        return ""
    return ("≥ " if target.at_least else "≤ ") + f"{target.bound:.3g}"


def cost_text(results: Results, work: Workload) -> str:
    """fusewire's processor time per operation."""
    costs = results.costs[work.name]
    return f"{figure(statistics.median(costs))} µs/{work.per}" if costs and work.per else ""


def row(results: Results, work: Workload) -> str:
    kernel = results.median(work.name, "kernel")
    ours, number = cell(results, work, "fusewire")
    met = "" if number is None or work.target is None else ("yes" if reached(work.target, number) else "**no**")
    cells = [
        work.name,
        work.meaning,
        "–" if kernel is None else f"{figure(kernel)} {work.unit}",
        cell(results, work, "fuse2fs")[0],
        ours,
        target_text(work.target),
        met,
        cost_text(results, work),
        f"{results.spread(work.name, 'kernel'):.0%} / {results.spread(work.name, 'fusewire'):.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


def as_markdown(works: list[Workload], results: Results) -> str:
    """The table: kernel ext4 as it is, the others relative to it or, with a unit, as they are."""
    head = "workload | what | kernel ext4 | fuse2fs | fusewire | target | met | server CPU | spread kernel / fusewire"
    lines = [f"| {head} |", "|---|---|---:|---:|---:|---:|---|---:|---|"]
    lines += [row(results, work) for work in works]
    lines += [f"\nfailed: {work} on {side}: {message}" for (work, side), message in results.failures.items()]
    lines.append(f"\n{machine()}")
    return "\n".join(lines)


def machine() -> str:
    return f"Linux {platform.release()}, {os.cpu_count()} processors, Python {platform.python_version()}"


def as_json(works: list[Workload], results: Results) -> str:
    rows = {
        work.name: {"meaning": work.meaning, "unit": work.unit, "samples": dict(results.samples[work.name])}
        for work in works
    }
    failures = [{"workload": work, "side": side, "error": text} for (work, side), text in results.failures.items()]
    return json.dumps({"machine": machine(), "workloads": rows, "failures": failures}, indent=1)
