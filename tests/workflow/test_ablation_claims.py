"""Claims are judged by the interval of the difference over seeds, and by who diverged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from scipy import stats

from fewstep.workflow.ablation.cells import CellResult
from fewstep.workflow.ablation.claims import difference, judge
from fewstep.workflow.ablation.grid import Cell, Claim, Grid
from fewstep.workflow.ablation.page import results_page
from workflow.test_ablation_grid import grid, result


def results(
    small: Grid, plain: list[float], other: list[float], figure: str = "kid_teacher"
) -> dict[str, CellResult]:
    cells = {}
    for variant, found in (("plain", plain), ("four_states", other)):
        for seed, value in enumerate(found):
            cell = Cell("small", variant, seed)
            cells[cell.name] = result(cell, small, **{figure: value})
    return cells


def claim(expect: str, figure: str = "kid_teacher") -> Claim:
    return Claim.model_validate(
        {
            "claim": "c",
            "paper": "p",
            "variant": "four_states",
            "against": "plain",
            "figure": figure,
            "expect": expect,
        }
    )


def test_the_interval_is_that_of_a_paired_t_test(tmp_path: Path) -> None:
    plain, other = [5.0, 7.0, 6.5], [4.2, 6.1, 5.0]
    gap = difference(results(grid(tmp_path), plain, other), "four_states", "plain", "kid_teacher")
    interval = stats.ttest_rel(other, plain).confidence_interval(0.95)
    assert gap is not None
    assert (gap.low, gap.high) == pytest.approx((interval.low, interval.high))
    assert gap.seeds == 3


@pytest.mark.parametrize(
    ("other", "figure", "expect", "verdict"),
    [
        ([4.0, 6.0, 5.6], "kid_teacher", "better", "agrees"),  # lower is better
        ([4.0, 6.0, 5.6], "kid_teacher", "worse", "disagrees"),
        ([4.0, 6.0, 5.6], "diversity", "better", "disagrees"),  # higher is
        ([4.0, 8.0, 6.5], "kid_teacher", "better", "open"),
        ([5.01, 7.0, 6.51], "kid_teacher", "equal", "agrees"),
        ([9.0, 11.0, 10.4], "kid_teacher", "equal", "disagrees"),
        ([4.0, 8.0, 6.5], "kid_teacher", "equal", "open"),
        ([4.0], "kid_teacher", "better", "open"),  # a single seed has no interval
        ([], "kid_teacher", "better", "open"),
    ],
)
def test_verdicts(tmp_path: Path, other: list[float], figure: str, expect: str, verdict: str) -> None:
    measured = results(grid(tmp_path), [5.0, 7.0, 6.5], other, figure)
    assert judge(claim(expect, figure), measured).verdict == verdict


def test_a_training_that_diverges_is_worse(tmp_path: Path) -> None:
    measured = results(grid(tmp_path), [5.0, 7.0], [4.0, 6.0])
    name = "four_states-seed1"
    measured[name] = dataclasses.replace(measured[name], figures={}, failure="diverged")
    told = judge(claim("better"), measured)
    assert told.diverged == (1, 0)
    assert told.verdict == "disagrees"


def test_the_page_tells_figures_verdicts_and_commands(tmp_path: Path) -> None:
    small = grid(tmp_path)
    for one in results(small, [5.0, 7.0, 6.5], [4.0, 6.0, 5.6]).values():
        one.save(tmp_path / "results" / "small")
    for cell, value in zip(small.searched(), (1.0, 2.0, 4.0, 3.0), strict=True):
        result(cell, small, kid_teacher=value).save(tmp_path / "results" / "small")
    page = results_page([small], tmp_path / "results")
    assert "| four_states | more | 10 | 0.50 | 5.20 ± 1.06 |" in page
    assert "**agrees**" in page
    assert "**optimizer.lr=0.002: 3.00**" in page
    assert "--set imitation.intermediate_states=4 --set optimizer.lr=0.002 --set train.steps=10" in page
    assert "| euler_4 | 8 |" in page


def test_a_grid_without_results_says_how_to_get_them(tmp_path: Path) -> None:
    assert "fewstep ablate --grid small" in results_page([grid(tmp_path)], tmp_path)
