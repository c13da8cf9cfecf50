"""The differentiable mean velocity over a micro window (METHOD.md section 4), by a device's fused kernels."""

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
        kernel: a module with `window` and `window_gradient`, as `kernels.kernel` gives it.
        policy: one that `kernels.kernel` accepts.
        x: state at the start of the first substep, (B, C, H, W).
        sigmas: σ at the boundaries of the S substeps, (S + 1, B), on the policy's device.
        shares: weight of each substep, (S, B), on the policy's device.
    """
    # Given one by one, because autograd follows only tensors that are arguments of `apply`.
    head = (policy.means, policy.logstds, policy.logweights, policy.x_src)
    return _MeanVelocity.apply(kernel, x, policy.sigma_src, sigmas, shares, *head)


class _MeanVelocity(torch.autograd.Function):
    """Keeps only its inputs for backward: the backward kernel integrates once more, block by block."""

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
        means, logstds, logweights, x_src = head
        policy = GMFlowPolicy(means, logstds, logweights, x_src, sigma_src)
        return kernel.window(policy, x, sigmas, shares)

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative raises an error instead of being wrong
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, sigma_src, sigmas, shares, *head = ctx.saved_tensors
        means, logstds, logweights, x_src = head
        policy = GMFlowPolicy(means, logstds, logweights, x_src, sigma_src)
        to_x, *to_head = ctx.kernel.window_gradient(policy, x, sigmas, shares, cotangent)
        # Kernels give gradients of full shape; log-weights and log-stds may have been broadcast.
        gradients = (grad.sum_to_size(of.shape).to(of.dtype) for grad, of in zip(to_head, head, strict=True))
        # In the order of `forward`: kernel, x, sigma_src, sigmas, shares, head. Nothing trains through the times.
        return None, to_x.to(x.dtype), None, None, None, *gradients
