"""Precision of frozen weights: float32, bfloat16, or quantised to 8 or 4 bits; the one place that knows them.

What is lowered are the weights of linear layers in a network's trunk (`Family.trunk`), which are nearly all of a large
network. Norms, embeddings of time and position, input and output layers, adapters and the policy head keep float32.
The trunk then computes its products in bfloat16 and hands on float32. So times and positions stay exact, and every
route (training, pipeline, server) rounds in the same places.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import wraps
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fewstep.config import PRECISIONS, Precision
from fewstep.errors import UserError

NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that warn, when the libraries are imported (peft does), of parts that are not used here."""

# Norms keep float32 weights, for which torch has no fused kernel with a bfloat16 input.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
for _name in NOISY:
    logging.getLogger(_name).setLevel(logging.ERROR)

PRODUCTS = (F.linear, F.conv2d, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__)
"""What autocast has computed in bfloat16."""

LIBRARIES = {"int8": "torchao", "int4": "bitsandbytes"}
"""Precisions whose weights are quantised → the library that does it."""


def precision_of(dtype: torch.dtype | None, quantization: str | None) -> Precision:
    """The precision by the two arguments that diffusers' users know.

    Args:
        dtype: of weights that are not quantised; None for float32.
        quantization: "int8", "int4" or None.

    Raises:
        UserError: there is no such precision, the two contradict each other, or it needs a library that is not
            installed.
    """
    names = [name for name in PRECISIONS if name not in LIBRARIES]
    if dtype not in (None, *(getattr(torch, name) for name in names)):
        raise UserError(
            f"dtype {dtype!r} is not known: give torch.{' or torch.'.join(names)}; integers are chosen by "
            "quantization."
        )
    if quantization is None:
        return check_precision(str(dtype or torch.float32).removeprefix("torch."), "dtype")
    if not isinstance(quantization, str) or quantization not in LIBRARIES:
        raise UserError(
            f"quantization {quantization!r} is not known: give {' or '.join(LIBRARIES)}, or None."
        )
    if dtype == torch.float32:
        raise UserError(
            f"dtype float32 and quantization {quantization!r} are two precisions: leave one of them out."
        )
    return check_precision(quantization, "quantization")


def pipeline_arguments(precision: Precision) -> dict[str, Any]:
    """The two arguments that stand for a precision; the inverse of `precision_of`."""
    if precision in LIBRARIES:
        return {"quantization": precision}
    return {"dtype": getattr(torch, precision)}


def check_precision(name: str, field: str = "precision") -> Precision:
    """The precision of that name.

    Args:
        name: one of `PRECISIONS`.
        field: name of the setting, for error messages.

    Raises:
        UserError: there is no such precision, or it needs a library that is not installed.
    """
    if name not in PRECISIONS:
        raise UserError(f"{field} {name!r} is not known: give one of {', '.join(PRECISIONS)}.")
    library = LIBRARIES.get(name)
    if library is not None and find_spec(library) is None:
        raise UserError(f"{field} {name} needs {library}: pip install 'fewstep[quantization]'.")
    return cast(Precision, name)


def check_arithmetic(precision: Precision, device: torch.device | str, field: str = "precision") -> None:
    """Refuse a precision that a device computes far more slowly than float32.

    Args:
        precision: any; all but float32 compute in bfloat16.
        device: where.
        field: name of the setting, for error messages.

    Raises:
        UserError: the device has no bfloat16 arithmetic.
    """
    if precision == "float32":
        return
    if torch.device(device).type == "cpu" and not cpu_has_bfloat16():
        raise UserError(
            f"{field} {precision}: this CPU has no bfloat16 arithmetic, and would be 50 to 100 times slower than in "
            "float32: choose float32, or a GPU."
        )
    if torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"{field} {precision}: {torch.cuda.get_device_name(device)} has no bfloat16 arithmetic: choose float32, "
            "or a newer GPU."
        )


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware; others take 50 to 100 times as long."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def bytes_of(numbers: int, precision: Precision) -> int:
    """Bytes that a linear layer's weight of so many numbers takes, with the scales of a quantised one (for rows of a
    few thousand)."""
    # nf4 has an 8-bit scale per 64 numbers, and of those again a float32 one per 256.
    each = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 1 / 1024, "int4": 0.5 + 1 / 64 + 4 / (64 * 256)}
    return int(numbers * each[precision])


