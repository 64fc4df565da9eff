"""Samples, by workload and side: kept, reduced to medians, written to a file and read again."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from bench.workload import Sample, Workload


def by_side() -> dict[str, dict[str, list[float]]]:
    """An empty table of lists, by workload and side."""
    return defaultdict(lambda: defaultdict(list))


@dataclass
class Results:
    """Every sample by workload and side, the server's processor time per operation [µs], and what went wrong."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=by_side)
    costs: dict[str, dict[str, list[float]]] = field(default_factory=by_side)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, work: str, side: str, sample: Sample) -> None:
        self.samples[work][side].append(sample.value)
        if sample.cpu is not None:
            self.costs[work][side].append(sample.cpu)

    def fail(self, work: str, side: str, message: str) -> None:
        self.failures[work, side] = message

    def median(self, work: str, side: str) -> float | None:
        values = self.samples[work][side]
        return statistics.median(values) if values else None

    def cost(self, work: str, side: str) -> float | None:
        """The server's processor time per operation [µs]."""
        values = self.costs[work][side]
        return statistics.median(values) if values else None

    def spread(self, work: str, side: str) -> float | None:
        """Half the distance between the quartiles, as a part of the median; None for fewer than three samples."""
        values = self.samples[work][side]
        if len(values) < 3:
            return None
        low, middle, high = statistics.quantiles(values, n=4)
        return (high - low) / 2 / middle if middle else 0.0

    def ratio(self, work: Workload, side: str) -> float | None:
        """The figure of a side relative to kernel ext4's; None where one of both is missing."""
        kernel, value = self.median(work.name, "kernel"), self.median(work.name, side)
        return value / kernel if value is not None and kernel else None

    def slowness(self, work: Workload, side: str) -> float | None:
        """The time of a side relative to kernel ext4's, also where the figure is a rate."""
        ratio = self.ratio(work, side)
        return 1 / ratio if ratio and work.is_rate else ratio

    def mean_slowness(self, works: list[Workload], side: str) -> tuple[float, int] | None:
        """The geometric mean of `slowness`, and over how many workloads; None if there is none."""
        ratios = [ratio for work in works if work.is_compared and (ratio := self.slowness(work, side))]
        return (math.exp(statistics.fmean(map(math.log, ratios))), len(ratios)) if ratios else None

    def write(self, path: Path) -> None:
        """Everything as JSON."""
        failures = [{"workload": work, "side": side, "error": text} for (work, side), text in self.failures.items()]
        path.write_text(json.dumps({"samples": self.samples, "costs": self.costs, "failures": failures}, indent=1))

    def read(self, path: Path) -> None:
        """Add what `write` wrote."""
        found = json.loads(path.read_text())
        for own, other in ((self.samples, found["samples"]), (self.costs, found["costs"])):
            for work, sides in other.items():
                for side, values in sides.items():
                    own[work][side] += values
        for failure in found["failures"]:
            self.fail(failure["workload"], failure["side"], failure["error"])
