"""Faults of machines, storage and MLflow at moments of a run; `page.py` makes the table of results.jsonl.

`make chaos ARGS="-k 'driver and killed and upload'"` repeats a cell. CHAOS_SEED chooses
other random moments, and CHAOS_RESUME=1 leaves out cells that have passed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cells import PLAN, Undisturbed, as_json, try_cell
from moments import MOMENTS
from site_run import Site
from surroundings import has_redis

pytestmark = pytest.mark.chaos

RESULTS = Path(os.environ.get("CHAOS_RESULTS", Path(__file__).with_name("results.jsonl")))
IN_CI = {("worker killed", "step")}
"""A part for CI, of cells that have passed: `make chaos ARGS="-m chaos_ci"`."""
SEED = int(os.environ.get("CHAOS_SEED", "1"))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with pytest.MonkeyPatch.context():
        site = Site()
        yield site
        site.close()


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> Undisturbed:
    return Undisturbed(site)


def results() -> dict[tuple[str, str], dict]:
    """Each cell's latest result."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(one["fault"], one["moment"]): one for one in map(json.loads, lines)}


def keep(result: dict) -> None:
    """Put a cell's result in the place of an earlier one."""
    kept = results() | {(result["fault"], result["moment"]): result}
    RESULTS.write_text("".join(json.dumps(one) + "\n" for one in kept.values()))


@pytest.mark.parametrize(
    ("fault", "moment"),
    [
        pytest.param(fault, moment, marks=[pytest.mark.chaos_ci] if (fault, moment) in IN_CI else [])
        # One moment of each fault first, so that an interrupted table has all faults.
        for turn in range(len(MOMENTS))
        for fault, moments in PLAN.items()
        for moment in moments[turn : turn + 1]
    ],
)
def test_a_run_stands(fault: str, moment: str, request: pytest.FixtureRequest) -> None:
    known = results().get((fault, moment))
    if os.environ.get("CHAOS_RESUME") and known and not known["broken"]:
        pytest.skip("has passed")
    if fault.endswith("restarted") and not has_redis():
        pytest.skip("the head's state needs redis-server")
    outcome = try_cell(
        request.getfixturevalue("site"), fault, moment, SEED, request.getfixturevalue("undisturbed")
    )
    keep(as_json(outcome))
    print(json.dumps(as_json(outcome)), flush=True)
    assert not outcome.broken
