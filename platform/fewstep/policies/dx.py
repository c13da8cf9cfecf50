"""DX: a policy whose x̂_0 is an explicit function of time, and does not depend on the state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.draws import Generators
from fewstep.policies import kernels
from fewstep.policies.base import MIN_SIGMA, KeptTables, Shift, per_latent

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
            segment_size: raw time that the grid spans. As the shift, it belongs to the trained model and does not
                change when the model is sampled with another number of evaluations.
            shift: the model's shift between raw time and σ; None stands for σ = τ.
            mode: what the outputs stand for, "grid" or "polynomial".
        """
        self.output, self.x_src, self.sigma_src = output, x_src, sigma_src
        self.segment_size, self.shift, self.mode = segment_size, shift, mode

    @cached_property
    def _raw_src(self) -> Tensor:
        return self._raw(per_latent(self.sigma_src, self.x_src))

    @cached_property
    def _index(self) -> Tensor:
        index = torch.arange(self.output.shape[1], device=self.output.device, dtype=self.output.dtype)
        return index.view(-1, *[1] * (self.x_src.ndim - 1))  # (N, 1, 1, 1)

    def velocity(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """π(x_t, σ_t) of shape (B, C, H, W); `sigma_t` is (B,) or broadcastable to the latent."""
        sigma = per_latent(sigma_t, x_t)
        basis = self._basis(self._raw(sigma), self._raw_src, self._index)  # φ_i(τ_t), (B, N, 1, 1, 1)
        # Σ_i φ_i·c_i with c_i = x_src − σ_src·output_i written out: the c_i are never stored.
        x_0 = basis.sum(1) * self.x_src - per_latent(self.sigma_src, x_t) * (basis * self.output).sum(1)
        return (x_t - x_0) / sigma.clamp(min=MIN_SIGMA)

    def closed_form(self, x: Tensor, sigmas: Tensor, shares: Tensor, end: float) -> Tensor:
        """end·x_S + Σ_s share_s·velocity_s over the substeps from `x` to x_S, in one pass over the outputs.

        A rollout is `end` = 1 with shares of 0; a mean velocity is `end` = 0 with shares that sum to 1.

        x̂_0 depends on time alone, so every state is linear in `x` and the c_i. An Euler step from x_s to σ_{s+1}
        multiplies x_s by σ_{s+1}/σ_s and adds a multiple of x̂_0(τ_s). The derivative of the result to x_s, λ_s, and
        the result itself therefore are

            λ_s = (end·σ_S + Σ_{r≥s} share_r) / σ_s
            result = λ_0·x − Σ_i c_i·Σ_s ((σ_{s+1} − σ_s)·λ_{s+1} + share_s) / σ_s·φ_i(τ_s)

        The substeps are not taken one by one, and autograd keeps none of their states.

        Args:
            x: state at the start of the first substep, (B, C, H, W).
            sigmas: σ at the boundaries of the S substeps, (S + 1, B), on the CPU.
            shares: factor of each substep's velocity, (S, B), on the CPU.
            end: factor of the end state.

        Returns:
            (B, C, H, W).
        """
        if (kernel := kernels.combination(self.output, self.x_src, x, sigmas)) is not None:
            return kernel.combine(self.output, self.x_src, x, self._combined(sigmas, shares, end))
        slope, factors = _telescoped(sigmas.numpy(), shares.numpy(), end)
        # The tables of σ and factors are tiny: they are computed on the CPU, and sent in one copy.
        tables = torch.stack([sigmas[:-1], torch.from_numpy(factors)]).to(x.device, non_blocking=True)
        on_output, on_source = self._weights(*tables.mT)
        # −Σ_i weight_i·c_i, split into its part in the outputs and its part in x_src.
        with _without_autocast(x.device.type):
            result = torch.einsum("bn,bn...->b...", on_output, self.output.to(on_output.dtype))
        result = torch.addcmul(result, per_latent(on_source, x), self.x_src)
        derivative = torch.from_numpy(slope).to(x.device, non_blocking=True)
        return torch.addcmul(result, per_latent(derivative, x), x)

    def _combined(self, sigmas: Tensor, shares: Tensor, end: float) -> np.ndarray:
        """Factors of the outputs, of x_src and of x in the closed form, (B, N + 2); arguments as for that."""
        key = (
            self.mode, self.segment_size, self.shift, self.output.shape[1], self.sigma_src.dtype, sigmas.shape, end,
            *(tensor.numpy().tobytes() for tensor in (self.sigma_src, sigmas, shares)),
        )  # fmt: skip
        if (table := _COMBINED.get(key)) is None:
            slope, factors = _telescoped(sigmas.numpy(), shares.numpy(), end)
            on_output, on_source = self._weights(sigmas.numpy()[:-1].T, factors.T)
            columns = [on_output, on_source[:, None], slope[:, None]]
            table = np.ascontiguousarray(np.concatenate(columns, 1), np.float32)
            _COMBINED.keep(key, table)
        return table

    def _weights(self, sigma: Times, factor: Times) -> tuple[Times, Times]:
        """Weights of the outputs, (B, N), and of x_src, (B,), in −Σ_i c_i·Σ_s factor_s·φ_i(τ_s).

        Args:
            sigma: σ at the start of each substep, (B, S).
            factor: of each substep, (B, S).
        """
        count, sigma_src = self.output.shape[1], self.sigma_src.reshape(-1, 1)
        columns: list[Any] = [sigma_src, torch.arange(count, device=sigma_src.device).view(-1, 1)]
        if isinstance(sigma, np.ndarray):
            sigma_src, index = (column.numpy().astype(sigma.dtype, copy=False) for column in columns)
        else:
            sigma_src, index = (column.to(sigma.dtype) for column in columns)
        terms = self._basis(self._raw(sigma), self._raw(sigma_src), index) * factor[:, None]  # (B, N, S)
        # Summed in order (`sum` may add pairwise): the zeros of substeps in which a sample is at its end already
        # then leave the rounding as it is without them, and a sample does not depend on its batch.
        weights = terms.cumsum(-1)[..., -1]
        return sigma_src * weights, -weights.sum(1)

    @property
    def one_time_per_sample(self) -> bool:
        """Whether `sigma_src` is the same at all of a sample's locations, as `closed_form` needs."""
        return per_latent(self.sigma_src, self.x_src)[0].numel() == 1

    def _raw(self, sigma: Times) -> Times:
        return sigma if self.shift is None else self.shift.unwarp(sigma)

    def _basis(self, raw: Times, raw_src: Times, index: Times) -> Times:
        """φ_i(τ), with i along a new second axis: for τ (B, …), the source's τ (B, …) and i (N, …)."""
        if self.mode == "polynomial":
            return (raw_src - raw)[:, None] ** index
        # Linear interpolation as hat functions: index 0 is the segment's end, N − 1 its source.
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
        """The policy itself: DX has no mixture to sharpen."""
        return self

    def with_dropout(self, p: float, generator: Generators = None) -> DXPolicy:
        """The policy itself: DX has no components to drop."""
        return self


_COMBINED: KeptTables[np.ndarray] = KeptTables()
"""Results of `DXPolicy._combined`."""


def _telescoped(sigma: np.ndarray, share: np.ndarray, end: float) -> tuple[np.ndarray, np.ndarray]:
    """λ_0, (B,), and the factors of φ_i(τ_s), (S, B), in the result of `DXPolicy.closed_form`.

    Args:
        sigma: (S + 1, B).
        share: (S, B).
        end: factor of the end state.
    """
    clamped = np.maximum(sigma, MIN_SIGMA)
    # σ_S/σ_s; where a sample is at its end already, σ_s = σ_S and the quotient is 1, also at 0/0.
    kept = np.divide(sigma[-1], sigma, out=np.ones_like(sigma), where=sigma > sigma[-1])
    # Σ_{r≥s} share_r, with the empty sum 0 for s = S; (S + 1, B)
    remaining = np.add.accumulate(np.concatenate([np.zeros_like(share[:1]), share[::-1]]))[::-1]
    derivative = end * kept + remaining / clamped  # λ, (S + 1, B)
    return derivative[0], (np.diff(sigma, axis=0) * derivative[1:] + share) / clamped[:-1]


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast: sums are in float32 also where the caller's network runs in lower precision."""
    # is_autocast_enabled raises an error for devices that have no autocast, such as "meta".
    available = torch.amp.is_autocast_available(device_type)
    enabled = available and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()
