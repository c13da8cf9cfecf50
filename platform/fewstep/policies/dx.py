"""DX: x̂_0 as an explicit function of time alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.policies.base import MIN_SIGMA, Shift, per_latent

DXMode = Literal["grid", "polynomial"]


class DXPolicy:
    """Dynamic x_0 policy (METHOD.md section 3): x̂_0(τ) = Σ_i φ_i(τ)·c_i, π = (x_t − x̂_0(τ)) / σ_t.

    The N outputs of the head, velocities at the source, become c_i = x_src − σ_src·output_i. In mode "grid"
    the c_i are x̂_0 at N evenly spaced raw times of the policy's segment and the φ_i interpolate linearly
    (beyond the segment the end value holds); in mode "polynomial" φ_i = (τ_src − τ)^i.
    """

    def __init__(
        self,
        output: Tensor,
        x_src: Tensor,
        sigma_src: Tensor,
        segment_size: float = 1.0,
        shift: Shift | None = None,
        mode: DXMode = "grid",
    ) -> None:
        """Build the policy from the head's output, in velocity space.

        Args:
            output: (B, N, C, H, W), or (B, N, C, T, H, W) for video.
            x_src: state the network saw, (B, C, H, W).
            sigma_src: its σ, (B,) or broadcastable to the latent.
            segment_size: raw time that the grid spans. It belongs to the trained model, as the shift does,
                and stays when the model is sampled with another number of steps.
            shift: the model's shift between raw time and σ; None is none (σ = τ).
            mode: what the outputs stand for, "grid" or "polynomial".
        """
        self.output, self.x_src, self.sigma_src = output, x_src, sigma_src
        self.segment_size, self.shift, self.mode = segment_size, shift, mode

        self._raw_src = self._raw(per_latent(sigma_src, x_src))
        self._raw_end = (self._raw_src - segment_size).clamp(min=0)
        index = torch.arange(output.shape[1], device=output.device, dtype=output.dtype)
        self._index = index.view(-1, *[1] * (x_src.ndim - 1))  # (N, 1, 1, 1)

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """π(x_t, σ_t) of shape (B, C, H, W); `sigma_t` is (B,) or broadcastable to the latent."""
        sigma = per_latent(sigma_t, x_t)
        basis = self._basis(self._raw(sigma))
        coefficients = self.x_src.unsqueeze(1) - per_latent(self.sigma_src, x_t).unsqueeze(1) * self.output
        x_0 = (basis * coefficients).sum(1)
        return (x_t - x_0) / sigma.clamp(min=MIN_SIGMA)

    def closed_form(self, x: Tensor, sigmas: Tensor, shares: Tensor, end: float) -> Tensor:
        """end·x_S + Σ_s share_s·velocity_s of the substeps from `x` to x_S, without taking them; (B, C, H, W).

        x̂_0 depends on time alone, so every state is linear in `x` and the c_i. With g_s = Δσ_s/σ_s, h_s =
        share_s/σ_s and λ_s the derivative of the result to x_s,

            λ_S = end        λ_s = (1 + g_s)·λ_{s+1} + h_s
            result = λ_0·x − Σ_i c_i·Σ_s (g_s·λ_{s+1} + h_s)·φ_i(τ_s)

        so that a rollout, or a window and its gradient, reads the outputs once.

        Args:
            x: state at the first substep's start, (B, C, H, W).
            sigmas: σ at the substeps' ends, (S + 1, B), on the CPU.
            shares: (S, B), on the CPU.
            end: factor of the end state.
        """
        clamped = sigmas[:-1].clamp(min=MIN_SIGMA)
        gains, slopes = (sigmas.diff(dim=0) / clamped).numpy(), (shares / clamped).numpy()
        derivative, factors = np.full_like(gains[0], end), np.empty_like(gains)
        for s in range(len(gains) - 1, -1, -1):
            factors[s] = gains[s] * derivative + slopes[s]
            derivative = derivative + factors[s]
        # One transfer; substeps in place of the latent's last axis
        there = torch.stack([sigmas[:-1], torch.from_numpy(factors)]).to(x.device, non_blocking=True)
        raw, factors = there.transpose(1, 2).reshape(2, -1, *[1] * (x.ndim - 2), len(gains))
        terms = self._basis(self._raw(raw)) * factors.unsqueeze(1)
        # One by one, so that the substeps in which a sample rests, zeros, do not alter the rounding.
        weights = terms.cumsum(-1)[..., -1].flatten(1)  # (B, N)
        # Of Σ_i w_i·c_i the outputs are read once, and the c_i never made
        with _without_autocast(x.device.type):
            mixed = torch.einsum("bn,bn...->b...", weights, self.output.to(weights.dtype))
        x_0 = per_latent(weights.sum(1), x) * self.x_src - per_latent(self.sigma_src, x) * mixed
        return per_latent(torch.from_numpy(derivative).to(x.device, non_blocking=True), x) * x - x_0

    @property
    def one_time_per_sample(self) -> bool:
        """Whether `sigma_src` is the same at all of a sample's locations."""
        return self._raw_src[0].numel() == 1

    def _raw(self, sigma: Tensor) -> Tensor:
        return sigma if self.shift is None else self.shift.unwarp(sigma)

    def _basis(self, raw: Tensor) -> Tensor:
        """φ_i(τ), (B, N, 1, 1, 1)."""
        if self.mode == "polynomial":
            return (self._raw_src - raw).unsqueeze(1) ** self._index
        last = len(self._index) - 1
        position = (raw - self._raw_end) / (self._raw_src - self._raw_end) * last
        distance = (position.clamp(0, last).unsqueeze(1) - self._index).abs()
        return (1 - distance).clamp(min=0)

    def _like(self, output: Tensor, x_src: Tensor) -> DXPolicy:
        return DXPolicy(output, x_src, self.sigma_src, self.segment_size, self.shift, self.mode)

    def detach(self) -> DXPolicy:
        """The same policy without gradient to the head."""
        return self._like(self.output.detach(), self.x_src.detach())

    def with_temperature(self, temperature: float | Tensor) -> DXPolicy:
        """Itself: DX has no mixture to sharpen."""
        return self

    def with_dropout(self, p: float, generator: torch.Generator | None = None) -> DXPolicy:
        """Itself: DX has no components to drop."""
        return self


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Sums in float32 also where the caller's network runs in lower precision."""
    available = torch.amp.is_autocast_available(device_type)
    enabled = available and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()
