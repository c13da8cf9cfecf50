"""The compiled GMFlow kernels on torch tensors: slices of the batch on a thread each."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fewstep.policies.gmflow import GMFlowPolicy
from fewstep.policies.kernels.numba_gmflow import LANES, FlatPolicy, Gradients, integrate, pull_back

SLICE = 50_000
"""Component-channel-substeps of a block that are worth a thread: some 50 µs."""

SLICES_PER_THREAD = 4


def rollout(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor) -> Tensor:
    """The state after all substeps, (B, C, H, W); `sigmas` (S + 1, B) are their ends."""
    return _integrate(_flat(policy), x, sigmas, torch.zeros_like(sigmas[1:]), policy.means.shape)[0]


def window(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor) -> Tensor:
    """Σ_s share_s·velocity_s, (B, C, H, W); `shares` are (S, B)."""
    return _integrate(_flat(policy), x, sigmas, shares, policy.means.shape)[1]


def window_gradient(
    policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor, cotangent: Tensor
) -> tuple[Tensor, ...]:
    """Of `window`: gradients to x, means, logstds (one per sample), log-weights (B, K, 1, H, W) and x_src."""
    means, flat, shape = policy.means, _flat(policy), _shape(policy.means.shape)
    samples, blocks = len(means), -(-shape[2] // LANES)
    weights_shape = (*means.shape[:2], 1, *means.shape[3:])
    outputs = [
        torch.empty(size)
        for size in (means.shape, weights_shape, (samples, blocks), policy.x_src.shape, x.shape)
    ]
    gradients = Gradients(*(output.view(-1).numpy() for output in outputs))
    tables = (sigmas.float().numpy(), shares.float().numpy())

    def run(first: int, last: int) -> None:
        pull_back(flat, _array(x), *tables, _array(cotangent), gradients, shape, first, last)

    _in_slices(run, samples * blocks, shape[0] * shape[1] * len(shares))
    to_means, to_logweights, to_variances, to_x_src, to_x = outputs
    to_logstds = 2 * torch.from_numpy(flat.variances) * to_variances.sum(1)
    return to_x, to_means, to_logstds.view(-1, *[1] * (means.ndim - 1)), to_logweights, to_x_src


def _integrate(
    flat: FlatPolicy, x: Tensor, sigmas: Tensor, shares: Tensor, means_shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """End state and mean velocity, (B, C, H, W) each."""
    shape, start = _shape(means_shape), _array(x)
    tables = (sigmas.float().numpy(), shares.float().numpy())
    x_to, mean = torch.empty(x.shape), torch.empty(x.shape)
    into = (x_to.view(-1).numpy(), mean.view(-1).numpy())

    def run(first: int, last: int) -> None:
        integrate(flat, start, *tables, *into, shape, first, last)

    _in_slices(run, len(x) * -(-shape[2] // LANES), shape[0] * shape[1] * len(shares))
    return x_to.to(x.dtype), mean.to(x.dtype)


def _shape(means: torch.Size) -> tuple[int, int, int]:
    """K, C and N of means (B, K, C, H, W)."""
    return means[1], means[2], means[3:].numel()


def _flat(policy: GMFlowPolicy) -> FlatPolicy:
    means, batch = policy.means, len(policy.means)
    logweights = policy.logweights.expand(*means.shape[:2], 1, *means.shape[3:])
    sigma_src = policy.sigma_src.detach().reshape(-1).expand(batch)
    variances = (2 * policy.logstds.detach().float()).exp().view(-1).expand(batch) * sigma_src.square()
    return FlatPolicy(
        _array(means), _array(logweights), _array(variances), _array(policy.x_src), _array(sigma_src)
    )


def _array(tensor: Tensor) -> Any:
    """A flat float32 view where the tensor's memory allows it, otherwise a copy."""
    return tensor.detach().float().contiguous().view(-1).numpy()


def _in_slices(run: Callable[[int, int], None], blocks: int, work: int) -> None:
    """`run(first, last)` over all blocks, on as many threads as torch would use and the work is worth.

    Threads of our own, for numba's break down when several Python threads call at once, as a server does. Each
    takes the next slice when it is done with one: torch's own threads may still spin on its core after the
    network, and then the caller does most of the work.
    """
    threads = max(1, min(torch.get_num_threads(), blocks, blocks * work // SLICE))
    slices = 1 if threads == 1 else min(blocks, SLICES_PER_THREAD * threads)
    ends = [blocks * i // slices for i in range(slices + 1)]
    remaining = iter(range(slices))  # its next() is one step of the interpreter: no two threads get the same

    def take() -> None:
        for i in remaining:
            run(ends[i], ends[i + 1])

    others = [_pool().submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        if not other.cancel():
            other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "fewstep-rollout")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
