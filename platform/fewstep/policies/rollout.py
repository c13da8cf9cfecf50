"""Integrating a policy's ODE over dense substeps.

`rollout_reference` and `mean_velocity_reference` define what is computed, in plain torch for any policy.
`rollout` and `mean_velocity` compute the same in the fastest way available: GMFlow by a fused kernel for the
device, DX in closed form, anything else as the reference does.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.policies import kernels
from fewstep.policies.base import KeptTables, Policy, Shift, per_latent
from fewstep.policies.dx import DXPolicy
from fewstep.policies.gmflow import GMFlowPolicy
from fewstep.policies.kernels import window

SUBSTEPS = 128
"""Substeps per unit of raw time, as in the paper (METHOD.md section 1)."""

ROUNDING = 1e-4
"""Rounding error of `substeps·Δτ` in float32: a window of 3/128 is three substeps, also where it reads 3.0000002."""


def rollout(
    policy: Policy,
    x: Tensor,
    raw_from: Tensor,
    raw_to: Tensor,
    shift: Shift | None = None,
    substeps: int = SUBSTEPS,
) -> tuple[Tensor, Tensor]:
    """Follow the policy from raw time `raw_from` down to `raw_to` (METHOD.md section 1).

    Each sample takes ⌈substeps·Δτ⌉ (at least 1) substeps, equal in raw time: explicit Euler steps in σ, with the
    velocity at the start of each. Samples with fewer substeps than others of their batch stay at their end state.

    Args:
        policy: valid over all of [raw_to, raw_from].
        x: state at `raw_from`, (B, C, H, W).
        raw_from: raw time of `x`, (B,). Better on the CPU: the number of substeps is needed there, and reading it
            from an accelerator would wait for all work that is queued.
        raw_to: raw time to stop at, (B,), not above `raw_from`.
        shift: from raw time to σ; None stands for σ = τ.
        substeps: substeps per unit of raw time.

    Returns:
        The state at `raw_to`, (B, C, H, W), and its σ, (B,).
    """
    sigmas = substep_sigmas(raw_from, raw_to, shift, substeps)
    there = sigmas.to(x.device, non_blocking=True)
    sigma = there[-1].clone()  # the caller's own, which it may write to
    # The closed form takes one raw time per sample; a policy whose σ_src differs by location takes plain torch.
    if isinstance(policy, DXPolicy) and policy.one_time_per_sample:
        return policy.closed_form(x, sigmas, torch.zeros_like(sigmas[1:]), 1.0), sigma
    kernel = kernels.kernel(policy, x)
    # Kernels compute no gradient of a whole rollout: training needs one only of a window (`mean_velocity`).
    if kernel is not None and isinstance(policy, GMFlowPolicy) and not _asks_for_gradient(policy, x):
        return kernel.rollout(policy, x, there), sigma
    return rollout_reference(policy, x, there), sigma


def rollout_reference(policy: Policy, x: Tensor, sigmas: Tensor) -> Tensor:
    """The state after all substeps, (B, C, H, W), in plain torch for any policy.

    Args:
        policy: valid over all of the substeps.
        x: state at the start of the first substep, (B, C, H, W).
        sigmas: σ at the boundaries of the S substeps, (S + 1, B), on the device of `x`.
    """
    for sigma, after in pairwise(sigmas):
        # Explicit Euler; after − σ is negative, as time runs from noise to data, and 0 for samples at their end.
        x = torch.addcmul(x, per_latent(after - sigma, x), policy.velocity(x, sigma))
    return x


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
    of the substeps' velocities weighted by their Δσ. A window that rounds to fewer than two substeps, or has no
    length, gives the instantaneous velocity at `x_a`. Differentiable in the policy's parameters and in `x_a`.

    Args:
        policy: valid over the window.
        x_a: state at `raw_a`, (B, C, H, W).
        raw_a: raw time of `x_a`, (B,).
        raw_to: the window's end, (B,), not above `raw_a`.
        shift: from raw time to σ; None stands for σ = τ.
        substeps: substeps per unit of raw time.

    Returns:
        (B, C, H, W).
    """
    sigmas, shares = _window(raw_a, raw_to, shift, substeps)
    if isinstance(policy, DXPolicy) and policy.one_time_per_sample:
        return policy.closed_form(x_a, sigmas, shares, 0.0)
    kernel = kernels.kernel(policy, x_a)
    sigmas, shares = (table.to(x_a.device, non_blocking=True) for table in (sigmas, shares))
    if kernel is not None and isinstance(policy, GMFlowPolicy):
        return window.mean_velocity(kernel, policy, x_a, sigmas, shares)
    return mean_velocity_reference(policy, x_a, sigmas, shares)


