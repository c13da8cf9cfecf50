"""Learning rate and random draws by step."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from fewstep.distill.result import draw_times
from fewstep.draws import SampleGenerators, gaussian_noise, uniform
from fewstep.models.dropout import SampleDropout, seed_dropout
from fewstep.train.optimizers import lr_share
from fewstep.train.recipe import OptimizerConfig


def test_the_rate_warms_up_holds_and_falls_to_zero() -> None:
    settings = OptimizerConfig(warmup_steps=4, decay="linear", decay_from=0.5)
    shares = [lr_share(settings, step, 100) for step in range(1, 101)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(shares[4:50]) == {1.0}
    assert shares[50:] == sorted(shares[50:], reverse=True)
    assert 0 < shares[-1] <= 0.02


def test_a_fixed_rate_stays() -> None:
    settings = OptimizerConfig(warmup_steps=0, decay="none")
    assert {lr_share(settings, step, 9) for step in range(1, 10)} == {1.0}


def draw(step: int, part: range, total: int = 6) -> list[list[float]]:
    """What the samples of a part of a batch draw, a list for each."""
    generators = SampleGenerators(7, step, part, total)
    times = draw_times(len(part), generators)[:, None]
    noise = gaussian_noise((len(part), 20), generators)
    return torch.cat([times, noise, uniform((len(part), 3), generators)], dim=1).tolist()


def test_draws_are_the_same_in_every_process_and_differ_by_sample_and_step() -> None:
    code = "from tests.train.test_schedule import draw; print(draw(5, range(2)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(draw(5, range(2)))
    rows = [*draw(5, range(6)), *draw(6, range(6))]
    assert len({tuple(row) for row in rows}) == len({row[1] for row in rows}) == 12


def test_draws_of_a_sample_do_not_depend_on_the_parts_of_its_batch() -> None:
    whole = draw(5, range(6))
    assert [*draw(5, range(2)), *draw(5, range(2, 3)), *draw(5, range(3, 6))] == whole


def test_times_are_stratified_over_the_whole_batch() -> None:
    for step in range(20):
        times = sorted(row[0] for part in (range(3), range(3, 6)) for row in draw(step, part))
        assert [math.ceil(6 * time) for time in times] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("shape", [(5,), (7, 5)])
def test_dropout_of_a_sample_depends_on_its_seed_alone(shape: tuple[int, ...]) -> None:
    x = torch.rand(4, *shape) + 1
    layers = [SampleDropout(0.5, number) for number in (0, 1)]
    model = torch.nn.ModuleList(layers)

    def dropped(seeds: list[int], rows: slice) -> torch.Tensor:
        seed_dropout(model, seeds)
        return layers[0](x[rows])

    whole = dropped([3, 4, 5, 6], slice(0, 4))
    assert torch.equal(torch.cat([dropped([3, 4], slice(0, 2)), dropped([5, 6], slice(2, 4))]), whole)
    assert torch.equal(dropped([3, 4, 5, 6], slice(0, 4)), whole), (
        "as when a checkpointed block is computed again"
    )
    kept = whole != 0
    assert torch.equal(whole[kept], (2 * x)[kept])
    assert not kept.all()
    assert kept.any()
    assert not torch.equal(dropped([3, 4, 5, 7], slice(0, 4))[3], whole[3])
    seed_dropout(model, [3, 4, 5, 6])
    assert not torch.equal(layers[1](x), whole), "layers drop different numbers"
    model.eval()
    assert torch.equal(layers[0](x), x)
