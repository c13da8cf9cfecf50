"""Loading of transformers models in a precision, onto a device, without a copy in any other type."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.config import Precision
from fewstep.encoders.memory import does_not_fit
from fewstep.models.precision import check_precision

PACKED = (32, 64)
"""What the outputs and inputs of a layer must be multiples of for bitsandbytes' fast form of 4 bits on CPUs."""


def load_frozen(
    kind: Any, name: str, where: dict[str, Any], precision: Precision, device: torch.device | str
) -> Any:
    """Load a frozen model, each weight straight to its type and device.

    With "int8" and "int4", the weights of linear layers are integers (by torchao's and bitsandbytes' own support in
    transformers), and everything else is bfloat16.

    Args:
        kind: transformers' class.
        name: of the encoder, for messages.
        where: arguments of `from_pretrained` that say where the model lies.
        precision: how the weights are held.
        device: where they are.

    Raises:
        UserError: the precision's library is missing, or the model does not fit the device.
    """
    check_precision(precision)
    device = torch.device(device)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    try:
        model = kind.from_pretrained(
            **where,
            dtype=dtype,
            quantization_config=_quantization(precision),
            # On the device, weights are also made into integers, which takes a CPU minutes.
            device_map={"": device},
        )
    except torch.OutOfMemoryError as error:
        raise does_not_fit(name, device) from error
    if precision == "int4":
        _leave_odd_sizes_unpacked(model)
    return model.eval().requires_grad_(False)


def _quantization(precision: Precision) -> Any:
    """transformers' configuration of a precision; None for those in floating point."""
    import transformers

    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if precision == "int4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return None


def _leave_odd_sizes_unpacked(model: Any) -> None:
    """Have layers of 4 bits with odd sizes computed in the usual form.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 packs every layer anew at its first use, and fails at such sizes.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit) and (
            layer.out_features % PACKED[0] or layer.in_features % PACKED[1]
        ):
            layer.support_avx512bf16_for_cpu = False
