"""Low-rank adapters (LoRA): their settings, the layers that get one, and how they are added to a network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fewstep.config import Config
from fewstep.errors import UserError
from fewstep.models.family import Family, Transformer


class LoRAConfig(Config):
    """Low-rank adapters (LoRA) on the frozen teacher's layers."""

    rank: int = Field(64, ge=1)
    """Rank of every adapter; alpha equals the rank, so adapters are scaled by 1."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the adapters' inputs, in training."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Distribution of the adapters' first matrices at the start: peft's usual one, uniform in ±1/√in; or normal with a
    standard deviation of 1/rank, as in the published configurations."""
    targets: tuple[str, ...] = ("paper",)
    """Linear layers to adapt, by the ends of their module names. "paper" stands for the paper's list for the family,
    and "ffn" for that list without matrices that FFN and attention share (one in FLUX.2's single-stream blocks)."""


def add_adapters(
    transformer: Transformer, family: Family, settings: LoRAConfig, ranks: Mapping[str, int] | None = None
) -> None:
    """Add adapters to a transformer's layers, in place; `PolicyNetwork` initialises their values afterwards.

    Args:
        transformer: whose layers are adapted.
        family: of the transformer.
        settings: of the adapters.
        ranks: full names of layers → their adapters' ranks, where they differ from `settings.rank`.

    Raises:
        UserError: as `lora_target_modules`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from fewstep.models.dropout import SampleDropout
    from fewstep.models.lora import FoldedLoRALinear

    targets = lora_target_modules(transformer, family, settings.targets)
    # peft reads its names as regular expressions that fit the end of a layer's name: these fit the whole.
    pattern = {f"^{re.escape(name)}": rank for name, rank in (ranks or {}).items() if rank != settings.rank}
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.rank, lora_dropout=settings.dropout, target_modules=targets,
        rank_pattern=pattern, alpha_pattern=pattern,
    )  # fmt: skip
    # A private function: peft has no public one by which linear layers get another adapter class.
    config._register_custom_module({nn.Linear: FoldedLoRALinear})
    # peft draws initial values, which are replaced later, from torch's global generator: fork_rng keeps that as it was.
    with torch.random.fork_rng():
        inject_adapter_in_model(config, transformer)
    if settings.dropout:
        adapted = [layer for layer in transformer.modules() if isinstance(layer, FoldedLoRALinear)]
        for number, layer in enumerate(adapted):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = SampleDropout(settings.dropout, number)


def lora_target_modules(transformer: Transformer, family: Family, targets: tuple[str, ...]) -> list[str]:
    """Full names of the modules that `targets` match.

    Raises:
        UserError: a target matches no linear or convolutional layer.
    """
    # Matched here rather than by peft, so that a misspelled target is refused instead of adapting nothing.
    layers = [
        name for name, module in transformer.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    chosen: dict[str, None] = {}  # an ordered set: targets may overlap
    for target in targets:
        for suffix in _suffixes(transformer, family, target):
            found = [name for name in layers if name == suffix or name.endswith(f".{suffix}")]
            if not found:
                raise UserError(
                    f"student.lora.targets: no linear layer of the {family.name} teacher ends in {suffix!r}; "
                    f"its layers are called like {layers[len(layers) // 2]!r}."
                )
            chosen.update(dict.fromkeys(found))
    return list(chosen)


def _suffixes(transformer: Transformer, family: Family, target: str) -> list[str]:
    """The ends of module names that one target stands for."""
    if target not in ("paper", "ffn"):
        return [target]
    shared = family.shared_matrices(transformer) if target == "ffn" else []
    return [suffix for suffix in family.lora_targets(transformer) if suffix not in shared]
