"""Operations of transformer blocks that torch computes slowly on CPUs, by faster ways to the same numbers.

Linear layers: torch computes float32 products by Intel's MKL, which uses the wide arithmetic units of Intel's CPUs
alone. On AMD's CPUs oneDNN, which is also a part of torch, takes less than half the time for the same product.

GELU in its tanh form, which most transformers use: torch's tanh takes nine times as long as its sigmoid, and
tanh(z) = 2·sigmoid(2z) − 1.

Results differ from torch's own by rounding.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def compute_faster(modules: Iterable[nn.Module]) -> None:
    """Have the layers of modules compute `linear` and `gelu` in place of torch's functions, in place.

    Layer by layer rather than by a mode of torch, which would be asked at each of the many operations in between.

    Args:
        modules: transformer blocks. What they compute on other devices stays as it is.
    """
    for module in modules:
        for layer in module.modules():
            if type(layer) is nn.Linear and onednn_is_faster():
                layer.__class__ = FasterLinear
            # FoldedLoRALinear, without importing peft where there are no adapters
            elif hasattr(layer, "product") and onednn_is_faster():
                cast(Any, layer).product = linear
            elif getattr(layer, "approximate", None) == "tanh":
                # diffusers' layers are a projection and then their `gelu`; torch's are GELU alone.
                setattr(layer, "gelu" if hasattr(layer, "gelu") else "forward", gelu)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this machine's float32 products are better computed by oneDNN than by torch's usual library.

    By its maker rather than by measuring, so that a resumed run computes what the uninterrupted one would have.
    """
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and _vendor_is_amd()


def _vendor_is_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            vendor = next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:  # not Linux
        vendor = platform.processor()
    return "AuthenticAMD" in vendor


class FasterLinear(nn.Linear):
    """A linear layer that is computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN for float32 on a CPU, and torch's own for all else.

    Args:
        x: (…, in).
        weight: (out, in).
        bias: (out,), or None.

    Returns:
        x·weightᵀ + bias, (…, out).
    """
    plain = type(weight) in (Tensor, nn.Parameter) and x.device.type == "cpu"  # neither quantised nor sharded
    if not plain or {x.dtype, weight.dtype} != {torch.float32} or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias; `weight` may be a transposed view. It is what torch.compile makes of a linear layer."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """`linear` with a gradient, of which each product is oneDNN's, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        # As torch's own: the input is kept for the weight's gradient alone, so not by frozen layers.
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        ctx.sizes = weight.shape
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative raises an error instead of being wrong
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        out_size, in_size = ctx.sizes
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _product(grad, weight.T)
        rows = grad.reshape(-1, out_size)
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, in_size)
            # oneDNN copies its first argument to rows, so that should be the smaller one.
            swapped = out_size > in_size
            to_weight = _product(inputs.T, rows.T).T if swapped else _product(rows.T, inputs.T)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0)
        return to_x, to_weight, to_bias


def gelu(x: Tensor) -> Tensor:
    """`F.gelu` in its tanh form, by sigmoid for float32 on a CPU, and torch's own elsewhere; x of any shape."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.gelu(x, approximate="tanh")
    return _GELU.apply(x) if torch.is_grad_enabled() and x.requires_grad else _gelu(x)


def _gelu(x: Tensor) -> Tensor:
    """x·sigmoid(2·√(2/π)·(x + 0.044715·x³)), with no tensor beside x and the result."""
    factor = 2 * math.sqrt(2 / math.pi)
    return x.square().mul_(0.044715 * factor).add_(factor).mul_(x).sigmoid_().mul_(x)


class _GELU(torch.autograd.Function):
    """`_gelu` with torch's own gradient of GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
