"""Solvers of higher order on a teacher whose trajectories are known: Gaussian data."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow import TimeShift
from fewstep.models.solvers import SOLVERS, Solver, evaluations_of, solve

MEAN, STD, SHIFT = 0.7, 0.5, TimeShift(2.0)


def velocity(x: Tensor, sigma: Tensor) -> Tensor:
    t = sigma.view(-1, 1, 1, 1)
    deviation = (x - (1 - t) * MEAN) / (((1 - t) * STD) ** 2 + t**2)
    return t * deviation - MEAN - (1 - t) * STD**2 * deviation


def error(solver: Solver, evaluations: int) -> float:
    noise = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    calls: list[float] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (8,)
        calls.append(float(sigma[0]))
        return velocity(x, sigma)

    end = solve(solver, counted, noise, evaluations, SHIFT)
    assert len(calls) == evaluations
    assert calls[0] == 1
    assert all(before >= after > 0 for before, after in pairwise(calls))
    return float((end - (MEAN + STD * noise)).square().mean().sqrt())


@pytest.mark.parametrize(
    ("solver", "least_gain"), [("euler", 3.0), ("heun", 12), ("dpmpp", 20), ("unipc", 30)]
)
def test_more_evaluations_are_more_exact(solver: Solver, least_gain: float) -> None:
    """Four times as many. Multistep solvers gain most between 4 and 16; Heun's method later."""
    few, many = (error(solver, evaluations_of(solver, steps)) for steps in (4, 16))
    if solver == "heun":
        few, many = many, error(solver, 63)
    assert many < few / least_gain
    assert many < 0.07


@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
def test_multistep_solvers_beat_euler_at_as_many_evaluations(solver: Solver) -> None:
    for steps in (4, 8, 16):
        assert error(solver, steps) < error("euler", steps)
    assert error(solver, 16) < error("euler", 16) / 5


@pytest.mark.parametrize("solver", SOLVERS)
def test_few_evaluations_are_finite(solver: Solver) -> None:
    for steps in (1, 2, 3, 4):
        assert error(solver, evaluations_of(solver, steps)) < 2


def test_heun_takes_an_odd_number_of_evaluations() -> None:
    assert [evaluations_of("heun", steps) for steps in (1, 2, 4, 7, 8)] == [1, 1, 3, 7, 7]
    with pytest.raises(UserError, match="odd number of evaluations, not 4"):
        error("heun", 4)
