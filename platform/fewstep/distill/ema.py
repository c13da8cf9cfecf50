"""Average of the trained weights, with which inference runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class PowerEMA:
    """Exponential moving average whose memory grows with training (power schedule, METHOD.md section 4).

    The decay of update t = 1, 2, … is (1 − 1/t)^(γ+1): the first update copies the weights, and the average
    always spans the same fraction of the run. Averages are float32 and lie where the weights lie; sharded
    weights (DTensor) have sharded averages.
    """

    def __init__(self, parameters: Mapping[str, Tensor], gamma: float = 7.0) -> None:
        """Start at the weights' values.

        Args:
            parameters: the live weights by name; the average holds on to them.
            gamma: γ; a larger one forgets sooner.
        """
        self._live = dict(parameters)
        self._gamma = gamma
        self._averages = {name: p.detach().float().clone() for name, p in self._live.items()}

    def decay(self, step: int) -> float:
        """Weight of the old average in update `step`, counted from 1."""
        return (1 - 1 / step) ** (self._gamma + 1)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the live weights after optimizer step `step`, counted from 1."""
        live = [p.detach().float() for p in self._live.values()]
        torch._foreach_lerp_(list(self._averages.values()), live, 1 - self.decay(step))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the live weights hold the averages; their own values return at the end."""
        kept = [p.detach().clone() for p in self._live.values()]
        self._assign(list(self._averages.values()))
        try:
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._live.values(), values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name; not copies."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved averages, one of each name."""
        for name, average in self._averages.items():
            average.copy_(state[name])
