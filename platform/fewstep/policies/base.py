"""What every policy promises, and what it needs to know of time."""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

MIN_SIGMA = 1e-6
"""σ is clamped here, so that velocities stay finite at the data end."""

Time = TypeVar("Time", float, Tensor, np.ndarray)


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

    The student network is evaluated once, at `(x_src, σ_src)`; what it returns can then be asked for the
    velocity at any later state as often as the integration of the ODE needs (METHOD.md sections 1 and 3).
    """

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """π(x_t, σ_t), the direction of dx/dσ.

        Args:
            x_t: state, (B, C, H, W), or (B, C, T, H, W) for video.
            sigma_t: σ of that state, (B,) or broadcastable to the latent.
        """
        ...

    def detach(self) -> Self:
        """The same policy, cut from the graph of the network that predicted it."""
        ...

    def with_temperature(self, temperature: float | Tensor) -> Self:
        """The policy sharpened for inference: `temperature` in (0, 1], one or per sample (B,); 1 changes nothing."""
        ...

    def with_dropout(self, p: float, generator: torch.Generator | None = None) -> Self:
        """The policy with components dropped at probability `p`, for on-policy exploration in training."""
        ...


def per_latent(sigma: Tensor, latent: Tensor) -> Tensor:
    """Give σ, per sample (B,) or broadcastable to the latent, the rank of the latent."""
    if sigma.ndim == 1:
        return sigma.view(-1, *[1] * (latent.ndim - 1))
    return sigma[(None,) * (latent.ndim - sigma.ndim)]
