"""What a cell's training came to, as one JSON file of each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fewstep.errors import UserError
from fewstep.evaluate.figures import FIGURES
from fewstep.storage import Storage
from fewstep.train.recipe import DistillRecipe, load_recipe
from fewstep.workflow.ablation.grid import Cell, Grid, digest


@dataclass(frozen=True)
class CellResult:
    """A cell that was trained and measured, or that diverged."""

    cell: Cell
    """Which one."""
    recipe: dict[str, Any]
    """With all settings."""
    version: str
    """Of fewstep."""
    machine: str
    """On which it was trained."""
    steps: int
    """Optimizer steps."""
    operations: int
    """Of the networks in the training, as the plan counts them."""
    hours: float
    """Of the training; of all its processes from first to last step, where nothing else ran."""
    figures: dict[str, float]
    """The student's figures, as fields of `MethodResult`; none where training diverged."""
    teacher: dict[str, float]
    """The reference's figures; none likewise."""
    solvers: dict[str, dict[str, float]]
    """Name of each of the teacher's few-step results → its figures."""
    captions: int
    """On how many captions they were measured."""
    failure: str | None = None
    """How the training failed; None where it did not."""

    def save(self, folder: Path) -> None:
        """Write the file, whole or not at all."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True)
        Storage.at(folder).write(f"{self.cell.name}.json", (text + "\n").encode())


def read_results(folder: Path, grid: Grid) -> dict[str, CellResult]:
    """The results of a grid's cells by name, of those that a folder has.

    Raises:
        UserError: a file is not one of these.
    """
    results = {}
    for file in sorted((folder / grid.name).glob("*.json")):
        try:
            result = TypeAdapter(CellResult).validate_json(file.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{file} is no result of a cell: {error.errors()[0]['msg']}: delete it."
            ) from None
        results[result.cell.name] = result
    return results


def is_done(cell: Cell, grid: Grid, results: dict[str, CellResult]) -> bool:
    """Whether a cell has a result of the recipe that the grid has for it now."""
    result = results.get(cell.name)
    if result is None or result.cell != cell:
        return False
    try:
        trained = load_recipe(DistillRecipe, result.recipe)
    except UserError:  # of an older version, which can't be read any more
        return False
    return digest(trained) == digest(grid.recipe(cell))


def chosen(grid: Grid, results: dict[str, CellResult]) -> dict[str, tuple[str, ...]]:
    """Variant → the settings with the best figure of the search, for variants whose search is complete."""
    if grid.search is None or not grid.searched():
        return {variant: grid.tries(variant)[0] for variant in grid.variants}
    figure = grid.search.figure
    sign = 1 if FIGURES[figure].better == "lower" else -1
    found = {}
    for variant in grid.variants:
        tried = [results.get(cell.name) for cell in grid.searched() if cell.variant == variant]
        whole = [one for one in tried if one is not None]
        if len(whole) < len(tried) or all(one.failure is not None for one in whole):
            continue
        best = min((one for one in whole if one.failure is None), key=lambda one: sign * one.figures[figure])
        found[variant] = best.cell.found
    return found


def values(results: dict[str, CellResult], variant: str, figure: str) -> dict[int, float]:
    """Seed → a figure of a variant's students, of those that were trained to the end and have it."""
    return {
        one.cell.seed: one.figures[figure]
        for one in results.values()
        if one.cell.variant == variant and not one.cell.is_search and figure in one.figures
    }