def mean_velocity_reference(policy: Policy, x: Tensor, sigmas: Tensor, shares: Tensor) -> Tensor:
    """Σ_s share_s·velocity_s, (B, C, H, W), in plain torch for any policy; backward recomputes substep by substep.

    Args:
        policy: valid over all of the substeps.
        x: state at the start of the first substep, (B, C, H, W).
        sigmas: σ at the boundaries of the S substeps, (S + 1, B), on the device of `x`.
        shares: weight of each substep, (S, B), on the device of `x`.
    """
    if isinstance(policy, GMFlowPolicy):
        policy.mixture()  # computed outside of `checkpoint`, which would compute it again in every substep's backward
    mean = torch.zeros_like(x)
    for (sigma, after), share in zip(pairwise(sigmas), shares, strict=True):
        # Without `checkpoint`, autograd would keep the intermediate tensors of all S queries until backward.
        if torch.is_grad_enabled():
            velocity = checkpoint(
                policy.velocity,
                x,
                sigma,
                use_reentrant=False,
                preserve_rng_state=False,  # a velocity query draws no random numbers
                determinism_check="none",
            )
        else:
            velocity = policy.velocity(x, sigma)
        mean = torch.addcmul(mean, per_latent(share, x), velocity)
        x = torch.addcmul(x, per_latent(after - sigma, x), velocity)
    return mean


def _window(raw_a: Tensor, raw_to: Tensor, shift: Shift | None, substeps: int) -> tuple[Tensor, Tensor]:
    """The substeps of a micro window: σ at their boundaries, (S + 1, B), and their shares in the mean, (S, B)."""
    begin, end = _on_host(raw_a), _on_host(raw_to)
    instantaneous = np.rint((begin - end) * substeps) < 2  # METHOD.md section 4
    # One substep where the velocity is instantaneous: only the velocity at its start counts.
    counts = np.where(instantaneous, 1, substep_count(begin, end, substeps))
    sigmas = _sigmas(begin, end, counts, shift)
    changes = sigmas.diff(dim=0)  # 0 where a sample has fewer substeps than others, so those get no share
    only_first = torch.zeros_like(changes)
    only_first[0] = 1
    # Where the window has no length, the second branch is 0/0: `where` drops it.
    return sigmas, torch.where(torch.from_numpy(instantaneous), only_first, changes / changes.sum(0))


def _asks_for_gradient(policy: GMFlowPolicy, x: Tensor) -> bool:
    """Whether autograd would record a velocity query of this `GMFlowPolicy`."""
    head = (policy.means, policy.logstds, policy.logweights, policy.x_src)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *head))


def substep_sigmas(
    raw_from: Tensor, raw_to: Tensor, shift: Shift | None = None, substeps: int = SUBSTEPS
) -> Tensor:
    """σ at the boundaries of a rollout's substeps, (S + 1, B), on the CPU.

    S is the largest number of substeps in the batch; samples with fewer repeat their last σ. The table must not be
    written to: later calls get it again.
    """
    begin, end = _on_host(raw_from), _on_host(raw_to)
    key = (begin.tobytes(), end.tobytes(), begin.dtype, end.dtype, shift, substeps)
    if (table := _SIGMAS.get(key)) is None:
        table = _sigmas(begin, end, substep_count(begin, end, substeps), shift)
        _SIGMAS.keep(key, table)
    return table


_SIGMAS: KeptTables[Tensor] = KeptTables()
"""Results of `substep_sigmas`."""


def substep_count(raw_from: np.ndarray, raw_to: np.ndarray, substeps: int = SUBSTEPS) -> np.ndarray:
    """Number of equal raw-time substeps from `raw_from` to `raw_to`, at least 1, (B,)."""
    return np.maximum(np.ceil((raw_from - raw_to) * substeps - ROUNDING), 1)


def _sigmas(begin: np.ndarray, end: np.ndarray, counts: np.ndarray, shift: Shift | None) -> Tensor:
    """`substep_sigmas` for given numbers of substeps, `counts` (B,).

    Raw time is accumulated step by step in float32, as the published reference implementation does. It so ends a
    few 1e-7 off `end`, and the steep x̂_0(τ) of a short DX grid makes that difference visible in the velocity.
    """
    clock = np.empty((int(counts.max()) + 1, len(begin)), begin.dtype)
    clock[0] = begin
    # Each sample's step, negative, in its first `counts` rows, and 0 in the rows after them.
    np.multiply(np.arange(len(clock) - 1)[:, None] < counts, (end - begin) / counts, out=clock[1:])
    np.add.accumulate(clock, 0, out=clock)  # in order, in the table's own precision
    np.maximum(clock, 0, out=clock)  # rounding may end just below 0
    return torch.from_numpy(clock if shift is None else shift.warp(clock))


def _on_host(times: Tensor) -> np.ndarray:
    """Times as a numpy array: for a few numbers torch's operations take several times as long as numpy's."""
    return times.numpy(force=True)
