"""Runs that turn to noise on Ray: they stop, go back or are only told of, as the recipe says."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ray.train import Checkpoint
from safetensors.torch import load_file

import tiny
from fewstep.data.schema import encode_table
from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.tracking.address import connect
from fewstep.train.checkpoint import TrainState
from fewstep.train.preview import BestStudent
from fewstep.train.setbacks import SETBACKS, go_back, read_setbacks
from fewstep.train.trainer import _fetch_export, fit
from fewstep.train.watch import keep_best

WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoilt(data: Path, copy: Path, rows: slice, value: float) -> Path:
    """A copy of a dataset, in whose second training shard the latents of some rows have this value."""
    shutil.copytree(data, copy)
    shard = sorted(copy.rglob("train/*/*.parquet"))[1]
    table = pq.read_table(shard)
    latents = np.random.default_rng(1).uniform(-1, 1, (len(table), *tiny.SHAPE)).astype(np.float32)
    latents[rows] = value
    table = encode_table(table, latents, tiny.SHAPE, "train").replace_schema_metadata(table.schema.metadata)
    pq.write_table(table, shard)
    return copy


def run_of(home: Path):
    """MLflow's client and its only run."""
    client = connect(f"sqlite:///{home / 'mlflow.db'}")
    [run] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return client, run


def states(run: Path) -> dict[int, dict]:
    """Step → the state in each checkpoint of a run."""
    found = [json.loads(file.read_text()) for file in run.glob("step-*/state.json")]
    return {state["step"]: state for state in found}


def test_a_run_goes_back_finishes_and_is_resumed_bit_for_bit(tiny_data, tiny_teacher, home, capfd) -> None:
    # The rate rises until the run diverges, sooner or later, as the arithmetic of the CPU has it.
    settings = [
        "train.steps=80", "train.log_every=1", "train.checkpoint_every=2", "optimizer.lr=1",
        "optimizer.warmup_steps=100", "optimizer.decay=none", "health.lr_factor=0.001", "evaluation.every=8",
        "train.keep_checkpoints=50",
    ]  # fmt: skip
    wanted = tiny.recipe(tiny_data, tiny_teacher, *settings)
    trained = fit(wanted, "run")
    said = capfd.readouterr().out
    [setback] = json.loads((home / "runs" / "run" / SETBACKS).read_text())
    assert 2 < setback["found"] <= 200
    assert 2 <= setback["back_to"] < setback["found"]
    assert f"health: {setback['reason']}" in said
    assert re.search(
        rf"went back once, the last time from step {setback['found']} to the checkpoint of", said
    )
    assert f"resumed from the checkpoint of step {setback['back_to']}" in said
    client, run = run_of(home)
    assert run.info.status == "FINISHED"
    assert run.data.tags["health.finding"] == setback["reason"]
    assert run.data.tags["health.times_back"] == "1"
    rates = client.get_metric_history(run.info.run_id, "train/learning_rate")
    assert rates[-1].value == pytest.approx(0.001 * 80 / 100)
    measured = {
        point.step for point in client.get_metric_history(run.info.run_id, "held_out/paired_distance")
    }
    assert {8, 80} <= measured

    kept = states(home / "runs" / "run")
    assert kept[80]["best"]["step"] in measured
    assert len(kept[80]["best"]["distances"]) == tiny.ROWS
    assert len(kept[80]["health"]["bands"]) > 3
    expected = load_file(home / trained.folder / WEIGHTS)
    begin = setback["back_to"]
    for folder in home.glob("runs/run/step-*"):
        if json.loads((folder / "state.json").read_text())["step"] > begin:
            shutil.rmtree(folder)  # as if the run had been killed there
    again = fit(wanted, "run")
    assert f"resumed from the checkpoint of step {begin}" in capfd.readouterr().out
    resumed = states(home / "runs" / "run")[80]
    assert (resumed["health"], resumed["best"]) == (kept[80]["health"], kept[80]["best"])
    for name, tensor in load_file(home / again.folder / WEIGHTS).items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.isfinite().all(), name


@pytest.mark.slow
def test_a_row_that_is_no_latent_stops_all_workers_and_is_named(tiny_data, tiny_teacher, home, capfd) -> None:
    data = spoilt(tiny_data, home / "spoilt", slice(3, 4), np.nan)
    wanted = tiny.recipe(
        data, tiny_teacher, "train.steps=200", "train.log_every=2", "train.workers=2", "train.parallel=ddp",
        "health.go_back_times=1",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"diverged again, after it had gone back once: .*infinite or NaN"
    ) as caught:
        fit(wanted, "run")
    assert "rows of the data that are no latents: train-1-3: lower optimizer.lr" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert json.loads((home / "runs" / "run" / SETBACKS).read_text())[0]["found"] <= 10
    assert run_of(home)[1].info.status == "FAILED"


def test_a_shard_of_garbage_is_told_and_the_run_goes_on_where_the_recipe_says_so(
    tiny_data, tiny_teacher, home, capfd
) -> None:
    data = spoilt(tiny_data, home / "spoilt", slice(None), 1e3)
    fit(tiny.recipe(data, tiny_teacher, "train.steps=3", "health.on_divergence=warn"), "run")
    said = capfd.readouterr().out
    assert len(re.findall(r"health: .* training latent is 1000 at step 1.*: train-1-", said)) == 1
    assert run_of(home)[1].info.status == "FINISHED"
    assert 3 in states(home / "runs" / "run"), "checkpoints are made all the same"
    assert not (home / "runs" / "run" / SETBACKS).exists()


def test_the_best_student_is_fetched_where_the_last_checkpoint_names_it(tmp_path: Path) -> None:
    last, run = tmp_path / "run" / "step-0000010-abcd", Storage.at(tmp_path / "run")
    state = {"step": 10, "seed": 0, "mlflow_run": "id", "best": {"step": 5, "distances": [1.0, 2.0]}}
    run.write(f"{last.name}/state.json", json.dumps(state).encode())
    run.write(f"{last.name}/export/{WEIGHTS}", b"last")
    folder, checkpoint = tmp_path / "fetched", Checkpoint.from_directory(last)
    _fetch_export(checkpoint, folder, run)
    assert (folder / WEIGHTS).read_bytes() == b"last", "the best is gone: better the last than none"
    for step in (3, 5):
        export = tmp_path / f"export-{step}"
        export.mkdir()
        (export / WEIGHTS).write_bytes(f"best of {step}".encode())
        keep_best(run, export, BestStudent(step, [1.0, 2.0]), set())
    assert sorted(path for path in run.list() if path.startswith("best")) == [f"best-0000005/{WEIGHTS}"]
    _fetch_export(checkpoint, folder, run)
    assert (folder / WEIGHTS).read_bytes() == b"best of 5"


def test_a_run_that_comes_to_no_new_checkpoint_goes_further_back(tmp_path: Path) -> None:
    run = Storage.at(tmp_path / "run")
    for step in (2, 4):
        state = TrainState(step, 0, "id", ranks=1)
        run.write(f"step-{step:07d}-abcd/state.json", json.dumps(asdict(state)).encode())
        run.write(f"step-{step:07d}-abcd/manifest-0.json", b"{}")
    assert go_back(run, 9, "noise").back_to == 4
    assert go_back(run, 8, "noise again").back_to == 2
    assert go_back(run, 7, "and again").back_to == 2, "the only one is kept"
    assert [one.found for one in read_setbacks(run)] == [9, 8, 7]
    run.write(SETBACKS, b"[{")
    with pytest.raises(UserError, match=r"setbacks.json can't be read: delete it"):
        read_setbacks(run)
