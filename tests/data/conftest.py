"""Small datasets to read, without a cluster, and an S3 server to keep them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewstep.data.schema import DatasetInfo, Encoding, Shape, Shard, bucket_folder, encode_table
from fewstep.data.storage import Storage

TOKEN_DIM = 4

MakeDataset = Callable[..., DatasetInfo]


def latent_of(key: str, shape: Shape) -> np.ndarray:
    """The latent that a row of `make_dataset` holds."""
    return np.full(shape, int(key.rpartition("-")[2]), dtype=np.float32)


def write_shard(storage: Storage, path: str, keys: list[str], shape: Shape, split: str) -> Shard:
    tokens = [
        np.full((2 + i % 3, TOKEN_DIM), int(k.rpartition("-")[2]) % 7, np.float16) for i, k in enumerate(keys)
    ]
    rows = pa.table({"key": keys, "caption": [f"caption of {key}" for key in keys]})
    latents = np.stack([latent_of(key, shape) for key in keys])
    table = encode_table(rows, tokens, latents, shape, split)
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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://…` of a fresh bucket on that server, the usual variables pointing there."""
    import uuid

    import boto3

    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"
