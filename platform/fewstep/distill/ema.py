"""Exponential moving average (EMA) of the trained weights, which inference uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class PowerEMA:
    """Exponential moving average whose memory grows with training (power schedule, METHOD.md section 4).

    The decay of update t = 1, 2, … is (1 − 1/t)^(γ+1): the first update copies the weights, and the average
    always covers the same fraction of the run so far. Averages are float32; those of sharded weights (DTensor) are
    sharded alike. They are on the devices of the weights, or all in the host's memory.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], gamma: float = 7.0, offload: bool = False, begin: int = 1
    ) -> None:
        """Start at the weights' values.

        Args:
            parameters: the weights by name; they are kept, and read at every update.
            gamma: γ; a larger one averages over fewer of the last updates.
            offload: keep the averages in the host's memory. They then pass through the weights' device one at a time,
                and the numbers are the same.
            begin: update from which averages are taken; before, they are the weights.
        """
        self._live = dict(parameters)
        self._gamma, self._begin = gamma, begin
        self._offload = offload
        # float32 whatever the weights are: near decay 1, an update is smaller than bfloat16's last digit.
        self._averages = {name: self._first(p.detach()) for name, p in self._live.items()}

    def decay(self, step: int) -> float:
        """Weight of the old average in update `step`, counted from 1."""
        return 0.0 if step < self._begin else (1 - 1 / step) ** (self._gamma + 1)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        share, averages = 1 - self.decay(step), list(self._averages.values())
        if not self._offload:
            # One fused call for all tensors: a loop over them would launch a kernel for each.
            live = [p.detach().float() for p in self._live.values()]  # float32 ones are not copied
            torch._foreach_lerp_(averages, live, share)
            return
        for average, parameter in zip(averages, self._live.values(), strict=True):
            # The host does not wait for the copies. They follow one another on the device's stream, so an average has
            # come back before it leaves again; who reads it on the host waits in `state_dict`.
            here = average.to(parameter.device, non_blocking=True)
            here.lerp_(parameter.detach().float(), share)
            if here is not average:
                average.copy_(here, non_blocking=True)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """A context in which the weights have the averages' values; afterwards they have their own again.

        Within it, the averages of float32 weights hold those weights' own values: there is no third copy of them.
        """
        # Weights of another type can't hold the averages exactly: they exchange with rounded copies.
        others = [average.to(self._live[name].dtype) for name, average in self._averages.items()]
        self._exchange(others)
        try:
            yield
        finally:  # also after an error: training would go on with the averages
            self._exchange(others)

    @torch.no_grad()
    def _exchange(self, others: Iterable[Tensor]) -> None:
        """Exchange the weights' values with those of other tensors, one by one, and without the host waiting."""
        for parameter, other in zip(self._live.values(), others, strict=True):
            own = parameter.detach().clone()
            # In place, as optimizer and FSDP hold these very tensors.
            parameter.copy_(other, non_blocking=True)
            other.copy_(own, non_blocking=True)

    def _first(self, weight: Tensor) -> Tensor:
        """The first average of a weight: its value."""
        if not self._offload:
            return weight.to(torch.float32, copy=True)
        # Pinned: only between such memory and a GPU can copies go on while the host does other things.
        average = torch.empty_like(weight, dtype=torch.float32, device="cpu", pin_memory=weight.is_cuda)
        return average.copy_(weight)

    def _arrive(self) -> None:
        """Wait until copies of averages to the host are complete."""
        if self._offload:
            for device in {p.device for p in self._live.values() if p.is_cuda}:
                torch.cuda.synchronize(device)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name: the tensors themselves, so that a checkpoint can be loaded into them in place.

        Call it anew after each update: on the host, averages from before have values that may still be on their way.
        """
        self._arrive()
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from saved averages; `state` has one of each name."""
        self._arrive()
        for name, average in self._averages.items():
            average.copy_(state[name])
