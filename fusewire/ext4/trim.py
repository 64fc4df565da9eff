"""FITRIM: which blocks are free, for a device that likes to know."""

import re
from typing import TYPE_CHECKING

from . import alloc

if TYPE_CHECKING:
    from .transaction import Transaction

_ONES = re.compile("1+")


def free_runs(tx: "Transaction", number: int, first: int, end: int, shortest: int) -> list[tuple[int, int]]:
    """(block, count) of what is free of one group within blocks [first, end), runs of ``shortest`` blocks or more.

    What a batch that is not durable has freed is not: after a crash it may be in use.  Raises ``BlockMiss``,
    ``Corrupt``.
    """
    geometry = tx.geometry
    base, ratio = geometry.first_block_of(number), geometry.cluster_blocks
    unused = alloc.free_bits(tx, number) & ~tx.held_clusters(number)
    runs = []
    for found in _ONES.finditer(f"{unused:b}"[::-1]):
        low = max(base + found.start() * ratio, first)
        high = min(base + found.end() * ratio, end, geometry.blocks)
        if high - low >= max(shortest, 1):
            runs.append((low, high - low))
    return runs
