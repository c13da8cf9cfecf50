"""The compiled GMFlow kernels on torch tensors, by torch's own threads."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import torch
from torch import Tensor

from fewstep.policies.gmflow import GMFlowPolicy
from fewstep.policies.kernels.numba_gmflow import (
    LANES,
    compiled,
    integrate,
    new_job,
    pull_back,
    scratch_rows,
)

SLICE = 50_000
"""Component-channel-substeps of a block that are worth a thread: some 50 µs."""

SLICES_PER_THREAD = 8
"""A thread that comes late leaves the others at most an eighth of its share to wait for."""

_PROCESS = os.getpid()


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
    to_logstds = torch.empty(samples, blocks)
    to_x, to_x_src = torch.empty(x.shape), torch.empty(x.shape)
    to_means, to_logweights = torch.empty(means.shape), torch.empty(_weights_shape(means))
    _run(
        pull_back,
        policy,
        x,
        sigmas,
        shares=_flat(shares),
        cotangent=_flat(cotangent),
        to_means=to_means,
        to_logweights=to_logweights,
        to_logstds=to_logstds,
        to_x_src=to_x_src,
        to_x_from=to_x,
    )
    to_logstds = to_logstds.sum(1).view(-1, *[1] * (means.ndim - 1))
    return to_x, to_means, to_logstds, to_logweights, to_x_src


def _run(
    kernel: Callable[..., None], policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, **others: Tensor
) -> None:
    """Run a kernel on all blocks; `others` are the further fields of its `JOB`."""
    (samples, components, channels, *space), steps = policy.means.shape, len(sigmas) - 1
    locations = prod(space)
    blocks = samples * -(-locations // LANES)
    threads = max(1, min(torch.get_num_threads(), blocks, blocks * components * channels * steps // SLICE))
    tensors = {
        "means": _flat(policy.means),
        "logstds": _flat(policy.logstds.reshape(-1).expand(samples)),
        "logweights": _flat(policy.logweights.expand(_weights_shape(policy.means))),
        "x_src": _flat(policy.x_src),
        "sigma_src": _flat(policy.sigma_src.reshape(-1).expand(samples)),
        "x_from": _flat(x),
        "sigmas": _flat(sigmas),
        "scratch": torch.empty(threads, scratch_rows(components, channels, steps), LANES),
        "counters": torch.zeros(2, dtype=torch.int64),
        **others,
    }
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    grain = blocks if threads == 1 else -(-blocks // (SLICES_PER_THREAD * threads))
    job = new_job(samples, components, channels, locations, steps, grain, **addresses)
    _on_threads(compiled(kernel), job.ctypes.data, threads)


def _weights_shape(means: Tensor) -> tuple[int, ...]:
    """Of the log-weights that belong to these means."""
    return (*means.shape[:2], 1, *means.shape[3:])


def _flat(tensor: Tensor) -> Tensor:
    """Contiguous in float32: itself where it is."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().float().contiguous()


def _on_threads(kernel: Any, job: int, threads: int) -> None:
    """Have a compiled kernel's job done by several threads at once.

    By those of torch's OpenMP, where it has GNU's: they wait busily for the next piece of work on the cores that
    threads of our own would need. A process that was forked from one with such threads must not ask for them.
    """
    team = _team() if threads > 1 and os.getpid() == _PROCESS else None
    if threads == 1:
        kernel.ctypes(job)
    elif team is not None:
        team(kernel.address, job, threads, 0)
    else:
        others = [_pool(os.getpid()).submit(kernel.ctypes, job) for _ in range(threads - 1)]
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
def _pool(_: int) -> ThreadPoolExecutor:
    """One for each process: threads do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), "fewstep-rollout")
