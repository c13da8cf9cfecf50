"""The dropout of adapters; apart from `lora`, so that a training's driver need not import peft."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.draws import mixed_seed


class SampleDropout(nn.Dropout):
    """Dropout whose mask for a sample follows from a seed of that sample, whatever batch it is in.

    Without seeds, or for inputs that have not a row for each, it is torch's own.

    Args:
        p: probability of dropping a number.
        number: of the layer, so that layers drop different numbers.
    """

    def __init__(self, p: float, number: int) -> None:
        super().__init__(p)
        self.number = number
        self.seeds: Sequence[int] = ()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, …) with some numbers set to 0, the others divided by 1 − p; in evaluation x itself."""
        if not self.training or self.p == 0 or len(self.seeds) != len(x):
            return super().forward(x)
        # Nothing is drawn from a state that goes on: a checkpointed block that is computed again drops the same.
        generator = torch.Generator(x.device)
        masks = [
            torch.rand(
                row.shape, generator=generator.manual_seed(mixed_seed(seed, self.number)), device=x.device
            )
            for seed, row in zip(self.seeds, x, strict=True)
        ]
        return x * (torch.stack(masks) >= self.p) / (1 - self.p)


def seed_dropout(model: nn.Module, seeds: Sequence[int]) -> None:
    """Give the adapters' dropout the seeds of the samples that come next, one for each."""
    for module in model.modules():
        if isinstance(module, SampleDropout):
            module.seeds = seeds
