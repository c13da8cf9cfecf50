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
        derivative, factors = _telescoped(sigmas.numpy(), shares.numpy(), end)
        tables = torch.stack([sigmas[:-1], torch.from_numpy(factors)]).to(x.device, non_blocking=True)
        on_output, on_source = self._weights(*tables.mT)
        with _without_autocast(x.device.type):
            result = torch.einsum("bn,bn...->b...", on_output, self.output.to(on_output.dtype))
        result = torch.addcmul(result, per_latent(on_source, x), self.x_src)
        derivative = torch.from_numpy(derivative).to(x.device, non_blocking=True)
        return torch.addcmul(result, per_latent(derivative, x), x)

    def _weights(self, sigma: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """−Σ_i c_i·Σ_s factor_s·φ_i(τ_s): weights of the outputs, (B, N), and of x_src, (B,). σ_s, factors: (B, S)."""
        columns = (self._raw_src, self.sigma_src, self._index)
        arrays = [sigma, factor, *(column.reshape(-1, 1).to(sigma.dtype) for column in columns)]
        if sigma.device.type == "cpu":  # on so few numbers numpy takes a third of the time
            arrays = [array.numpy() for array in arrays]
        sigma, factor, raw_src, sigma_src, index = arrays
        terms = self._basis(self._raw(sigma), raw_src, index) * factor[:, None]
        # One by one, so that the substeps in which a sample rests, zeros, do not alter the rounding.
        weights = terms.cumsum(-1)[..., -1]
        return torch.as_tensor(sigma_src * weights), torch.as_tensor(-weights.sum(1))

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


def _telescoped(sigma: np.ndarray, share: np.ndarray, end: float) -> tuple[np.ndarray, np.ndarray]:
    """λ_0, (B,), and what stands before the φ_i(τ_s), (S, B), in `DXPolicy.closed_form`."""
    clamped = np.maximum(sigma, MIN_SIGMA)
    # σ_S/σ_s: 1 also where a sample rests at σ_S = 0
    kept = np.divide(sigma[-1], sigma, out=np.ones_like(sigma), where=sigma > sigma[-1])
    remaining = np.add.accumulate(np.concatenate([np.zeros_like(share[:1]), share[::-1]]))[::-1]
    derivative = end * kept + remaining / clamped  # λ, (S + 1, B)
    return derivative[0], (np.diff(sigma, axis=0) * derivative[1:] + share) / clamped[:-1]


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Sums in float32 also where the caller's network runs in lower precision."""
    available = torch.amp.is_autocast_available(device_type)
    enabled = available and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()
