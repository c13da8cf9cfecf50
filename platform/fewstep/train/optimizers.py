"""Optimizers, Adam or Muon for the matrices of transformer blocks, their memory, and the schedule of learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from fewstep.train.adam8bit import Adam8bit, averages_bytes
from fewstep.train.recipe import OptimizerConfig


def build_optimizers(
    parameters: Iterable[nn.Parameter], blocks: Iterable[nn.Module], config: OptimizerConfig
) -> list[Optimizer]:
    """Make the optimizers of a run: Adam alone, or Muon for some parameters and Adam for the others.

    Each parameter group has `peak_lr`, its learning rate after warm-up. Adam's weight decay (decoupled) is only on
    matrices.

    Args:
        parameters: all trained parameters.
        blocks: the transformer's blocks, whose matrices Muon trains.
        config: kind and learning rates.

    Raises:
        UserError: the library for Adam of 8 bits is not installed.
    """
    parameters = list(parameters)
    muons = muon_parameters(blocks, config)
    taken = {id(p) for p in muons}
    matrices = [p for p in parameters if p.ndim > 1 and id(p) not in taken]
    others = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "peak_lr": config.lr},
        {"params": others, "weight_decay": 0.0, "peak_lr": config.lr},
    ]
    if config.type == "adam8bit":
        return [Adam8bit(groups, config.lr, config.betas)]
    # Fused: one kernel for all parameters instead of several per parameter.
    adam = AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if not muons:
        return [adam]
    group = {"params": muons, "peak_lr": config.muon_lr}
    return [Muon([group], lr=config.muon_lr, weight_decay=config.weight_decay), adam]


def muon_parameters(blocks: Iterable[nn.Module], config: OptimizerConfig) -> list[nn.Parameter]:
    """The parameters that Muon trains: matrices of transformer blocks; none if the optimizer is another."""
    if config.type != "muon":
        return []
    return [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]


def state_bytes(
    parameters: Iterable[nn.Parameter], blocks: Iterable[nn.Module], config: OptimizerConfig
) -> int:
    """Bytes of the optimizers' averages, of all workers together; arguments as for `build_optimizers`."""
    muons = {id(p) for p in muon_parameters(blocks, config)}
    adam = averages_bytes if config.type == "adam8bit" else _float32_averages_bytes
    return sum(4 * p.numel() if id(p) in muons else adam(p) for p in parameters)


def _float32_averages_bytes(parameter: torch.Tensor) -> int:
    """Bytes of both averages that torch's Adam keeps of a parameter."""
    return 2 * 4 * parameter.numel()


def lr_share(config: OptimizerConfig, step: int, steps: int) -> float:
    """Factor on the learning rates at an optimizer step: linear warm-up, then 1, or falling linearly to 0.

    Args:
        config: has the schedule.
        step: optimizer step, from 1.
        steps: of the whole run.
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay == "none":
        return warmup
    # The last step still has a small factor: with 0 it would change nothing.
    begin = config.decay_from * steps
    return min(warmup, (steps - step + 1) / (steps - begin))


def first_slots(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state that an optimizer has of a parameter before its first step, for loading a checkpoint into it.

    Names and types are those that torch's own Muon and AdamW use, and our own Adam of 8 bits.
    """
    if isinstance(optimizer, Adam8bit):
        return optimizer.first_slots(parameter)
    if isinstance(optimizer, Muon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {
        # On the parameter's device: fused Adam's kernel reads the step count from its own memory.
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
