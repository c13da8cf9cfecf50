"""The Triton kernels on torch tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.policies.gmflow import GMFlowPolicy
from fewstep.policies.kernels.triton_gmflow import (
    integrate_by_products_kernel,
    integrate_kernel,
    pull_back_kernel,
)

REGISTERS = 128
"""Floats of the means, and of their gradient, that one thread holds: half of its registers."""

WARP = 32


def rollout(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor) -> Tensor:
    """The state after all substeps, (B, C, H, W); `sigmas` (S + 1, B) are their ends."""
    components, channels = policy.means.shape[1:3]
    if components > channels:
        return _integrate(policy, x, sigmas, None)  # a location's means are fewer than their inner products
    block, warps = launch_shape(_power_of_2(components) ** 2)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        integrate_by_products_kernel[(-(-x[0, 0].numel() // block), len(x))](
            *_inputs(policy, x, sigmas), out, **_sizes(policy, len(sigmas) - 1, block, warps)
        )
    return out


def window(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor) -> Tensor:
    """Σ_s share_s·velocity_s, (B, C, H, W); `shares` are (S, B)."""
    return _integrate(policy, x, sigmas, shares.float().contiguous())


def window_gradient(
    policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor, cotangent: Tensor
) -> tuple[Tensor, ...]:
    """Of `window`: gradients to x, means, logstds (one per sample), log-weights (B, K, 1, H, W) and x_src."""
    means, batch, space = policy.means, len(x), x[0, 0].numel()
    weights_shape = (*means.shape[:2], 1, *means.shape[3:])
    block, warps = launch_shape(2 * _padded(means))
    programs = -(-space // block)
    to_means, to_x_src, to_x = (
        torch.empty_like(of, memory_format=torch.contiguous_format) for of in (means, policy.x_src, x)
    )
    to_logweights = means.new_empty(weights_shape, dtype=policy.logweights.dtype)
    summands = means.new_empty((batch, programs), dtype=torch.float32)
    states = means.new_empty((len(shares), *x.shape), dtype=torch.float32)
    with torch.cuda.device_of(x):
        pull_back_kernel[(programs, batch)](
            *_inputs(policy, x, sigmas),
            shares.float().contiguous(),
            cotangent.contiguous(),
            states,
            to_means,
            to_logweights,
            to_x_src,
            to_x,
            summands,
            **_sizes(policy, len(shares), block, warps),
        )
    to_logstds = summands.sum(1).view(-1, *[1] * (means.ndim - 1))
    return to_x, to_means, to_logstds, to_logweights, to_x_src


def _integrate(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor | None) -> Tensor:
    block, warps = launch_shape(_padded(policy.means))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inputs = _inputs(policy, x, sigmas)
    with torch.cuda.device_of(x):
        integrate_kernel[(-(-x[0, 0].numel() // block), len(x))](
            *inputs,
            inputs[-1] if shares is None else shares,
            out,
            **_sizes(policy, len(sigmas) - 1, block, warps),
            MEAN=shares is not None,
        )
    return out


def _inputs(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor) -> tuple[Tensor, ...]:
    """What both kernels read, in their order."""
    batch, components = policy.means.shape[:2]
    logweights = policy.logweights.expand(batch, components, 1, *policy.means.shape[3:])
    parts = (policy.means, policy.logstds, logweights, policy.x_src, policy.sigma_src, x, sigmas.float())
    return tuple(part.contiguous() for part in parts)


def _sizes(policy: GMFlowPolicy, steps: int, block: int, warps: int) -> dict[str, int]:
    """Their sizes and strides, and those of a program."""
    components, channels, *space = policy.means.shape[1:]
    return {
        "space": math.prod(space),
        "steps": steps,
        "logstds_stride": int(policy.logstds.numel() > 1),
        "sigma_src_stride": int(policy.sigma_src.numel() > 1),
        "components": components,
        "channels": channels,
        "K": _power_of_2(components),
        "C": _power_of_2(channels),
        "BLOCK": block,
        "num_warps": warps,
        "enable_fp_fusion": True,  # a·b + c in one instruction; Triton 3.10 no longer does so by itself
    }


def _padded(means: Tensor) -> int:
    """Means per location, components and channels rounded up to powers of two."""
    return _power_of_2(means.shape[1]) * _power_of_2(means.shape[2])


def _power_of_2(number: int) -> int:
    """The next one from `number` on; Triton's own takes ten times as long, in a call that its host delays."""
    return 1 << (number - 1).bit_length()


def launch_shape(padded: int) -> tuple[int, int]:
    """Locations and warps per program, for `padded` floats per location.

    One warp, of at most `REGISTERS` floats per lane: its lanes share a location's components where one lane
    can't hold them, by shuffles, which cost a fraction of what an exchange between warps does (on an H100, at
    256 floats, 37 µs against 186). More warps only where a single location is too much for one.
    """
    return max(1, min(WARP, WARP * REGISTERS // padded)), max(1, min(8, padded // (WARP * REGISTERS)))
