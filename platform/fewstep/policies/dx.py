"""DX: x̂_0 as an explicit function of time alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.policies.base import MIN_SIGMA, Shift, per_latent

DXMode = Literal["grid", "polynomial"]
Times = TypeVar("Times", Tensor, np.ndarray)


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
        index = torch.arange(output.shape[1], device=output.device, dtype=output.dtype)
        self._index = index.view(-1, *[1] * (x_src.ndim - 1))  # (N, 1, 1, 1)

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """π(x_t, σ_t) of shape (B, C, H, W); `sigma_t` is (B,) or broadcastable to the latent."""
        sigma = per_latent(sigma_t, x_t)
        basis = self._basis(self._raw(sigma), self._raw_src, self._index)
        x_0 = basis.sum(1) * self.x_src - per_latent(self.sigma_src, x_t) * (basis * self.output).sum(1)
        return (x_t - x_0) / sigma.clamp(min=MIN_SIGMA)

    def closed_form(self, x: Tensor, sigmas: Tensor, shares: Tensor, end: float) -> Tensor:
        """end·x_S + Σ_s share_s·velocity_s of the substeps from `x` to x_S, without taking them; (B, C, H, W).

        x̂_0 depends on time alone, so every state is linear in `x` and the c_i. An Euler step to σ_{s+1} keeps
        σ_{s+1}/σ_s of its state. So the derivative of the result to x_s, λ_s, and the result itself are

            λ_s = (end·σ_S + Σ_{r≥s} share_r) / σ_s
            result = λ_0·x − Σ_i c_i·Σ_s ((σ_{s+1} − σ_s)·λ_{s+1} + share_s) / σ_s·φ_i(τ_s)

        and a rollout, or a window and its gradient, reads the outputs once.

        Args:
            x: state at the first substep's start, (B, C, H, W).
            sigmas: σ at the substeps' ends, (S + 1, B), on the CPU.
            shares: (S, B), on the CPU.
            end: factor of the end state.
        """
        sigma, share = sigmas.numpy(), shares.numpy()
        clamped = np.maximum(sigma, MIN_SIGMA)
        # 1 also where a sample rests at σ_S = 0
        kept = np.divide(sigma[-1], sigma, out=np.ones_like(sigma), where=sigma > sigma[-1])
        remaining = np.add.accumulate(np.concatenate([np.zeros_like(share[:1]), share[::-1]]))[::-1]
        derivative = end * kept + remaining / clamped  # λ, (S + 1, B)
        factors = (np.diff(sigma, axis=0) * derivative[1:] + share) / clamped[:-1]

        tables = torch.stack([sigmas[:-1], torch.from_numpy(factors)]).to(x.device, non_blocking=True)
        source = (self._raw_src.reshape(-1, 1), self.sigma_src.reshape(-1, 1))
        inputs = [tables.mT, *(column.to(tables.dtype) for column in (*source, self._index.view(-1, 1)))]
        if x.device.type == "cpu":  # numpy has all that follows, in a third of the time on so few numbers
            inputs = [tensor.numpy() for tensor in inputs]
        (sigma, factor), raw_src, sigma_src, index = inputs  # (B, S) twice, (B, 1) twice, (N, 1)
        terms = self._basis(self._raw(sigma), raw_src, index) * factor[:, None]
        # One by one, so that the substeps in which a sample rests, zeros, do not alter the rounding.
        weights = terms.cumsum(-1)[..., -1]  # (B, N)
        on_output, on_source = (torch.as_tensor(part) for part in (sigma_src * weights, -weights.sum(1)))
        with _without_autocast(x.device.type):
            moved = torch.einsum("bn,bn...->b...", on_output, self.output.to(on_output.dtype))
        derivative = torch.from_numpy(derivative[0]).to(x.device, non_blocking=True)
        moved = torch.addcmul(moved, per_latent(on_source, x), self.x_src)
        return torch.addcmul(moved, per_latent(derivative, x), x)

    @property
    def one_time_per_sample(self) -> bool:
        """Whether `sigma_src` is the same at all of a sample's locations."""
        return self._raw_src[0].numel() == 1

    def _raw(self, sigma: Times) -> Times:
        return sigma if self.shift is None else self.shift.unwarp(sigma)

    def _basis(self, raw: Times, raw_src: Times, index: Times) -> Times:
        """φ_i(τ), with i along a new second axis: for τ (B, …), the source's τ (B, …) and i (N, …)."""
        if self.mode == "polynomial":
            return (raw_src - raw)[:, None] ** index
        last = len(index) - 1
        raw_end = (raw_src - self.segment_size).clip(0, 1)
        position = (raw - raw_end) / (raw_src - raw_end) * last
        return (1 - abs(position.clip(0, last)[:, None] - index)).clip(0, 1)

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
