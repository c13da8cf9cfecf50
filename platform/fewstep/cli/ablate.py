"""`fewstep ablate`: variants of a recipe, on equal compute, with several seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from fewstep.cli.common import number

DESCRIPTION = """\
Train and measure the variants of a grid, each on the same number of operations and with several seeds, as trials of Ray
Tune on the connected cluster; their MLflow runs stand below the grid's. What is done is kept as one file of each
training, so that the same command goes on where it was ended. Ends with a page that judges the grid's claims."""
EXAMPLES = """\
examples
  {program} --grid fashion_1nfe --dry-run
  {program} --grid fashion_1nfe
  {program} --grid emoji_4nfe --at-once 8 --results /shared/results
  {program} --grid fashion_1nfe --grid emoji_4nfe --only-page --results docs/comparison --page docs/comparison.md"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--grid", action="append", required=True, help="name of a grid, or its YAML file; may be repeated"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("out/grids"), metavar="FOLDER",
        help="where result files are and go; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--page", type=Path, default=Path("out/comparison.md"), metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "--at-once",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="trainings at a time; default: %(default)s",
    )
    parser.add_argument("--tracking-uri", help="MLflow's address; default: the recipe's")
    parser.add_argument(
        "--only-page", action="store_true", help="train nothing: write the page of what is there"
    )
    parser.add_argument("--dry-run", action="store_true", help="train nothing: list what there is to train")


def run(options: argparse.Namespace) -> None:
    """Train what is missing, and write the page.

    Raises:
        UserError: there is no such grid, a setting is wrong, or trainings failed.
    """
    from fewstep.workflow.ablation.cells import chosen, is_done, read_results
    from fewstep.workflow.ablation.grid import load_grid
    from fewstep.workflow.ablation.page import results_page

    grids = [load_grid(name) for name in options.grid]
    if options.dry_run:
        for grid in grids:
            have = read_results(options.results, grid)
            found = {variant: grid.tries(variant)[0] for variant in grid.variants} | chosen(grid, have)
            for cell in [*grid.searched(), *grid.cells(found)]:
                state = "done" if is_done(cell, grid, have) else ""
                print(f"{cell.run_name:<52}{grid.recipe(cell).train.steps:>8} steps  {state}")
        return
    if not options.only_page:
        from fewstep.cluster import connect_ray
        from fewstep.workflow.ablation.tuning import run_grid

        connect_ray()
        for grid in grids:
            run_grid(grid, options.results.absolute(), at_once=options.at_once, uri=options.tracking_uri)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(results_page(grids, options.results))
    print(f"page  {options.page.absolute()}")
