"""`fewstep benchmark stream`: what a training worker can be fed with, beside reading the same files."""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from fewstep.benchmarks.measure import aligned, log_to_mlflow, machine
from fewstep.config import Shape
from fewstep.data.stream_config import Reading
from fewstep.models.conditioning import TextConditioning

if TYPE_CHECKING:
    from fewstep.data.schema import DatasetInfo
    from fewstep.data.stream import Batch

DESCRIPTION = """\
Read a dataset of random samples of real sizes as a training worker does, in batches, in turns with pyarrow's own
reading of the same files, one after the other, which makes no batches. The default is Qwen-Image at a megapixel: 256
tokens of
3,584 numbers and latents of 16x128x128."""

EXAMPLES = """\
reading the table
  Times are medians of turns; each turn of the stream begins anew, and counts from its second batch on. The files are
  read from memory where the system has kept them since they were written.

examples
  {program}
  {program} --root s3://bucket/try --samples 256"""


WAYS = {
    "pyarrow, one file after the other": "pyarrow",
    "stream, read by Ray Data's tasks": "tasks",
    "stream, read by the worker's threads": "threads",
    "the same, as float32 (CPUs)": "float32",
}
"""Of the table's rows, with their names in metrics."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--root", help="where the samples are written; default: a folder that is deleted then"
    )
    parser.add_argument("--samples", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--shard-rows", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=256, help="of a caption; default: %(default)s")
    parser.add_argument("--width", type=int, default=3584, help="of token states; default: %(default)s")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(16, 128, 128), help="of latents; default: 16 128 128"
    )
    parser.add_argument("--batch", type=int, default=4, help="samples of a batch; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="turns; default: %(default)s")
    parser.add_argument("--tracking", metavar="URI", help="also log the table to this MLflow address")


def run(options: argparse.Namespace) -> None:
    """Measure, and print the table."""
    from fewstep.cluster import connect_ray

    connect_ray()
    with tempfile.TemporaryDirectory() as folder:
        info = write_samples(
            options.root or folder, options.samples, options.shard_rows, (options.tokens, options.width),
            tuple(options.shape),
        )  # fmt: skip
        size = sum(info.storage.list().values())
        alone, *streams = WAYS
        fed: list[tuple[Reading, bool]] = [("tasks", True), ("threads", True), ("threads", False)]
        ways: dict[str, Callable[[], float]] = {alone: lambda: read_files(info)} | {
            name: partial(read_stream, info, options.batch, reading, stored=stored)
            for name, (reading, stored) in zip(streams, fed, strict=True)
        }
        rates = in_turns(ways, options.repeats)
    per_sample = size / options.samples
    rows = [
        [name, f"{rate:.1f}", f"{rate * per_sample / 1e6:.0f}", f"{rate / rates[alone]:.2f}"]
        for name, rate in rates.items()
    ]
    description = f"{machine(torch.device('cpu'))}; {per_sample / 1e6:.2f} MB per sample"
    table = f"{description}\n\n{aligned(['', 'samples/s', 'MB/s', 'of pyarrow'], rows)}"
    print(table, flush=True)
    if options.tracking:
        metrics = {f"samples_per_second/{WAYS[name]}": rate for name, rate in rates.items()}
        log_to_mlflow(options.tracking, "stream", description, table, metrics)


def write_samples(root: str, count: int, shard_rows: int, text: tuple[int, int], shape: Shape) -> DatasetInfo:
    """Write a dataset of random token states (L, D) and latents, which no compression makes smaller."""
    import pyarrow as pa

    from fewstep.data.columns import condition_columns, latent_column
    from fewstep.data.schema import (
        DatasetInfo,
        Encoding,
        Shard,
        bucket_folder,
        encode_table,
        parquet_bytes,
    )
    from fewstep.storage import Storage

    storage, encoding = Storage.at(root), Encoding("none", text[1], "none", latent_type="bfloat16")
    generator, shards = torch.Generator().manual_seed(0), list[Shard]()
    for number, first in enumerate(range(0, count, shard_rows)):
        rows = min(shard_rows, count - first)
        texts = [TextConditioning.collate([torch.randn(*text, generator=generator)]) for _ in range(rows)]
        keys = [f"{first + row:08d}" for row in range(rows)]
        table = pa.table({"key": keys, "caption": keys, **condition_columns(texts)})
        latents = latent_column(torch.randn(rows, *shape, generator=generator), "bfloat16")
        path = f"{bucket_folder('train', shape)}/part-{number:05d}.parquet"
        encoded = encode_table(table, latents, shape, "train").replace_schema_metadata(encoding.metadata())
        storage.write(path, parquet_bytes(encoded))
        shards.append(Shard(path, "train", shape, rows))
    info = DatasetInfo(storage, encoding, "benchmark", True, tuple(shards))
    info.save()
    return info


def read_files(info: DatasetInfo) -> float:
    """Samples per second of pyarrow's reading."""
    import pyarrow.parquet as pq

    began, rows = time.perf_counter(), 0
    for shard in info.shards:
        rows += len(
            pq.read_table(
                info.storage.path(shard.path), filesystem=info.storage.filesystem, partitioning=None
            )
        )
    return rows / (time.perf_counter() - began)


def read_stream(info: DatasetInfo, batch_size: int, reading: Reading, *, stored: bool) -> float:
    """Samples per second of a worker's stream, without its start."""
    from fewstep.data.stream import ShardStream

    stream = ShardStream(info.root, "train", batch_size=batch_size, seed=0, reading=reading, stored=stored)
    count = info.rows("train") // batch_size
    with closing(iter(stream)) as batches:
        next(batches)
        began = time.perf_counter()
        for batch in itertools.islice(batches, count - 1):
            touched(batch)
        return batch_size * (count - 1) / (time.perf_counter() - began)


def touched(batch: Batch) -> None:
    """Look at a batch, so that nothing of it can be left undone."""
    assert batch.latent is not None
    assert np.isfinite(float(batch.latent[-1, -1, -1, -1]))


def in_turns(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median rate of each way, taken in turns."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            rates[name].append(way())
    return {name: statistics.median(values) for name, values in rates.items()}
