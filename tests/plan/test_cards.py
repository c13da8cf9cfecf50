"""The published table of cards is what the plans say."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.plan.cards import TEACHERS, rows

ROOT = Path(__file__).parents[2]
PAGE, SHORT = ROOT / "docs" / "gpus.md", ROOT / "README.md"
"""The second has some of the teachers."""

QUICK = ("FLUX.2 klein (4 B)",)
"""Of few blocks; plans of the others take up to a minute each."""


@pytest.mark.parametrize(
    "teacher", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in TEACHERS]
)
def test_the_published_table_is_that_of_the_plans(teacher: str) -> None:
    """Anew after a change: `python -m fewstep.plan.cards`."""
    planned = rows({teacher: TEACHERS[teacher]})
    for page in (PAGE, SHORT):
        lines = [line for line in page.read_text().splitlines() if line.startswith(f"| {teacher}: ")]
        if page == PAGE or lines:
            assert [line.strip("| ").split(" | ") for line in lines] == planned, page
