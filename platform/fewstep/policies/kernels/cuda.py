"""The Triton rollout on torch tensors."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fewstep.policies.base import MIN_SIGMA
from fewstep.policies.gmflow import MIN_SPREAD, GMFlowPolicy
from fewstep.policies.kernels.triton_gmflow import rollout_kernel

REGISTERS = 128
"""Floats of the means that one thread holds, half of its registers."""

WARP = 32


def rollout(policy: GMFlowPolicy, x: Tensor, sigmas: Tensor) -> Tensor:
    """The state after all substeps, (B, C, H, W); `sigmas` (S + 1, B) are their ends, on the CPU."""
    batch, components, channels = policy.means.shape[:3]
    space = x[0, 0].numel()
    logweights = policy.logweights.expand(batch, components, 1, *policy.means.shape[3:]).contiguous()
    sigma_src = policy.sigma_src.float().reshape(-1).expand(batch).contiguous()
    variances = (2 * policy.logstds.float()).exp().view(-1).expand(batch) * sigma_src.square()
    counts = sigmas.diff(dim=0).ne(0).sum(0, dtype=torch.int32)
    tables = sigmas.T.float().contiguous()

    padded = triton.next_power_of_2(components) * triton.next_power_of_2(channels)
    block, warps = launch_shape(padded)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rollout_kernel[(triton.cdiv(space, block), batch)](
        policy.means.contiguous(),
        logweights,
        variances,
        policy.x_src.contiguous(),
        sigma_src,
        x.contiguous(),
        tables.to(x.device, non_blocking=True),
        counts.to(x.device, non_blocking=True),
        out,
        components,
        channels,
        space,
        tables.shape[1],
        MIN_SIGMA,
        MIN_SPREAD,
        K=triton.next_power_of_2(components),
        C=triton.next_power_of_2(channels),
        BLOCK=block,
        num_warps=warps,
    )
    return out


def launch_shape(padded: int) -> tuple[int, int]:
    """Locations and warps per program, for `padded` means per location.

    One warp with a location per lane, up to 128 means; then more warps, and from eight warps on fewer
    locations (what does not fit even so, spills to the first-level cache).
    """
    warps = max(1, min(8, padded // REGISTERS))
    return max(1, min(WARP, warps * WARP * REGISTERS // padded)), warps
