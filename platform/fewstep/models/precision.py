"""Precision of a frozen base's weights: float32, bfloat16, or quantised to 8 or 4 bits; the one place that knows them.

What is lowered are the weights of the linear layers in a network's blocks, which are nearly all of a large network.
Norms, embeddings of time and position, the output layers, adapters and the policy head keep float32. Blocks then
compute their matrix products in bfloat16 and hand on float32: so times and positions stay exact, and every route
(training, pipeline, server) rounds in the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fewstep.errors import UserError

Precision = Literal["float32", "bfloat16", "int8", "int4"]
"""How a base's weights are held: in floating point, or as integers of 8 bits with a scale per row (torchao), or as
NormalFloat numbers of 4 bits with a scale per 64 (bitsandbytes)."""

BYTES: dict[str, float] = {
    "float32": 4,
    "bfloat16": 2,
    "int8": 1 + 4 / 3072,
    "int4": 0.5 + 1 / 64 + 4 / 16384,
}
"""Bytes per weight, with scales."""

QUANTISED = ("int8", "int4")
"""Precisions whose weights are no longer floating-point tensors."""


def precision_of(torch_dtype: torch.dtype | None, quantization: str | None) -> Precision:
    """The precision by the two arguments that diffusers' users know.

    Args:
        torch_dtype: of weights that are not quantised; None for float32.
        quantization: "int8", "int4" or None.

    Raises:
        UserError: there is no such precision.
    """
    if quantization is not None:
        return check_precision(quantization)
    return check_precision(str(torch_dtype or torch.float32).removeprefix("torch."))


def check_precision(name: str) -> Precision:
    """The precision of that name.

    Raises:
        UserError: there is none, or the library for it is not installed.
    """
    if name not in get_args(Precision):
        raise UserError(f"precision {name!r} is not known: use one of {', '.join(get_args(Precision))}.")
    library = {"int8": "torchao", "int4": "bitsandbytes"}.get(name)
    if library is not None:
        try:
            __import__(library)
        except ImportError as error:
            raise UserError(
                f"precision {name} needs {library}: pip install 'fewstep[quantization]'."
            ) from error
    return name  # type: ignore[return-value]


def lowered_layers(blocks: Iterable[nn.Module]) -> dict[int, nn.Linear]:
    """The linear layers whose weights may be lowered, by the identity of their weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = {
        id(part)
        for block in blocks
        for layer in block.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.adapter_layer_names
        for part in getattr(layer, name).modules()
    }
    return {
        id(layer.weight): layer
        for block in blocks
        for layer in block.modules()
        if isinstance(layer, nn.Linear) and id(layer) not in adapters
    }


@torch.no_grad()
def set_weight(layer: nn.Linear, weight: Tensor, precision: Precision, device: torch.device) -> None:
    """Give a linear layer its weight, in a precision and on a device.

    Args:
        layer: its weight is replaced.
        weight: (out, in), of any floating-point type, on the CPU.
        precision: how it is held from now on.
        device: where.
    """
    if precision == "int4":
        import bitsandbytes

        packed = bitsandbytes.nn.Params4bit(
            weight.to(torch.bfloat16), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        layer.weight = packed.to(device)
        layer.__class__ = _layer_of_4_bits()
        return
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    layer.weight = nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False)
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layer, Int8WeightOnlyConfig())


def compute_in_bfloat16(blocks: Iterable[nn.Module], device: str) -> None:
    """Have blocks compute their products in bfloat16, in place; what they take and give stays float32.

    Args:
        blocks: of a network.
        device: "cpu" or "cuda".
    """
    for block in blocks:
        block.forward = _bfloat16_products(block.forward, device)


def _layer_of_4_bits() -> type[nn.Linear]:
    """The class of linear layers whose weight is one of bitsandbytes' of 4 bits."""
    import bitsandbytes

    class Linear4Bit(nn.Linear):
        """x·Wᵀ + b with a weight of 4 bits, which is unpacked for the product."""

        def forward(self, x: Tensor) -> Tensor:
            half = x.to(torch.bfloat16)
            bias = None if self.bias is None else self.bias.to(torch.bfloat16)
            weight: Any = self.weight
            return bitsandbytes.matmul_4bit(half, weight.data.t(), weight.quant_state, bias=bias)

    return Linear4Bit


def _bfloat16_products(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`forward` with autocast to bfloat16; on CPUs with AVX512-BF16 it is 1.3 times as fast as in float32."""

    @wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        # Entered at each call: modes and autocast hold for the thread that enters them.
        attention = _Float32Attention() if device == "cpu" else nullcontext()
        with torch.autocast(device, torch.bfloat16), attention:
            return forward(*args, **kwargs)

    return mixed


class _Float32Attention(TorchFunctionMode):
    """A mode in which attention is computed in float32, also inside autocast.

    The backward of torch's attention kernel for CPUs is seven times as slow in bfloat16.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Called for every torch function inside the mode; only attention is changed.
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})


def _widened(value: Any) -> Any:
    """A floating-point tensor in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
