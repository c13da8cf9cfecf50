"""The differentiable mean velocity over a micro window, by a device's fused kernels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewstep.policies.gmflow import GMFlowPolicy


def mean_velocity(
    kernel: ModuleType, policy: GMFlowPolicy, x: Tensor, sigmas: Tensor, shares: Tensor
) -> Tensor:
    """Σ_s share_s·velocity_s, (B, C, H, W), differentiable in the head's output, `x_src` and `x`.

    Args:
        kernel: with `window` and `window_gradient`.
        policy: any.
        x: state at the first substep's start, (B, C, H, W).
        sigmas: σ at the substeps' ends, (S + 1, B), on the policy's device.
        shares: weight of each substep, (S, B), likewise.
    """
    head = (policy.means, policy.logstds, policy.logweights, policy.x_src)
    return _MeanVelocity.apply(kernel, x, policy.sigma_src, sigmas, shares, *head)


class _MeanVelocity(torch.autograd.Function):
    """Keeps its inputs alone: the backward kernel integrates once more, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: ModuleType,
        x: Tensor,
        sigma_src: Tensor,
        sigmas: Tensor,
        shares: Tensor,
        *head: Tensor,
    ) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(x, sigma_src, sigmas, shares, *head)
        return kernel.window(GMFlowPolicy(*head, sigma_src), x, sigmas, shares)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, sigma_src, sigmas, shares, *head = ctx.saved_tensors
        policy = GMFlowPolicy(*head, sigma_src)
        to_x, *to_head = ctx.kernel.window_gradient(policy, x, sigmas, shares, cotangent)
        gradients = (grad.sum_to_size(of.shape).to(of.dtype) for grad, of in zip(to_head, head, strict=True))
        return None, to_x.to(x.dtype), None, None, None, *gradients
