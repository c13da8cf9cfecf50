"""The page of comparisons is what its committed result files say."""

from __future__ import annotations

from pathlib import Path

from fewstep.workflow.ablation.cells import read_results
from fewstep.workflow.ablation.grid import load_grid
from fewstep.workflow.ablation.page import results_page

DOCS = Path(__file__).parents[2] / "docs"
GRIDS = ("emoji_methods",)


def test_the_page_is_that_of_its_result_files() -> None:
    """Anew: `fewstep ablate --grid emoji_methods --only-page --results docs/comparison --page docs/comparison.md`."""
    grids = [load_grid(name) for name in GRIDS]
    assert (DOCS / "comparison.md").read_text() == results_page(grids, DOCS / "comparison")
    for grid in grids:
        trained = {one.cell.variant for one in read_results(DOCS / "comparison", grid).values()}
        assert trained == set(grid.variants), "every method has been trained"
