"""Adam whose averages are held as integers of 8 bits, by torchao's quantization and arithmetic.

torchao's own `AdamW8bit` is not used: its state is of a kind of tensor that torch can't copy for a checkpoint which is
written in the background, it depends on how many workers share a weight, and a step needs a compiler. Here the state is
of plain tensors, in blocks that no division among workers cuts, so that a checkpoint fits any number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import tensor as sharded
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fewstep.errors import UserError

BLOCK = 256
"""The most numbers that have a scale in common."""

SMALLEST_BLOCK = 16
"""Where less than this many numbers of a row can have a scale in common, averages stay float32."""

SMALLEST_TENSOR = 4096
"""Averages of weights with fewer numbers stay float32, as in torchao and bitsandbytes: they would save nothing."""

AT_A_TIME = 1 << 22
"""Numbers that are updated at a time: the arithmetic takes about 50 bytes for each."""

AVERAGES = ("exp_avg", "exp_avg_sq")
"""Of gradients, and of their squares; named as torch's Adam names them."""


def check_torchao() -> None:
    """Refuse to go on without torchao.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torchao.optim  # noqa: F401
    except ImportError as error:
        raise UserError(
            "optimizer.type: adam8bit needs torchao: pip install 'fewstep[quantization]', or set optimizer.type=adam."
        ) from error


def block_size(parameter: Tensor) -> int | None:
    """How many numbers of an average have a scale in common; None if the parameter's averages stay float32.

    Blocks are parts of rows, as workers share weights by rows.
    """
    if parameter.ndim < 2 or parameter.numel() < SMALLEST_TENSOR:
        return None
    block = math.gcd(BLOCK, parameter.shape[1:].numel())
    return block if block >= SMALLEST_BLOCK else None


def averages_bytes(parameter: Tensor) -> int:
    """Bytes of both averages of a parameter, scales included."""
    numbers, block = parameter.numel(), block_size(parameter)
    return 2 * (4 * numbers if block is None else numbers + 4 * numbers // block)


class Adam8bit(Optimizer):
    """Adam with decoupled weight decay, whose averages are integers of 8 bits with a float32 scale per block.

    Averages of small tensors, and of those whose rows have too few numbers, are float32. Parameters may be sharded by
    rows (FSDP2's DTensors), and then so are their averages.

    Args:
        groups: parameter groups, as torch's optimizers take them.
        lr: learning rate.
        betas: decay rates of the averages of gradients and of their squares.
        eps: added to the square root of the second average.
        weight_decay: share of a weight, times the learning rate, that is taken off it in a step.

    Raises:
        UserError: torchao is not installed.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        check_torchao()
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @staticmethod
    def first_slots(parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state before the first step: the step's number, and averages of zeros."""
        slots = {"step": torch.zeros((), dtype=torch.float32)}
        block, rows = block_size(parameter), torch.contiguous_format
        for name in AVERAGES:
            if block is None:
                slots[name] = torch.zeros_like(parameter, memory_format=rows)
            else:
                slots[f"{name}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8, memory_format=rows)
                slots[f"{name}_scale"] = _zero_scales(parameter, block)
        return slots

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: none is taken; it is there because torch's optimizers have it.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        from torchao.optim.adam import single_param_adam

        slots = self.state[parameter]
        if not slots:
            slots.update(self.first_slots(parameter))
        slots["step"] += 1
        # This worker's part alone: no element needs another, and arithmetic with DTensors takes longer.
        whole = _local(parameter)
        weight = whole.contiguous().view(-1)
        gradient = _local(gradient).reshape(-1)
        parts = {name: _local(value).view(-1) for name, value in slots.items() if name != "step"}
        for first in range(0, weight.numel(), AT_A_TIME):
            part = slice(first, min(first + AT_A_TIME, weight.numel()))
            single_param_adam(
                weight[part],
                gradient[part],
                slots["step"],
                *(_average(parts, name, part) for name in AVERAGES),
                None,
                group["lr"],
                *group["betas"],
                group["weight_decay"],
                group["eps"],
                IS_ADAMW=True,
                BF16_STOCHASTIC_ROUND=False,
            )
        if not whole.is_contiguous():
            whole.copy_(weight.view_as(whole))


def _average(slots: dict[str, Tensor], name: str, part: slice) -> Tensor:
    """A part of an average, which torchao's arithmetic reads and writes: float32, or integers that look like it.

    Args:
        slots: flat.
        name: one of `AVERAGES`.
        part: of whole blocks.
    """
    from torchao.optim.subclass_8bit import OptimState8bit

    if name in slots:
        return slots[name][part]
    codes, scale = slots[f"{name}_codes"], slots[f"{name}_scale"]
    block = codes.numel() // scale.numel()
    signed = name == "exp_avg"
    scales = scale[part.start // block : part.stop // block]
    return OptimState8bit(codes[part], scales, _values(signed, codes.device), signed, dtype=torch.float32)


@cache
def _values(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that codes stand for, relative to their block's scale."""
    from torchao.optim.quant_utils import create_dynamic_map

    values = torch.tensor(create_dynamic_map(signed), device=device)
    if not signed:
        # The least is 0 in torchao's map. Where a second average became 0 and the first did not, a gradient of 0 would
        # move the weight by lr · first / eps, thousands of times as far as Adam moves one.
        values[0] = values[1] / 3
    return values


def _zero_scales(parameter: Tensor, block: int) -> Tensor:
    """A zero for each block of each row, sharded as the parameter is."""
    shape = (parameter.shape[0], parameter.shape[1:].numel() // block)
    if isinstance(parameter, DTensor):
        return sharded.zeros(shape, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.zeros(shape, device=parameter.device)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
