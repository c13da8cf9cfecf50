"""The compiled GMFlow kernels applied to torch tensors, on torch's own threads."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import numpy as np
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
from fewstep.policies.kernels.numba_gmflow import combine as kernel_combine

SLICE = 50_000
"""Least work of a thread, in blocks × components × channels × substeps: some 50 µs. For less, none is started."""

COMBINED = 12
"""Work per block and output of `combine`, in the unit of `SLICE`: 128 bytes that come from memory."""

SLICES_PER_THREAD = 8
"""Slices that a thread's share of the blocks is cut into. Threads claim slices as they become free, so that one that
starts late, or shares its core, delays the others by no more than a slice."""

_PROCESS = os.getpid()  # of the import: a forked child has another one


def rollout(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor) -> Tensor:
    """The state after all substeps, (B, C, H, W); `sigmas` are σ at the substeps' boundaries, (S + 1, B)."""
    x_to = torch.empty(x.shape)
    _run(integrate, policy, x, sigmas, x_to=x_to)
    return x_to.to(x.dtype)


def window(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor) -> Tensor:
    """Σ_s share_s·velocity_s, (B, C, H, W), for `shares` (S, B) of the substeps between `sigmas` (S + 1, B)."""
    mean = torch.empty(x.shape)
    _run(integrate, policy, x, sigmas, shares=_flat(shares), mean_velocity=mean)
    return mean.to(x.dtype)


def window_gradient(
    policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor, cotangent: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of `window` to x, means, logstds (one per sample), log-weights (B, K, 1, H, W) and x_src.

    Args:
        policy, x, sigmas, shares: as `window` was given.
        cotangent: gradient of the loss to the result of `window`, (B, C, H, W).
    """
    means = policy.means
    samples, blocks = len(means), -(-means.shape[3:].numel() // LANES)
    # One summand per block instead of one sum per sample: blocks of a sample may be on several threads, and sums in the
    # order of the blocks are the same however many threads there are.
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


def combine(output: Tensor, x_src: Tensor, x: Tensor, factors: np.ndarray) -> Tensor:
    """Σ_i factor_i·output_i + factor_N·x_src + factor_{N+1}·x in one pass over all of them, (B, C, H, W).

    Args:
        output: of DX's head, (B, N, C, H, W).
        x_src, x: (B, C, H, W).
        factors: float32, (B, N + 2).
    """
    x_to, number = torch.empty(x.shape), output.shape[1]
    tensors = {"means": _flat(output), "x_src": _flat(x_src), "x_from": _flat(x), "x_to": x_to}
    tensors["factors"] = torch.from_numpy(factors)
    sizes = (len(x), number, 1, prod(x.shape[1:]), 1)
    _launch(kernel_combine, sizes, number * COMBINED, 1, tensors)
    return x_to


def _run(
    kernel: Callable[..., None], policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, **others: Tensor
) -> None:
    """Run a kernel of GMFlow on all blocks.

    Args:
        kernel: `integrate` or `pull_back`.
        policy, x, sigmas: what every kernel reads.
        others: further tensors of its `JOB` by name, contiguous float32: more inputs, and the results to write.
    """
    (samples, components, channels, *space), steps = policy.means.shape, len(sigmas) - 1
    tensors = {
        "means": _flat(policy.means),
        "logstds": _one_each(policy.logstds, samples),
        "logweights": _weights(policy),
        "x_src": _flat(policy.x_src),
        "sigma_src": _one_each(policy.sigma_src, samples),
        "x_from": _flat(x),
        "sigmas": _flat(sigmas),
        **others,
    }
    sizes = (samples, components, channels, prod(space), steps)
    rows = scratch_rows(components, channels, steps)
    _launch(kernel, sizes, components * channels * steps, rows, tensors)


def _launch(
    kernel: Callable[..., None],
    sizes: tuple[int, int, int, int, int],
    work: int,
    rows: int,
    tensors: dict[str, Tensor],
) -> None:
    """Run a kernel on all blocks.

    Args:
        kernel: of `numba_gmflow`.
        sizes: the job's B, K, C, N and S.
        work: of a block, in the unit of `SLICE`.
        rows: of scratch memory that each thread needs.
        tensors: of its `JOB` by name, contiguous float32, inputs and results.
    """
    samples, *_, locations, _ = sizes
    # A block lies within one sample, because its lanes share the sample's σ and variance.
    blocks = samples * -(-locations // LANES)
    # torch's number of threads is the most that the user allowed this process.
    threads = max(1, min(torch.get_num_threads(), blocks, blocks * work // SLICE))
    # torch aligns memory of CPUs to 64 bytes, as rows of scratch memory have to be.
    scratch = torch.empty(threads * rows, LANES)
    counters = (ctypes.c_int64 * 2)()  # blocks and pieces of scratch memory given out so far
    # The kernel sees only addresses, which do not keep memory alive: the caller's dictionary and this frame do.
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    # A lone thread takes all blocks at once; several take slices.
    grain = blocks if threads == 1 else -(-blocks // (SLICES_PER_THREAD * threads))
    job = new_job(*sizes, grain, scratch=scratch.data_ptr(), counters=ctypes.addressof(counters), **addresses)
    _on_threads(compiled(kernel), ctypes.addressof(job), threads)


def _weights_shape(means: Tensor) -> tuple[int, ...]:
    """Shape of the log-weights that belong to these means, (B, K, 1, H, W)."""
    return (*means.shape[:2], 1, *means.shape[3:])


def _weights(policy: GMFlowPolicy) -> Tensor:
    """The log-weights, contiguous in float32, one for each of the means."""
    shape, weights = _weights_shape(policy.means), policy.logweights
    return _flat(weights if weights.shape == shape else weights.expand(shape))


def _one_each(scalars: Tensor, samples: int) -> Tensor:
    """As many numbers as samples, contiguous in float32, of so many or a single one."""
    return _flat(scalars if scalars.numel() == samples else scalars.reshape(-1).expand(samples))


def _flat(tensor: Tensor) -> Tensor:
    """The tensor, contiguous in float32, as kernels read it; not copied where it is so already."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().float().contiguous()


def _on_threads(kernel: Any, job: int, threads: int) -> None:
    """Run a compiled kernel on several threads at once; they share the job's blocks among themselves.

    Where torch uses GNU's OpenMP, its threads do it: after the network they still spin on their cores while they wait
    for more work, and threads of our own would have to share those cores with them. Elsewhere a pool of our own does.

    Args:
        kernel: as `compiled` gives it.
        job: address of its `JOB`.
        threads: how many, this one included.
    """
    # OpenMP's threads do not survive a fork: in a forked child, asking for them would wait for ever.
    team = _team() if threads > 1 and os.getpid() == _PROCESS else None
    if threads == 1:
        kernel.ctypes(job)
    elif team is not None:
        team(kernel.address, job, threads, 0)
    else:
        # kernel.ctypes releases the GIL, as every ctypes function does, so the calls run side by side.
        others = [_pool(os.getpid()).submit(kernel.ctypes, job) for _ in range(threads - 1)]
        kernel.ctypes(job)
        for other in others:
            if not other.cancel():  # one that has not begun finds no block left: nothing to wait for
                other.result()


@functools.cache
def _team() -> Any:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP that torch loaded; None if that is not GNU's."""
    try:
        # CDLL(None) looks among the libraries that this process has loaded already; it loads none.
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.cache
def _pool(_: int) -> ThreadPoolExecutor:
    """The pool of a process, by its id: threads do not survive a fork, so a child needs a pool of its own."""
    return ThreadPoolExecutor(os.cpu_count(), "fewstep-rollout")
