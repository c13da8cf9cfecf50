"""Integrating a policy's ODE over dense substeps: the plain torch reference."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fewstep.policies.base import Policy, Shift, per_latent

SUBSTEPS = 128
"""Substeps per unit of raw time."""

ROUNDING = 1e-4
"""Float32 noise of `substeps·Δτ`: a window of 3/128 is three substeps, also where it reads 3.0000002."""


def rollout(
    policy: Policy,
    x: Tensor,
    raw_from: Tensor,
    raw_to: Tensor,
    shift: Shift | None = None,
    substeps: int = SUBSTEPS,
) -> tuple[Tensor, Tensor]:
    """Follow the policy from raw time `raw_from` down to `raw_to` (METHOD.md section 1).

    Each sample takes ⌈substeps·Δτ⌉ (at least 1) equal steps of raw time, explicit Euler in σ, the velocity
    evaluated at the start of each. Samples with fewer steps than others of their batch rest at their end.

    Args:
        policy: valid over all of [raw_to, raw_from].
        x: state at `raw_from`, (B, C, H, W).
        raw_from: raw time of `x`, (B,). Times on the CPU spare an accelerator the wait for the number of
            steps.
        raw_to: raw time to stop at, (B,), not above `raw_from`.
        shift: from raw time to σ; None is none (σ = τ).
        substeps: substeps per unit of raw time.

    Returns:
        The state at `raw_to`, (B, C, H, W), and its σ, (B,).
    """
    sigmas = _substep_sigmas(raw_from, raw_to, substep_count(raw_from, raw_to, substeps), shift).to(x.device)
    for sigma, after in pairwise(sigmas):
        x = torch.addcmul(x, per_latent(after - sigma, x), policy.velocity(x, sigma))
    return x, sigmas[-1]


def mean_velocity(
    policy: Policy,
    x_a: Tensor,
    raw_a: Tensor,
    raw_to: Tensor,
    shift: Shift | None = None,
    substeps: int = SUBSTEPS,
) -> Tensor:
    """The policy's mean velocity over the micro window [raw_to, raw_a] (METHOD.md section 4).

    That is the displacement of the rollout over the window divided by the change of σ, computed as the mean
    of the substeps' velocities weighted by their Δσ. A window that rounds to fewer than two substeps is one
    substep, whose mean is the instantaneous velocity, down to a window of zero. Differentiable in the
    policy's parameters and in `x_a`.

    Args:
        policy: valid over the window.
        x_a: state at `raw_a`, (B, C, H, W).
        raw_a: raw time of `x_a`, (B,).
        raw_to: the window's end, (B,), not above `raw_a`.
        shift: from raw time to σ; None is none (σ = τ).
        substeps: substeps per unit of raw time.

    Returns:
        (B, C, H, W).
    """
    instantaneous = ((raw_a - raw_to) * substeps).round() < 2
    counts = substep_count(raw_a, raw_to, substeps).masked_fill(instantaneous, 1)
    sigmas = _substep_sigmas(raw_a, raw_to, counts, shift)
    changes = sigmas.diff(dim=0)
    only_first = torch.zeros_like(changes)
    only_first[0] = 1
    shares = torch.where(instantaneous, only_first, changes / changes.sum(0))

    x, mean = x_a, torch.zeros_like(x_a)
    steps = (table.to(x.device) for table in (sigmas[:-1], changes, shares))
    for sigma, change, share in zip(*steps, strict=True):
        velocity = policy.velocity(x, sigma)
        mean = torch.addcmul(mean, per_latent(share, x), velocity)
        x = torch.addcmul(x, per_latent(change, x), velocity)
    return mean


def substep_count(raw_from: Tensor, raw_to: Tensor, substeps: int = SUBSTEPS) -> Tensor:
    """Number of equal raw-time substeps from `raw_from` to `raw_to`, (B,) int64."""
    return ((raw_from - raw_to) * substeps - ROUNDING).ceil().clamp(min=1).long()


def _substep_sigmas(raw_from: Tensor, raw_to: Tensor, counts: Tensor, shift: Shift | None) -> Tensor:
    """σ at the substeps' ends, (max(counts) + 1, B); samples with fewer substeps stay at their last one.

    The clock runs by repeated subtraction in float32, as the reference implementation's does: its end is a
    few 1e-7 off `raw_to`, which the steep x̂_0(τ) of a short DX grid makes visible in the velocity.
    """
    step = (raw_from - raw_to) / counts
    raws = [raw_from]
    for i in range(int(counts.max())):
        raws.append(torch.where(i < counts, raws[-1] - step, raws[-1]))
    raw = torch.stack(raws).clamp(min=0)
    return raw if shift is None else shift.warp(raw)
