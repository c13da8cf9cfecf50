"""A teacher and a dataset small enough to train on in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fewstep.data.columns import condition_columns
from fewstep.data.schema import DatasetInfo, Encoding, Shard, bucket_folder, encode_table
from fewstep.encoders import load_encoder
from fewstep.models.registry import get_family
from fewstep.models.teacher import TeacherCard, save_teacher
from fewstep.storage import Storage

SHAPE = (3, 8, 8)
SHARDS, ROWS = 4, 10


def write_teacher(folder: Path) -> None:
    """A Qwen-Image network in shape, with random weights."""
    torch.manual_seed(0)
    transformer = get_family("qwen_image").build(
        {"patch_size": 2, "in_channels": 12, "out_channels": 3, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 384, "axes_dims_rope": [8, 4, 4]}
    )  # fmt: skip
    card = TeacherCard("qwen_image", "minilm", "pixel", SHAPE, shift=2.0, guidance_scale=2.0)
    save_teacher(transformer, card, folder, transformer.state_dict())


def write_data(root: Path) -> None:
    """SHARDS training shards of ROWS rows and one held-out shard, real captions, random images."""
    storage, rng = Storage.at(root), np.random.default_rng(0)
    encoding, encoder, shards = Encoding("minilm", 384, "pixel"), load_encoder("minilm"), []
    for split, count in (("train", SHARDS), ("held_out", 1)):
        for index in range(count):
            keys = [f"{split}-{index}-{row}" for row in range(ROWS)]
            captions = [f"{'very ' * (row % 3)}small thing {row}" for row in range(ROWS)]
            latents = rng.uniform(-1, 1, (ROWS, *SHAPE)).astype(np.float32)
            columns = condition_columns(encoder.encode(captions))
            rows = pa.table({"key": keys, "caption": captions, **columns})
            table = encode_table(rows, latents, SHAPE, split).replace_schema_metadata(encoding.metadata())
            path = f"{bucket_folder(split, SHAPE)}/part-{index:05d}.parquet"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, root / path)
            shards.append(Shard(path, split, SHAPE, ROWS))
    DatasetInfo(storage, encoding, "tests", True, tuple(shards)).save()
