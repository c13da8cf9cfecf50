"""Named draws: every random choice of the data path is a pure function of a seed and a name."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *name: object) -> np.random.Generator:
    """A generator for one named draw, such as `generator(0, "shards", epoch)`."""
    digest = hashlib.sha256("/".join(map(str, (seed, *name))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def stable_hash(seed: int, text: str) -> int:
    """64 bits that depend on `seed` and `text` alone; sorting by them shuffles the same way everywhere."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "big")


def fraction(seed: int, text: str) -> float:
    """`stable_hash` as a number in [0, 1)."""
    return stable_hash(seed, text) / 2**64
