"""Learning rate and random draws by step."""

from __future__ import annotations

import subprocess
import sys

import torch

from fewstep.train.learner import seed_step
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


def draw(rank: int, batch: int) -> list[float]:
    generator = torch.Generator()
    seed_step(generator, 7, rank, batch)
    return [*torch.rand(2, generator=generator).tolist(), *torch.rand(2).tolist()]


def test_draws_are_the_same_in_every_process_and_differ_by_rank_and_batch() -> None:
    code = "from tests.train.test_schedule import draw; print(draw(1, 5))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(draw(1, 5))
    assert len({tuple(draw(rank, batch)) for rank in (0, 1) for batch in (5, 6)}) == 4
