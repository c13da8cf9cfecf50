"""Networks on the meta device: what their weights will take, and how quantised ones will compute.

Tensors on the meta device have shapes and no values, so that networks of any size are built there in seconds. torchao
and bitsandbytes quantise values: stand-ins with the shapes, types and lifetimes of their tensors take their place here,
which also works where the two libraries are not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import Precision
from fewstep.models.network import PolicyNetwork
from fewstep.models.precision import LIBRARIES, frozen_layers


def lower_on_meta(network: PolicyNetwork, precision: Precision) -> None:
    """`PolicyNetwork.lower` for a network on the meta device, whose quantised layers become stand-ins.

    Args:
        network: on the meta device.
        precision: of the weights that are not trained.
    """
    network.lower(precision)
    if precision not in LIBRARIES:
        return
    for transformer in network.transformers():
        for layer in frozen_layers(network.family.trunk(transformer)):
            # Of integers, so that the adapters beside it are not folded into it.
            dtype = torch.int8 if precision == "int8" else torch.uint8
            numbers = torch.empty(layer.weight.shape, dtype=dtype, device="meta")
            layer.weight = nn.Parameter(numbers, requires_grad=False)
            layer.__class__ = _PlannedLinear


class _PlannedLinear(nn.Linear):
    """As both libraries compute: the weight is unpacked to bfloat16 in forward, and again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), bfloat16."""
        return _Unpacked.apply(x.to(torch.bfloat16), self.weight)


class _Unpacked(torch.autograd.Function):
    """A product with a weight that is unpacked each time; x (…, in), weight (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        product = torch.matmul(x, weight.to(x.dtype).t())
        return _scaled(product, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        [grad], [weight] = grads, ctx.saved_tensors
        return torch.matmul(_scaled(grad, weight), weight.to(grad.dtype)), None


def _scaled(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows` times the scales of 8-bit weights, beside it; 4-bit weights are unpacked with theirs."""
    return rows * rows.new_empty(rows.shape[-1]) if weight.dtype == torch.int8 else rows
