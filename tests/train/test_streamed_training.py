"""Training on rows that are encoded on the way: the very run that encoded shards give, whatever dies."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny
from fewstep.data.prepare import PreparationConfig, prepare
from fewstep.data.schema import DatasetInfo
from fewstep.data.sources import image_folder
from fewstep.images import Size
from fewstep.tracking.address import connect
from fewstep.train.trainer import fit
from processes import ENCODER, kill_one

STEPS = 48
KILLS = (4, 16, 28)
"""Steps whose checkpoints are followed by the death of an encoder."""
# Small shards, so that what is read ahead is not all that the run needs.
SMALL = PreparationConfig(sizes=(Size(8, 8),), shard_rows=4, least_shards=1)


@pytest.fixture(scope="module")
def both(ray_cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, DatasetInfo]:
    """Photos as encoded shards, and as raw rows."""
    home, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    with (home / "metadata.jsonl").open("w") as table:
        for number in range(40):
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(home / f"{number}.png")
            text = f"a {'very ' * (number % 4)}small cat {number}"
            print(json.dumps({"file_name": f"{number}.png", "text": text}), file=table)
    source = image_folder(str(home), held_out=0.1)
    return {
        kind: prepare(source, tmp_path_factory.mktemp(kind), SMALL, encode=kind == "shards")
        for kind in ("shards", "stream")
    }


def train(
    info: DatasetInfo, teacher: Path, home: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """Train in a folder; returns the loss of each step, and the model."""
    home.mkdir()
    monkeypatch.chdir(home)
    recipe = tiny.recipe(info.root, teacher, f"train.steps={STEPS}", *overrides)
    trained = fit(recipe)
    points = connect(f"sqlite:///{home / 'mlflow.db'}").get_metric_history(trained.mlflow_run, "train/loss")
    assert len(points) == STEPS
    model = load_file(home / trained.folder / "diffusion_pytorch_model.safetensors")
    return {point.step: point.value for point in points}, model


def assert_equal(ours, theirs) -> None:
    """Losses and models, bit for bit."""
    assert ours[0] == theirs[0]
    for name, tensor in theirs[1].items():
        assert torch.equal(ours[1][name], tensor), name


@pytest.fixture(scope="module")
def from_shards(both, tiny_teacher, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield train(both["shards"], tiny_teacher, tmp_path_factory.mktemp("home") / "run", monkeypatch)


class EncoderKiller(threading.Thread):
    """SIGKILLs an encoder after each of some checkpoints; `killed` counts those that were there to be killed."""

    def __init__(self, home: Path) -> None:
        super().__init__(daemon=True)
        self.killed, self._home, self.ended = 0, home, threading.Event()

    def run(self) -> None:
        for step in KILLS:
            while not any(int(p.name.split("-")[1]) >= step for p in self._home.glob("runs/*/step-*")):
                if self.ended.is_set():
                    return
                time.sleep(0.02)
            self.killed += kill_one(ENCODER)


@pytest.mark.slow
def test_a_run_from_raw_rows_whose_encoders_die_is_that_from_shards(
    both, tiny_teacher, from_shards, tmp_path, monkeypatch
) -> None:
    killer = EncoderKiller(tmp_path / "run")
    killer.start()
    ours = train(both["stream"], tiny_teacher, tmp_path / "run", monkeypatch, "data.encode=stream")
    killer.ended.set()
    killer.join()
    assert killer.killed == len(KILLS)
    assert_equal(ours, from_shards)
