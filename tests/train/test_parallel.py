"""What workers that hold the whole model exchange."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fewstep.plan.meter import DispatchMeter
from fewstep.train import parallel
from fewstep.train.parallel import average_gradients
from fewstep.train.recipe import TrainConfig

SHAPES = [(3,), (50, 40), (300, 200), (7, 7), (), (40, 50), (100, 100)]
"""Of gradients: small ones together, large ones alone in messages of `BYTES`, and one that is not contiguous."""

BYTES = 20_000


def gradients_of(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [gradient.t() if gradient.shape == (40, 50) else gradient for gradient in drawn]


def averaging(rank: int, folder: str) -> None:
    """One rank's work: average gradients in one message and in several; keeps both, and what each took beside them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for most in (1 << 25, BYTES):
        parallel.BUCKET_BYTES = most
        parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients_of(rank)]
        for parameter, gradient in zip(parameters, gradients_of(rank), strict=True):
            parameter.grad = gradient
        held = [parameter.grad for parameter in parameters]
        with DispatchMeter(held) as meter:
            average_gradients([*parameters, nn.Parameter(torch.zeros(2))], TrainConfig(parallel="ddp"), 2)
        assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, held, strict=True))
        results.append((held, meter.peak))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_become_their_mean_in_place_and_in_bounded_messages(tmp_path: Path) -> None:
    mp.spawn(averaging, (str(tmp_path),), nprocs=2)
    sums = [one + other for one, other in zip(gradients_of(0), gradients_of(1), strict=True)]
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for gradients, _ in results:
            assert all(torch.equal(mean, total / 2) for mean, total in zip(gradients, sums, strict=True))
        # Gloo may hold a message for a moment after it has arrived.
        assert results[1][1] < 2 * BYTES, "one message at a time, and none of a large gradient"


@pytest.mark.parametrize(("how", "workers"), [("fsdp", 2), ("ddp", 1)])
def test_nothing_is_averaged_where_nothing_has_to_be(how: str, workers: int) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    average_gradients([parameter], TrainConfig(parallel=how), workers)  # no process group is needed
    assert parameter.grad.tolist() == [1, 1]