def frozen_layers(modules: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """The linear layers in modules whose weights are not trained, without those of adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in modules:
        adapters = {
            id(part)
            for layer in module.modules()
            if isinstance(layer, BaseTunerLayer)
            for name in layer.adapter_layer_names
            for part in getattr(layer, name).modules()
        }
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and id(layer) not in adapters and not layer.weight.requires_grad:
                yield layer


@torch.no_grad()
def set_weight(layer: nn.Linear, weight: Tensor, precision: Precision, device: torch.device) -> None:
    """Give a linear layer its weight, in a precision and on a device.

    Args:
        layer: its weight is replaced.
        weight: (out, in), of any floating-point type. On the meta device, a bfloat16 weight without values stands for
            any lower precision.
        precision: how it is held from now on.
        device: where.
    """
    if precision == "int4" and not weight.is_meta:
        import bitsandbytes

        numbers = weight.to(device, torch.bfloat16)
        packed: Any = bitsandbytes.nn.Params4bit(numbers, requires_grad=False, quant_type="nf4")
        layer.weight = packed.to(device)  # quantises
        layer.__class__ = Linear4Bit
        return
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    # Not copied where it is right already: mapped pages of a file are shared by processes, and read when needed.
    layer.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
    if precision == "int8" and not weight.is_meta:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layer, Int8WeightOnlyConfig())
        layer.__class__ = Linear8Bit


class Linear8Bit(nn.Linear):
    """A linear layer with an 8-bit weight of torchao, which is unpacked for each product."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), bfloat16."""
        # In bfloat16 before torchao sees it, which else unpacks to float32 first.
        # So is the bias: added in float32, it takes two copies of the result on a CPU.
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return _Product8Bit.apply(x.to(torch.bfloat16), self.weight, bias)


class _Product8Bit(torch.autograd.Function):
    """A product with a frozen weight of torchao; x (…, in), weight (out, in), bias (out,) or None.

    torchao's own has autograd keep the unpacked weight until backward: of all layers together, in a training without
    activation checkpointing, twice the memory that 8 bits save.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        [grad], weight = grads, ctx.weight
        # As torchao's forward: scales of the rows, and the integers as they are. Its `dequantize` takes three times
        # the memory.
        scaled = grad * weight.scale.flatten().to(grad.dtype)
        return torch.matmul(scaled, weight.qdata.to(grad.dtype)), None, None


class Linear4Bit(nn.Linear):
    """A linear layer with a 4-bit weight of bitsandbytes, which is unpacked for each product."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), bfloat16."""
        import bitsandbytes

        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        weight: Any = self.weight
        return bitsandbytes.matmul_4bit(x.to(torch.bfloat16), weight.t(), weight.quant_state, bias=bias)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is one that torchao or bitsandbytes has quantised."""
    return is_traceable_wrapper_subclass(weight) or not weight.is_floating_point()


def held_bytes(module: nn.Module) -> int:
    """Bytes that a module's parameters and buffers take, quantised ones with their scales."""
    return sum(_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _bytes(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):  # torchao's, which says of itself the size before quantising
        names, _ = cast(Any, tensor).__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    state = getattr(tensor, "quant_state", None)  # bitsandbytes': beside the numbers, their scales
    scales = 0
    while state is not None:  # the scales are quantised themselves, and have scales again
        scales, state = scales + state.absmax.nbytes, state.state2 if state.nested else None
    return tensor.nbytes + scales


def compute_in_bfloat16(modules: Iterable[nn.Module]) -> None:
    """Have modules compute their products in bfloat16, in place; what they take and give stays as it is."""
    for module in modules:
        module.forward = _bfloat16_products(module.forward)


def _bfloat16_products(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with autocast to bfloat16; on CPUs with AVX512-BF16 it is 1.3 times as fast as in float32."""

    @wraps(forward)
    def mixed(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        # Entered at each call: modes and autocast hold for the thread that enters them.
        if device == "meta":  # which autocast does not know
            with _Computed(torch.bfloat16, PRODUCTS):
                return forward(*args, **kwargs)
        # The backward of torch's attention kernel for CPUs is seven times as slow in bfloat16.
        attention = (
            _Computed(torch.float32, (F.scaled_dot_product_attention,)) if device == "cpu" else nullcontext()
        )
        with torch.autocast(device, torch.bfloat16), attention:
            return forward(*args, **kwargs)

    return mixed


class _Computed(TorchFunctionMode):
    """A mode in which some functions compute in one type, also inside autocast.

    Args:
        dtype: the type.
        functions: of torch.
    """

    def __init__(self, dtype: torch.dtype, functions: Sequence[Callable[..., Any]]) -> None:
        super().__init__()
        self._dtype, self._functions = dtype, functions

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Called for every torch function inside the mode.
        kwargs = kwargs or {}
        if func not in self._functions:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            named = {name: _cast(value, self._dtype) for name, value in kwargs.items()}
            return func(*(_cast(value, self._dtype) for value in args), **named)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in another type; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
