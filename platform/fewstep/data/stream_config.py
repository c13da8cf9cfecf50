"""Settings of a stream: who reads and encodes its shards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fewstep.config import Config

OPEN_SHARDS = 8
"""Shards that a global batch takes rows of, at most."""

Reading = Literal["tasks", "threads"]
"""Who reads encoded shards: Ray Data's tasks, on any node, or threads of the process that wants them."""

STAGE_CPUS = 0.1
"""CPU slots of an actor or task: a fraction, because training workers may hold nearly all CPUs of a small cluster."""


class PoolConfig(Config):
    """Actors of one kind, and what each reserves in Ray."""

    size: int = Field(1, ge=1)
    """Number of actors."""
    num_gpus: float = Field(0.0, ge=0)
    """GPUs of each; with a fraction, actors share one."""
    num_cpus: float = Field(STAGE_CPUS, ge=0)
    """CPU slots of each: a fraction, because training workers may hold nearly all CPUs of a small cluster."""


class EncodersConfig(Config):
    """The actors that encode a stream."""

    text: PoolConfig = PoolConfig()
    """Text encoders."""
    images: PoolConfig = PoolConfig()
    """Autoencoders; not started for prompts without images."""


class CacheConfig(Config):
    """Where encoded shards are kept, so that later epochs are read instead of encoded again."""

    path: str
    """A local folder. Runs may share it, and it may be deleted at any time."""
    max_gb: float = Field(50.0, gt=0)
    """Most that it holds, in 10⁹ bytes. When it is full, no more of this dataset is kept, as an epoch would need again
    first what was kept first; shards of other datasets make room, those that were used longest ago first."""
