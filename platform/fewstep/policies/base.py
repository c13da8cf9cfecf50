"""The interface of policies, and of the time shift that they are given."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
from torch import Tensor

from fewstep.draws import Generators

MIN_SIGMA = 1e-6
"""Smallest σ that velocities are computed with: they divide by σ, which is 0 at the data."""

Time = TypeVar("Time", float, Tensor, np.ndarray)


Table = TypeVar("Table")


class KeptTables(Generic[Table]):
    """Small tables of times that were computed before, by what they are computed of.

    A sampler asks for the same few again and again, and each takes some twenty operations on a handful of numbers: ten
    microseconds each where other work has emptied the CPU's caches meanwhile, more than the rollout itself. Nothing may
    write to a table that is kept. Several threads may use one object: at worst both compute a table.
    """

    MOST = 256
    """Tables that are kept; then all are dropped. Training, whose times are random, finds none again."""

    def __init__(self) -> None:
        self._tables: dict[Hashable, Table] = {}

    def get(self, key: Hashable) -> Table | None:
        """The table of a key, if it is kept."""
        try:
            return self._tables.get(key)
        except TypeError:  # a shift that can't be a key
            return None

    def keep(self, key: Hashable, table: Table) -> None:
        """Keep a table for later calls, if its key can be one."""
        with suppress(TypeError):
            if len(self._tables) >= self.MOST:
                self._tables = {}
            self._tables[key] = table


class Shift(Protocol):
    """The map between raw time τ, in which segments and substeps are uniform, and σ = t."""

    def warp(self, raw: Time) -> Time:
        """σ of a raw time."""
        ...

    def unwarp(self, sigma: Time) -> Time:
        """Raw time of a σ."""
        ...


class Policy(Protocol):
    """π of π-Flow: a network-free velocity field, valid from its source state to the end of its segment.

    The student network is evaluated once, at `(x_src, σ_src)`, and returns a policy. The policy then gives the
    velocity at any later state, as often as the integration of the ODE needs it (METHOD.md sections 1 and 3).
    """

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """π(x_t, σ_t), the direction of dx/dσ.

        Args:
            x_t: state, (B, C, H, W), or (B, C, T, H, W) for video.
            sigma_t: σ of that state, (B,) or broadcastable to the latent.
        """
        ...

    def detach(self) -> Self:
        """The same policy without gradient to the network that predicted it."""
        ...

    def with_temperature(self, temperature: float | Tensor) -> Self:
        """The policy sharpened for inference (METHOD.md section 3, GM temperature).

        Args:
            temperature: in (0, 1], one number or one per sample (B,); 1 changes nothing.
        """
        ...

    def with_dropout(self, p: float, generator: Generators = None) -> Self:
        """The policy with mixture components dropped at random, for the behaviour policy in training (GM dropout).

        Args:
            p: probability of dropping each component.
            generator: source of the random numbers.
        """
        ...


def per_latent(sigma: Tensor, latent: Tensor) -> Tensor:
    """σ with as many axes as the latent; given per sample, (B,), or already broadcastable to the latent."""
    if sigma.ndim == 1:
        # Broadcasting aligns the last axes, where (B,) would be taken for the width.
        return sigma.view(-1, *[1] * (latent.ndim - 1))
    return sigma[(None,) * (latent.ndim - sigma.ndim)]
