"""The Triton kernels applied to torch tensors."""

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
"""Most floats of the means, and of their gradient, that one thread holds: half of the 255 registers it has."""

WARP = 32
"""Threads (lanes) of a warp on NVIDIA's GPUs."""


def rollout(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor) -> Tensor:
    """The state after all substeps, (B, C, H, W); `sigmas` are σ at the substeps' boundaries, (S + 1, B)."""
    components, channels = policy.means.shape[1:3]
    # METHOD.md section 3: a substep takes K² operations by inner products, and 2·K·C without. Beyond K = C the K²
    # products are also more than the K·C means, which is what has to fit into registers.
    if components > channels:
        return _integrate(policy, x, sigmas, None)
    # The kernel holds the K×K products, not the means.
    block, warps = launch_shape(_power_of_2(components) ** 2)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(x):
        integrate_by_products_kernel[(-(-x[0, 0].numel() // block), len(x))](
            *_inputs(policy, x, sigmas), out, **_sizes(policy, len(sigmas) - 1, block, warps)
        )
    return out


def window(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor) -> Tensor:
    """Σ_s share_s·velocity_s, (B, C, H, W), for `shares` (S, B) of the substeps between `sigmas` (S + 1, B)."""
    return _integrate(policy, x, sigmas, shares.float().contiguous())


def window_gradient(
    policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor, cotangent: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of `window` to x, means, logstds (one per sample), log-weights (B, K, 1, H, W) and x_src.

    Args:
        policy, x, sigmas, shares: as `window` was given.
        cotangent: gradient of the loss to the result of `window`, (B, C, H, W).
    """
    means, batch, space = policy.means, len(x), x[0, 0].numel()
    weights_shape = (*means.shape[:2], 1, *means.shape[3:])
    block, warps = launch_shape(2 * _padded(means))  # the means and their gradient
    programs = -(-space // block)
    to_means, to_x_src, to_x = (
        torch.empty_like(of, memory_format=torch.contiguous_format) for of in (means, policy.x_src, x)
    )
    to_logweights = means.new_empty(weights_shape, dtype=policy.logweights.dtype)
    # One summand of the log-std's gradient per program: summed here in a fixed order, which atomics would not keep.
    summands = means.new_empty((batch, programs), dtype=torch.float32)
    # The states that the kernel visits on its way forward. In memory: registers can't be indexed by the substep.
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
    """The mean velocity with these `shares`, or the state after all substeps if they are None; (B, C, H, W)."""
    block, warps = launch_shape(_padded(policy.means))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inputs = _inputs(policy, x, sigmas)
    with torch.cuda.device_of(x):
        integrate_kernel[(-(-x[0, 0].numel() // block), len(x))](
            *inputs,
            inputs[-1] if shares is None else shares,  # without shares any pointer does: it is not read
            out,
            **_sizes(policy, len(sigmas) - 1, block, warps),
            MEAN=shares is not None,
        )
    return out


def _inputs(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor) -> tuple[Tensor, ...]:
    """What every kernel reads, in the order of its arguments, contiguous."""
    batch, components = policy.means.shape[:2]
    logweights = policy.logweights.expand(batch, components, 1, *policy.means.shape[3:])
    # Other parts stay in their own type, such as bfloat16: kernels convert as they read. σ alone needs float32 here.
    parts = (policy.means, policy.logstds, logweights, policy.x_src, policy.sigma_src, x, sigmas.float())
    return tuple(part.contiguous() for part in parts)


def _sizes(policy: GMFlowPolicy, steps: int, block: int, warps: int) -> dict[str, int]:
    """The kernels' sizes and strides, and the size of a program: arguments by name."""
    components, channels, *space = policy.means.shape[1:]
    return {
        "space": math.prod(space),
        "steps": steps,
        # 0 makes every sample read the same number.
        "logstds_stride": int(policy.logstds.numel() > 1),
        "sigma_src_stride": int(policy.sigma_src.numel() > 1),
        "components": components,
        "channels": channels,
        "K": _power_of_2(components),
        "C": _power_of_2(channels),
        "BLOCK": block,
        "num_warps": warps,
        "enable_fp_fusion": True,  # a·b + c as one instruction, which Triton 3.10 no longer does by default
    }


def _padded(means: Tensor) -> int:
    """Floats that the means of a location take in a kernel: K·C, each rounded up to a power of two."""
    return _power_of_2(means.shape[1]) * _power_of_2(means.shape[2])


def _power_of_2(number: int) -> int:
    """The least power of two that is not below `number`.

    Triton's own function takes ten times as long, and a lone rollout's time is that of its host's work.
    """
    return 1 << (number - 1).bit_length()


def launch_shape(padded: int) -> tuple[int, int]:
    """Locations and warps per program, for `padded` floats per location.

    A program is one warp with at most `REGISTERS` floats per lane. Where one lane can't hold a location's floats,
    several lanes share it and exchange sums by shuffles, which cost a fraction of an exchange between warps (on an
    H100, at 256 floats: 37 µs against 186 µs). Only where a whole warp can't hold a location are there more warps.
    """
    return max(1, min(WARP, WARP * REGISTERS // padded)), max(1, min(8, padded // (WARP * REGISTERS)))
