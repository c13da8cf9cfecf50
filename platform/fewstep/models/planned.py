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
    stand_in = _Int8Linear if precision == "int8" else _Int4Linear
    for transformer in network.transformers():
        for layer in frozen_layers(network.family.trunk(transformer)):
            # Of integers, so that the adapters beside it are not folded into it.
            numbers = torch.empty(layer.weight.shape, dtype=torch.int8, device="meta")
            layer.weight = nn.Parameter(numbers, requires_grad=False)
            layer.__class__ = stand_in


class _Int8Linear(nn.Linear):
    """As torchao computes: unpacked to the type of x, product, scales of the rows.

    Autograd keeps the unpacked weight for backward. torchao is called before autocast, which then casts the product's
    inputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), of the type of x."""
        flat, weight = x.reshape(-1, self.in_features), self.weight.t().to(x.dtype)
        product = torch.mm(flat.to(torch.bfloat16), weight.to(torch.bfloat16))
        scaled = product * product.new_empty(self.out_features)
        return _with_bias(self, scaled.reshape(*x.shape[:-1], self.out_features)).to(x.dtype)


class _Int4Linear(nn.Linear):
    """As bitsandbytes computes: unpacked in forward, and again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), bfloat16."""
        return _with_bias(self, _Unpacked.apply(x.to(torch.bfloat16), self.weight))


def _with_bias(layer: nn.Linear, result: Tensor) -> Tensor:
    return result if layer.bias is None else result.add_(layer.bias.to(result.dtype))


class _Unpacked(torch.autograd.Function):
    """A product with a weight that is unpacked each time; x (…, in), weight (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.matmul(x, weight.to(x.dtype).t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        [grad], [weight] = grads, ctx.saved_tensors
        return torch.matmul(grad, weight.to(grad.dtype)), None
