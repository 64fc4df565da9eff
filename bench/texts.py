"""Data that is the same on every machine."""

from __future__ import annotations

import random

SEED = 20_240_229

WORDS = (
    *("alpha", "beta", "config", "data", "engine", "filter", "graph", "handle", "index"),
    *("journal", "kernel", "linker", "module", "network", "object", "parser"),
)


def source_text(rng: random.Random, size: int) -> bytes:
    """``size`` bytes that look like program text."""
    words = rng.choices(WORDS, k=size // 5 + 8)
    return (" ".join(words)).encode().replace(b"parser ", b"parser\n")[:size]
