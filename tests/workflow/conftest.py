"""A dataset of random images for the bundled emoji student, and evaluations without a Ray cluster and networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewstep.data.columns import condition_columns
from fewstep.data.schema import DatasetInfo, Encoding, Shard, bucket_folder, encode_table
from fewstep.encoders import load_encoder
from fewstep.storage import Storage

SHAPE, ROWS = (3, 16, 16), 12


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of training rows and one of held-out rows."""
    root = tmp_path_factory.mktemp("data")
    rng, encoding, shards = np.random.default_rng(0), Encoding("minilm", 384, "pixel"), []
    captions = [f"red thing {row}, noto style" for row in range(ROWS)]
    columns = condition_columns(load_encoder("minilm").encode(captions))
    for split in ("train", "held_out"):
        keys = [f"{split}-{row}" for row in range(ROWS)]
        latents = rng.uniform(-1, 1, (ROWS, *SHAPE)).astype(np.float32)
        rows = pa.table({"key": keys, "caption": captions, **columns})
        table = encode_table(rows, latents, SHAPE, split).replace_schema_metadata(encoding.metadata())
        path = f"{bucket_folder(split, SHAPE)}/part-00000.parquet"
        (root / path).parent.mkdir(parents=True)
        pq.write_table(table, root / path)
        shards.append(Shard(path, split, SHAPE, ROWS))
    DatasetInfo(Storage.at(root), encoding, "tests", True, tuple(shards)).save()
    return root


class FakeImages:
    """In place of `generate_images`: random images, each of the sizes that were asked for, and what was asked."""

    def __init__(self) -> None:
        self.methods = []

    def __call__(self, student, batch, methods, *, seed=0, gpu=False, precisions=None):
        self.methods = list(methods)
        rng, (_, height, width) = np.random.default_rng(seed), batch.shape
        size = (len(batch), height, width, 3)
        return {method.name: rng.integers(0, 256, size, dtype=np.uint8) for method in methods}


class MeanColours:
    """In place of the feature network, which takes seconds for as many images."""

    name = "mean colours"

    def __init__(self, spec, device):
        pass

    def features(self, images):
        return images.mean(axis=(1, 2)).astype(np.float32)


@pytest.fixture
def fake_images(monkeypatch: pytest.MonkeyPatch) -> FakeImages:
    fake = FakeImages()
    monkeypatch.setattr("fewstep.workflow.evaluation.generate_images", fake)
    monkeypatch.setattr(
        "fewstep.workflow.evaluation.measure_trajectories",
        lambda student, batch, steps, students, baseline, **how: {
            **{f"student_{nfe}": [(0.5, 0.1), (0.0, 0.2)] for nfe in students},
            **{f"euler_{steps}": [(0.5, 0.2), (0.0, 0.4)] for steps in baseline},
        },
    )
    monkeypatch.setattr("fewstep.workflow.evaluation.load_features", MeanColours)
    return fake
