"""Comparisons of recipes: a grid of variants and seeds, trained on equal compute and measured alike.

`grid` says what is compared, `cells` keeps what each training came to, `tuning` runs them with Ray Tune, `claims`
judges what the grid claims, and `page` tells it all.
"""

from fewstep.workflow.ablation.cells import CellResult, read_results
from fewstep.workflow.ablation.grid import Cell, Grid, load_grid

__all__ = ["Cell", "CellResult", "Grid", "load_grid", "read_results"]
