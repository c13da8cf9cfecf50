"""Exponential moving average (EMA) of the trained weights, which inference uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class PowerEMA:
    """Exponential moving average whose memory grows with training (power schedule, METHOD.md section 4).

    The decay of update t = 1, 2, … is (1 − 1/t)^(γ+1): the first update copies the weights, and the average
    always covers the same fraction of the run so far. Averages are float32, on the devices of the weights; those of
    sharded weights (DTensor) are sharded alike.
    """

    def __init__(self, parameters: Mapping[str, Tensor], gamma: float = 7.0) -> None:
        """Start at the weights' values.

        Args:
            parameters: the weights by name; they are kept, and read at every update.
            gamma: γ; a larger one averages over fewer of the last updates.
        """
        self._live = dict(parameters)
        self._gamma = gamma
        # float32 whatever the weights are: near decay 1, an update is smaller than bfloat16's last digit.
        self._averages = {name: p.detach().float().clone() for name, p in self._live.items()}

    def decay(self, step: int) -> float:
        """Weight of the old average in update `step`, counted from 1."""
        return (1 - 1 / step) ** (self._gamma + 1)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        # One fused call for all tensors: a loop over them would launch a kernel for each.
        live = [p.detach().float() for p in self._live.values()]
        torch._foreach_lerp_(list(self._averages.values()), live, 1 - self.decay(step))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """A context in which the weights have the averages' values; afterwards they have their own again."""
        kept = [p.detach().clone() for p in self._live.values()]
        self._assign(list(self._averages.values()))
        try:
            yield
        finally:  # also after an error: training would go on with the averages
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._live.values(), values, strict=True):
            parameter.copy_(value)  # in place, as optimizer and FSDP hold these very tensors

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name: the tensors themselves, so that a checkpoint can be loaded into them in place."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved averages; `state` has one of each name."""
        for name, average in self._averages.items():
            average.copy_(state[name])
