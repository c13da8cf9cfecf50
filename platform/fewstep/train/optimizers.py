"""What moves the weights: Adam, or Muon for the matrices inside transformer blocks; and at what rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from fewstep.train.recipe import OptimizerSection


def build_optimizers(
    parameters: Iterable[nn.Parameter], blocks: Iterable[nn.Module], settings: OptimizerSection
) -> list[Optimizer]:
    """One or two optimizers that share `parameters`; each group has its rate after warm-up as `peak_rate`.

    Adam has decoupled weight decay on matrices only.

    Args:
        parameters: what is trained.
        blocks: the transformer's, whose matrices are Muon's.
        settings: kind and rates.
    """
    parameters = list(parameters)
    muons = muon_parameters(blocks, settings)
    taken = {id(p) for p in muons}
    matrices = [p for p in parameters if p.ndim > 1 and id(p) not in taken]
    others = [p for p in parameters if p.ndim <= 1]
    adam = AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay, "peak_rate": settings.rate},
            {"params": others, "weight_decay": 0.0, "peak_rate": settings.rate},
        ],
        lr=settings.rate,
        betas=settings.betas,
        fused=True,
    )
    if not muons:
        return [adam]
    group = {"params": muons, "peak_rate": settings.muon_rate}
    return [Muon([group], lr=settings.muon_rate, weight_decay=settings.weight_decay), adam]


def muon_parameters(blocks: Iterable[nn.Module], settings: OptimizerSection) -> list[nn.Parameter]:
    """The trained matrices that Muon moves; none where Adam moves all."""
    if settings.type != "muon":
        return []
    return [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]


def rate_share(settings: OptimizerSection, step: int, steps: int) -> float:
    """Share of the full rate at optimizer step `step` (from 1): linear warm-up, then constant or linear decay."""
    warmup = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.decay == "none":
        return warmup
    begin = settings.decay_from * steps
    return min(warmup, (steps - step + 1) / (steps - begin))


def first_slots(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of a parameter before its first step, so that a checkpoint has where to go."""
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {
        # Where fused Adam keeps it: a GPU's kernel reads the count from the GPU's own memory.
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
