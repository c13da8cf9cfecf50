"""What a grid's claims came to: differences of two variants over seeds, with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fewstep.evaluate.figures import FIGURES
from fewstep.workflow.ablation.cells import CellResult, values
from fewstep.workflow.ablation.grid import Claim

Verdict = Literal["agrees", "disagrees", "open"]
"""Whether what was measured here agrees with the paper; open where the seeds differ more than the variants."""


@dataclass(frozen=True)
class Difference:
    """A figure of one variant minus that of another, of the seeds that both were trained with."""

    mean: float
    """Over seeds."""
    low: float
    """Lower end of the 95 % interval; minus infinity for a single seed."""
    high: float
    """Its upper end."""
    other: float
    """Mean of the other variant's figure, for scale."""
    seeds: int
    """How many."""


@dataclass(frozen=True)
class ClaimResult:
    """A claim and what it came to."""

    claim: Claim
    difference: Difference | None
    """None while no seed of both is there."""
    diverged: tuple[int, int]
    """Seeds in which the variant's training diverged, and the other's."""
    verdict: Verdict


def judge(claim: Claim, results: dict[str, CellResult]) -> ClaimResult:
    """Compare the two variants of a claim.

    Args:
        claim: what is claimed.
        results: of the grid's cells, by name.
    """
    diverged = tuple(
        sum(
            1
            for one in results.values()
            if one.cell.variant == name and one.failure is not None and not one.cell.is_search
        )
        for name in (claim.variant, claim.against)
    )
    gap = difference(results, claim.variant, claim.against, claim.figure)
    return ClaimResult(claim, gap, (diverged[0], diverged[1]), _verdict(claim, gap, diverged))


def difference(results: dict[str, CellResult], variant: str, against: str, figure: str) -> Difference | None:
    """A figure of one variant minus the other's, paired by seed, with Student's t interval; None without a pair.

    Seeds share data order and noise, so that part of what they do to a figure cancels.
    """
    from scipy import stats

    mine, theirs = values(results, variant, figure), values(results, against, figure)
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    gaps = np.array([mine[seed] - theirs[seed] for seed in seeds])
    mean, half = float(gaps.mean()), math.inf
    if len(seeds) > 1:
        half = float(stats.t.ppf(0.975, len(seeds) - 1) * gaps.std(ddof=1) / math.sqrt(len(seeds)))
    return Difference(
        mean, mean - half, mean + half, float(np.mean([theirs[seed] for seed in seeds])), len(seeds)
    )


def _verdict(claim: Claim, gap: Difference | None, diverged: tuple[int, ...]) -> Verdict:
    # A training that diverged is worse than any that did not, whatever the figures of the others.
    if diverged[0] != diverged[1]:
        found = "worse" if diverged[0] > diverged[1] else "better"
        return "agrees" if found == claim.expect else "disagrees"
    if gap is None:
        return "open"
    if claim.expect == "equal":
        allowed = claim.tolerance * abs(gap.other)
        if -allowed <= gap.low and gap.high <= allowed:
            return "agrees"
        return "disagrees" if gap.low > allowed or gap.high < -allowed else "open"
    if gap.low <= 0 <= gap.high:
        return "open"
    found = "better" if (gap.high < 0) == (FIGURES[claim.figure].better == "lower") else "worse"
    return "agrees" if found == claim.expect else "disagrees"
