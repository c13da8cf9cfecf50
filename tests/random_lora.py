"""LoRAs with random matrices, and as the files that trainers write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.models.styles import LowRank


def random_lora(
    network: nn.Module, ends: Sequence[str], seed: int = 0, rank: int = 3, size: float = 0.1
) -> dict[str, LowRank]:
    """Matrices for the linear layers whose names have one of these ends."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(rank, layer.in_features, generator=generator) * size,
            torch.randn(layer.out_features, rank, generator=generator) * size,
        )
        for name, layer in network.named_modules()
        if name.endswith(tuple(ends)) and isinstance(layer, nn.Linear)
    }


def in_style(style: str, lora: dict[str, LowRank]) -> dict[str, Tensor]:
    """The content of a file with the keys of "diffusers", "peft" or "kohya"."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in lora.items():
        if style == "kohya":
            layer = f"lora_unet_{name.replace('.', '_')}"
            # alpha over rank is the factor: stored twice as large, with half of it.
            state |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": 2 * up}
            state[f"{layer}.alpha"] = torch.tensor(len(down) / 2)
        elif style == "peft":
            layer = f"diffusion_model.{name}"
            state |= {f"{layer}.lora_A.default.weight": down, f"{layer}.lora_B.default.weight": up}
        else:
            layer = f"transformer.{name}"
            state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def write_lora(file: Path, lora: dict[str, LowRank], style: str = "diffusers") -> str:
    """Write a file; gives its path."""
    save_file(in_style(style, lora), file)
    return str(file)
