"""All workloads, in the order of the table."""

from __future__ import annotations

from bench import layout, metadata, programs, reading, scaling, serving, writing
from bench.workload import Workload

GROUPS: dict[str, tuple[Workload, ...]] = {
    "Reading": reading.WORKLOADS,
    "Names": metadata.WORKLOADS,
    "Writing": (*writing.WORKLOADS, *layout.WORKLOADS),
    "Programs": programs.WORKLOADS,
    "Large directories": scaling.WORKLOADS,
    "The server alone": serving.WORKLOADS,
}
WORKLOADS = tuple(work for group in GROUPS.values() for work in group)
