"""A grid runs as trials of Ray Tune, below one MLflow run, and goes on where it was ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import tiny
from fewstep.tracking.address import connect
from fewstep.workflow.ablation.cells import read_results
from fewstep.workflow.ablation.grid import load_grid
from fewstep.workflow.ablation.tuning import run_grid


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_grid_runs_is_kept_and_goes_on(
    tiny_data: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = [
        "train.steps=4",
        "evaluation.captions=4",
        "evaluation.reference_steps=4",
        "evaluation.baseline_steps=[4, 8]",
    ]
    recipe = tiny.recipe(tiny_data, tiny_teacher, *settings, f"train.storage={tmp_path}/runs")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    tree = {
        "name": "small",
        "about": "A test.",
        "base": str(tmp_path / "tiny.yaml"),
        "steps": 4,
        "seeds": [0],
        "search": {"set": {"optimizer.lr": [1e-3, 1e-4]}, "share": 0.5},
        "variants": {"plain": {"about": "the recipe"}},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    grid, folder = load_grid(str(tmp_path / "grid.yaml")), tmp_path / "results"

    results = run_grid(grid, folder, at_once=2, uri=uri)
    tried = [one for one in results.values() if one.cell.is_search]
    assert [one.steps for one in tried] == [2, 2]
    assert tried[0].figures["paired_distance"] != tried[1].figures["paired_distance"]
    assert tried[0].teacher == tried[1].teacher
    [seed] = [one for one in results.values() if not one.cell.is_search]
    assert seed.cell.found == min(tried, key=lambda one: one.figures["paired_distance"]).cell.found
    assert seed.steps == 4
    assert seed.operations > 0 < seed.hours
    assert set(seed.solvers) == {"euler_4", "euler_8"}

    client = connect(uri)
    [experiment] = client.search_experiments(filter_string="name = 'fewstep'")
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id for run in runs if run.data.tags.get("grid") == "small"}
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") in parents]
    assert len(parents) == 1
    assert {run.info.run_name for run in children} == {one.recipe["name"] for one in results.values()}
    assert all(run.info.status == "FINISHED" and "eval/captions" in run.data.metrics for run in children)

    # A cell whose file is gone is measured again, from its last checkpoint; all others are left alone.
    (folder / "small" / "plain-seed0.json").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "small").glob("*.json")}
    capfd.readouterr()
    run_grid(grid, folder, uri=uri)
    assert "1 of 1 cells to train" in capfd.readouterr().out
    again = read_results(folder, grid)
    assert again["plain-seed0"].figures == results["plain-seed0"].figures
    for name, written in before.items():
        assert (folder / "small" / name).stat().st_mtime_ns == written
    assert len(client.search_runs([experiment.experiment_id])) == len(runs), "in the same MLflow runs"
