"""Random numbers by name: every random choice about data is a pure function of a seed and a name."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *name: object) -> np.random.Generator:
    """The random generator of this seed and name, such as `generator(0, "shards", epoch)`."""
    # SHA-256, because Python's own hash of text differs between processes.
    digest = hashlib.sha256("/".join(map(str, (seed, *name))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def stable_hash(seed: int, text: str) -> int:
    """64 bits that depend only on `seed` and `text`: sorting by them shuffles in the same way on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "big")


def fraction(seed: int, text: str) -> float:
    """`stable_hash` as a number in [0, 1), for choosing a share of texts."""
    return stable_hash(seed, text) / 2**64
