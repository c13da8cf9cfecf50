"""Small datasets to read, without a cluster, and an S3 server to keep them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fewstep.config import Shape
from fewstep.data.columns import condition_columns
from fewstep.data.schema import DatasetInfo, Encoding, Shard, bucket_folder, encode_table
from fewstep.models.conditioning import TextConditioning
from fewstep.storage import Storage

TOKEN_DIM = 4

MakeDataset = Callable[..., DatasetInfo]


def latent_of(key: str, shape: Shape) -> np.ndarray:
    """The latent that a row of `make_dataset` holds."""
    return np.full(shape, int(key.rpartition("-")[2]), dtype=np.float32)


def write_shard(storage: Storage, path: str, keys: list[str], shape: Shape, split: str) -> Shard:
    texts = [
        TextConditioning.collate([torch.full((2 + i % 3, TOKEN_DIM), float(int(key.rpartition("-")[2]) % 7))])
        for i, key in enumerate(keys)
    ]
    captions = [f"caption of {key}" for key in keys]
    rows = pa.table({"key": keys, "caption": captions, **condition_columns(texts)})
    latents = np.stack([latent_of(key, shape) for key in keys])
    table = encode_table(rows, latents, shape, split)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(Encoding("none", TOKEN_DIM, "pixel").metadata()), sink)
    storage.write(path, memoryview(sink.getvalue()))
    return Shard(path, split, shape, len(keys))


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """A function that writes a dataset: rows of each shard, by latent shape."""

    def make(shards: dict[Shape, list[int]], split: str = "train", name: str = "dataset") -> DatasetInfo:
        storage = Storage.at(tmp_path / name)
        made, number = [], 0
        for shape, counts in shards.items():
            for part, count in enumerate(counts):
                keys = [f"row-{number + i}" for i in range(count)]
                number += count
                path = f"{bucket_folder(split, shape)}/part-{part:05d}.parquet"
                made.append(write_shard(storage, path, keys, shape, split))
        info = DatasetInfo(storage, Encoding("none", TOKEN_DIM, "pixel"), "test", True, tuple(made))
        info.save()
        return info

    return make
