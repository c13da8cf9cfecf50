"""Running a grid with Ray Tune: each cell is a trial, its MLflow run a child of the grid's, and its result one file.

What is done is told by the files: a grid that was ended goes on with the cells that have none, and a cell that was
ended from its last checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fewstep.errors import DivergenceError, UserError
from fewstep.evaluate.report import MethodResult
from fewstep.tracking import Tracker, spool_folder
from fewstep.tracking.run import has_run
from fewstep.tracking.version import code_version, processor, run_tags
from fewstep.train.recipe import DistillRecipe, load_recipe
from fewstep.workflow.ablation.cells import CellResult, chosen, is_done, read_results
from fewstep.workflow.ablation.grid import Cell, Grid

PARENTS = Path(".fewstep") / "grids"
"""Folder with the id of each grid's MLflow run."""
TRIAL_CPUS = 0.01
"""That a trial reserves itself: its workers reserve their own."""


def run_grid(grid: Grid, results: Path, *, at_once: int = 1, uri: str | None = None) -> dict[str, CellResult]:
    """Train and measure all cells that have no result yet, on the connected Ray cluster.

    Args:
        grid: what to run.
        results: folder whose subfolder of the grid's name gets a file of each cell.
        at_once: cells that are trained at the same time; a cluster needs room for so many.
        uri: MLflow's tracking address; the base recipe's by default.

    Returns:
        The results of all cells by name.

    Raises:
        UserError: some cells failed, for other reasons than that they diverged; all others are done by then.
    """
    changes = {} if uri is None else {"uri": uri}
    tracking = load_recipe(
        DistillRecipe, grid.base, [*grid.set, *(f"tracking.{key}={value}" for key, value in changes.items())]
    ).tracking
    known = _parent(grid, tracking.uri)
    tracker = Tracker.start(
        uri=tracking.uri, experiment=tracking.experiment, run_name=f"grid-{grid.name}",
        params=grid.model_dump(mode="json", include={"name", "base", "steps", "seeds"}),
        tags=run_tags() | {"grid": grid.name}, spool=spool_folder(), run_id=known,
    )  # fmt: skip
    changes |= {"uri": tracker.uri, "parent_run": tracker.run_id}
    with tracker:
        PARENTS.mkdir(parents=True, exist_ok=True)
        (PARENTS / f"{grid.name}.json").write_text(json.dumps({"mlflow_run": tracker.run_id}))
        _run(grid, grid.searched(), results, at_once, changes)
        found = chosen(grid, read_results(results, grid))
        _run(grid, grid.cells(found), results, at_once, changes)
        tracker.log_artifact(results / grid.name, "results")
    return read_results(results, grid)


def _parent(grid: Grid, uri: str) -> str | None:
    """Id of the grid's MLflow run, if it was begun here and still exists."""
    file = PARENTS / f"{grid.name}.json"
    known = json.loads(file.read_text())["mlflow_run"] if file.exists() else None
    return known if known is not None and has_run(uri, known) else None


def _run(grid: Grid, cells: Sequence[Cell], results: Path, at_once: int, changes: dict[str, str]) -> None:
    from ray import tune

    have = read_results(results, grid)
    missing = [cell for cell in cells if not is_done(cell, grid, have)]
    if not missing:
        return
    print(f"grid {grid.name}: {len(missing)} of {len(cells)} cells to train", flush=True)
    work = [
        {
            "cell": asdict(cell),
            "stages": [stage.model_dump(mode="json") for stage in grid.stages(cell, **changes)],
            "operations": grid.operations(cell),
        }
        for cell in missing
    ]
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    tuner = tune.Tuner(
        tune.with_resources(_train_cell, {"cpu": TRIAL_CPUS}),
        param_space={"work": tune.grid_search(work), "home": str(Path.cwd())},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once, trial_dirname_creator=_folder_name),
        run_config=tune.RunConfig(
            name=grid.name,
            storage_path=str(Path(".fewstep", "tune").absolute()),
            callbacks=[_writer(results / grid.name)],
            failure_config=tune.FailureConfig(fail_fast=False),
            verbose=0,
        ),
    )
    tuner.fit()
    have = read_results(results, grid)
    if left := [cell.name for cell in missing if not is_done(cell, grid, have)]:
        raise UserError(
            f"grid {grid.name}: {len(left)} cells failed ({', '.join(left[:5])}): their messages are above; the same "
            "command goes on with them."
        )


