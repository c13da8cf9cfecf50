"""The compiled GMFlow kernels on torch tensors, by torch's own threads."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.policies.gmflow import GMFlowPolicy
from fewstep.policies.kernels.numba_gmflow import (
    CACHE_LINE,
    JOB,
    LANES,
    compiled,
    integrate,
    pull_back,
    scratch_size,
)

SLICE = 50_000
"""Component-channel-substeps of a block that are worth a thread: some 50 µs."""

SLICES_PER_THREAD = 8


def rollout(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor) -> Tensor:
    """The state after all substeps, (B, C, H, W); `sigmas` (S + 1, B) are their ends."""
    x_to = torch.empty(x.shape)
    _run(integrate, policy, x, sigmas, x_to=x_to)
    return x_to.to(x.dtype)


def window(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor) -> Tensor:
    """Σ_s share_s·velocity_s, (B, C, H, W); `shares` are (S, B)."""
    mean = torch.empty(x.shape)
    _run(integrate, policy, x, sigmas, shares=_flat(shares), mean_velocity=mean)
    return mean.to(x.dtype)


def window_gradient(
    policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor, cotangent: Tensor
) -> tuple[Tensor, ...]:
    """Of `window`: gradients to x, means, logstds (one per sample), log-weights (B, K, 1, H, W) and x_src."""
    means = policy.means
    samples, blocks = len(means), -(-means.shape[3:].numel() // LANES)
    to_x, to_x_src = torch.empty(x.shape), torch.empty(x.shape)
    to_means, to_logweights = torch.empty(means.shape), torch.empty(_weights_shape(means))
    to_variances = torch.empty(samples, blocks)
    _run(
        pull_back,
        policy,
        x,
        sigmas,
        shares=_flat(shares),
        cotangent=_flat(cotangent),
        to_means=to_means,
        to_logweights=to_logweights,
        to_variances=to_variances,
        to_x_src=to_x_src,
        to_x_from=to_x,
    )
    to_logstds = 2 * _variances(policy) * to_variances.sum(1)
    return to_x, to_means, to_logstds.view(-1, *[1] * (means.ndim - 1)), to_logweights, to_x_src


def _run(
    kernel: Callable[..., None], policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, **others: Tensor
) -> None:
    """Run a kernel on all blocks; `others` are the further fields of its `JOB`."""
    (samples, components, channels, *space), steps = policy.means.shape, len(sigmas) - 1
    tensors = {
        "means": _flat(policy.means),
        "logweights": _flat(policy.logweights.expand(_weights_shape(policy.means))),
        "variances": _variances(policy),
        "x_src": _flat(policy.x_src),
        "sigma_src": _flat(_one_each(policy.sigma_src, samples)),
        "x_from": _flat(x),
        "sigmas": _flat(sigmas),
        **others,
    }
    job = np.zeros((), JOB)
    for name, tensor in tensors.items():
        job[name] = tensor.data_ptr()
    locations = int(np.prod(space))
    blocks = samples * -(-locations // LANES)
    threads = max(1, min(torch.get_num_threads(), blocks, blocks * components * channels * steps // SLICE))
    size = -(-scratch_size(components, channels, steps) // CACHE_LINE) * CACHE_LINE
    scratch = torch.empty(threads * size, dtype=torch.uint8)
    counters = np.zeros(2, np.intp)
    for name, number in {
        "samples": samples,
        "components": components,
        "channels": channels,
        "space": locations,
        "steps": steps,
        "grain": -(-blocks // (SLICES_PER_THREAD * threads)) if threads > 1 else blocks,
        "next_block": counters.ctypes.data,
        "scratch_size": size,
        "scratch": scratch.data_ptr(),
        "next_scratch": counters.ctypes.data + counters.itemsize,
    }.items():
        job[name] = number
    _on_threads(compiled(kernel), job.ctypes.data, threads)


def _variances(policy: GMFlowPolicy) -> Tensor:
    """v, (B,)."""
    samples = len(policy.means)
    sigma_src = _one_each(policy.sigma_src, samples)
    return (2 * _one_each(policy.logstds, samples)).exp() * sigma_src.square()


def _one_each(scalars: Tensor, samples: int) -> Tensor:
    return scalars.detach().float().reshape(-1).expand(samples)


def _weights_shape(means: Tensor) -> tuple[int, ...]:
    return (*means.shape[:2], 1, *means.shape[3:])


def _flat(tensor: Tensor) -> Tensor:
    """Contiguous in float32: itself where it is."""
    return tensor.detach().float().contiguous()


def _on_threads(kernel: Any, job: int, threads: int) -> None:
    """Have a compiled kernel's job done by several threads at once.

    By those of torch's OpenMP, where it has GNU's: they wait busily for the next piece of work on the cores that
    threads of our own would need.
    """
    team = _team() if threads > 1 else None
    if threads == 1:
        kernel.ctypes(job)
    elif team is not None:
        team(kernel.address, job, threads, 0)
    else:
        others = [_pool().submit(kernel.ctypes, job) for _ in range(threads - 1)]
        kernel.ctypes(job)
        for other in others:
            if not other.cancel():
                other.result()


@functools.cache
def _team() -> Any:
    """`GOMP_parallel(function, data, threads, flags)`, or None."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "fewstep-rollout")