def _folder_name(trial: Any) -> str:
    """Of a trial's own files; Tune would make one of all settings, longer than file systems allow."""
    return str(trial.trial_id)


def _writer(folder: Path) -> Any:
    """A Tune callback that writes each result as soon as it is there."""
    from pydantic import TypeAdapter
    from ray.tune import Callback

    class Writer(Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if "fault" in result:
                print(f"{result['fault']}", flush=True)
            elif "cell_result" in result:
                done = TypeAdapter(CellResult).validate_json(result["cell_result"])
                done.save(folder)
                print(_line(done), flush=True)

    return Writer()


def _line(done: CellResult) -> str:
    told = done.failure or "  ".join(
        f"{name} {done.figures[name]:.4g}"
        for name in ("kid_teacher", "paired_distance", "diversity", "frechet", "accuracy")
        if name in done.figures
    )
    return f"{done.cell.name:<40} {done.hours:.2f} h  {told}"


def _train_cell(config: dict[str, Any]) -> None:
    """A trial: trains and measures one cell, and reports its result as text."""
    from ray import tune

    os.chdir(config["home"])  # records and exported students are below it
    cell = Cell(**{**config["work"]["cell"], "found": tuple(config["work"]["cell"]["found"])})
    stages = [DistillRecipe.model_validate(stage) for stage in config["work"]["stages"]]
    try:
        result = measure_cell(cell, stages, config["work"]["operations"])
    except UserError as error:
        # As text: Tune would print the traceback three times.
        tune.report({"fault": f"{stages[-1].name}: {error}"})
    else:
        tune.report({"cell_result": json.dumps(asdict(result))})


def measure_cell(cell: Cell, stages: Sequence[DistillRecipe], operations: int) -> CellResult:
    """Train and measure one cell on the connected Ray cluster; goes on with runs of its stages' names.

    Args:
        cell: which one.
        stages: the recipes that are trained one after another; the last one's student is measured.
        operations: of all of them.

    Raises:
        UserError: see `fit` and `evaluate`; but a training that diverges is a result.
    """
    from fewstep.student import read_student_card
    from fewstep.train.trainer import fit
    from fewstep.workflow.evaluation import evaluate, held_out
    from fewstep.workflow.training_metrics import training_hours, training_losses

    recipe, hours = stages[-1], 0.0

    def result(report: Any, failure: str | None = None) -> CellResult:
        by_name = {} if report is None else {row.name: _figures(row) for row in report.rows}
        return CellResult(
            cell=cell,
            recipe=recipe.model_dump(mode="json"),
            version=str(code_version()),
            machine=processor(),
            steps=recipe.train.steps,
            operations=operations,
            hours=round(hours, 4),
            figures=by_name.pop(report.student) if report else {},
            teacher=by_name.pop(report.teacher) if report else {},
            solvers={name: row for name, row in by_name.items() if not name.startswith("student_")},
            captions=report.captions if report else 0,
            failure=failure,
        )

    for stage in stages:
        try:
            trained = fit(stage, stage.name)
        except DivergenceError as error:
            return result(None, str(error))
        hours += training_hours(training_losses(stage.tracking.uri, trained.mlflow_run)) or 0.0
    folder = Path("out") / recipe.name
    batch = held_out(read_student_card(trained.folder), recipe.data.path, recipe.evaluation.captions)
    report = evaluate(trained.folder, batch, recipe.evaluation, folder, gpu=recipe.train.gpu)
    tracker = Tracker.start(
        uri=recipe.tracking.uri, experiment=recipe.tracking.experiment, run_name=recipe.name,
        params={}, tags={}, spool=spool_folder(), run_id=trained.mlflow_run,
    )  # fmt: skip
    with tracker:
        tracker.log_metrics(report.metrics(), recipe.train.steps)
        tracker.log_artifact(folder, "results")
    return result(report)


def _figures(row: MethodResult) -> dict[str, float]:
    """The figures that a result has, rounded to what is meaningful."""
    known = {field.name for field in fields(MethodResult)}
    return {
        name: float(f"{value:.6g}")
        for name in sorted(known)
        if isinstance(value := getattr(row, name), (int, float)) and name != "name"
    }
