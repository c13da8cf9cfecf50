"""Datasets of raw rows: encoded on their way to the training, to the very numbers that shards hold."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.cache import ShardCache
from fewstep.data.encode import EncoderPool
from fewstep.data.prepare import PreparationConfig, prepare
from fewstep.data.schema import DatasetInfo, read_shard
from fewstep.data.sources import Source, image_folder, prompts
from fewstep.data.stream import Batch, ShardStream, read_split
from fewstep.data.stream_config import CacheConfig, EncodersConfig
from fewstep.errors import UserError
from fewstep.images import Size
from processes import ENCODER, kill_one

SMALL = PreparationConfig(sizes=(Size(8, 8), Size(8, 16)), shard_rows=5, least_shards=1)
BATCHES = 20


def _photos(folder: Path, broken: tuple[int, ...] = ()) -> Source:
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as table:
        for number in range(40):
            name, size = f"{number:02d}.png", (20, 12) if number % 3 else (12, 20)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
            words = "a cat " * (1 + number % 5)
            print(json.dumps({"file_name": name, "text": f"{words}number {number}"}), file=table)
    for number in broken:
        file = folder / f"{number:02d}.png"
        file.write_bytes(file.read_bytes()[:-40])  # its size can be read, its pixels can't
    return image_folder(str(folder), held_out=0.1)


@pytest.fixture(scope="module")
def both(ray_cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[DatasetInfo, DatasetInfo]:
    """One source as encoded shards, and as raw rows."""
    home = tmp_path_factory.mktemp("both")
    source = _photos(home / "photos")
    return tuple(
        prepare(source, home / kind, SMALL, encode=kind == "shards") for kind in ("shards", "stream")
    )


def start(info: DatasetInfo, size: int = 1) -> EncoderPool:
    """Encoders of a raw dataset, `size` of each kind."""
    config = EncodersConfig.model_validate({"text": {"size": size}, "images": {"size": size}})
    return EncoderPool.start(info, config)


@pytest.fixture(scope="module")
def encoders(both: tuple[DatasetInfo, DatasetInfo]) -> Iterator[EncoderPool]:
    """Encoders of the raw dataset, for all tests: the start of a process takes longer than what it encodes here."""
    pool = start(both[1], size=2)
    yield pool
    pool.stop()


@pytest.fixture
def pool(ray_cluster: str) -> Iterator[Callable[[DatasetInfo], EncoderPool]]:
    """Starts encoders of other datasets, which end with the test."""
    pools: list[EncoderPool] = []

    def started(info: DatasetInfo) -> EncoderPool:
        pools.append(start(info))
        return pools[-1]

    yield started
    for one in pools:
        one.stop()


@pytest.fixture(scope="module")
def nothing_whole(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    """A raw dataset of images that are all broken."""
    home = tmp_path_factory.mktemp("broken")
    return prepare(_photos(home / "photos", broken=tuple(range(40))), home / "raw", SMALL, encode=False)


def batches(info: DatasetInfo, count: int = BATCHES, start: int = 0, reader: Any = None) -> list[Batch]:
    stream = iter(
        ShardStream(info.root, "train", batch_size=6, seed=1, open_shards=3, start_batch=start, reader=reader)
    )
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.keys, mine.captions, mine.shape) == (other.keys, other.captions, other.shape)
        assert torch.equal(mine.latent, other.latent)
        assert torch.equal(mine.conditioning.states, other.conditioning.states)
        assert torch.equal(mine.conditioning.mask, other.conditioning.mask)


@pytest.fixture(scope="module")
def from_shards(both: tuple[DatasetInfo, DatasetInfo]) -> list[Batch]:
    return batches(both[0])


def test_batches_are_those_of_the_shards_bit_for_bit(both, encoders, from_shards, monkeypatch) -> None:
    assert_equal(batches(both[1], reader=encoders), from_shards)
    monkeypatch.setattr("fewstep.data.encode.PIECE", 2)  # of shards of five rows
    assert_equal(batches(both[1], reader=encoders), from_shards)
    assert_equal(batches(both[1], BATCHES - 7, start=7, reader=encoders), from_shards[7:])


def test_only_captions_and_addresses_lie_on_disk(both) -> None:
    sizes = [sum(info.storage.list().values()) for info in both]
    assert sizes[1] < sizes[0] / 4
    assert both[1].raw is not None
    assert both[1].raw.images is not None
    assert DatasetInfo.open(both[1].root) == both[1]


def test_held_out_rows_are_those_of_the_shards(both) -> None:
    shape = next(iter(both[0].buckets("held_out")))
    assert_equal(*([read_split(info.root, "held_out", 3, shape=shape)] for info in reversed(both)))


def test_prompts_without_images(tmp_path: Path, pool) -> None:
    (tmp_path / "prompts.txt").write_text(
        "".join(f"{'very ' * (n % 4)}short prompt {n}\n" for n in range(40))
    )
    source = prompts([str(tmp_path / "prompts.txt")], held_out=0.1)
    infos = [prepare(source, tmp_path / kind, SMALL, encode=kind == "a") for kind in ("a", "b")]
    ours, theirs = batches(infos[1], reader=pool(infos[1])), batches(infos[0])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys == other.keys
        assert mine.shape == other.shape
        assert mine.latent is None
        assert torch.equal(mine.conditioning.states, other.conditioning.states)


def test_an_encoder_that_is_killed_again_and_again_changes_nothing(
    both, encoders, from_shards, monkeypatch
) -> None:
    monkeypatch.setattr(
        "fewstep.data.stream.QUEUED_BATCHES", 1
    )  # so that there is always something to encode
    stream = iter(ShardStream(both[1].root, "train", batch_size=6, seed=1, open_shards=3, reader=encoders))
    ours, killed = [], 0
    # At its progress, not by the clock: it has to come to something between two kills.
    for number, batch in enumerate(itertools.islice(stream, BATCHES)):
        ours.append(batch)
        if number % 6 == 1:
            killed += kill_one(ENCODER)
    stream.close()
    assert killed >= 2
    assert_equal(ours, from_shards)


def test_rows_that_cannot_be_encoded_are_replaced_by_others_of_their_shard(tmp_path, pool) -> None:
    source = _photos(tmp_path / "photos", broken=(4, 5, 11))
    info = prepare(source, tmp_path / "stream", SMALL, encode=False)
    seen = batches(info, 30, reader=pool(info))
    keys = {key for batch in seen for key in batch.keys}
    assert not keys & {"04.png", "05.png", "11.png"}
    assert all(len(batch) == 6 for batch in seen)


def test_whoever_wants_no_latents_reads_no_image(nothing_whole, pool) -> None:
    for batch in batches(nothing_whole, 5, reader=pool(replace(nothing_whole, has_latents=False))):
        assert batch.latent is None
        assert len(batch.conditioning) == 6


def test_a_shard_of_which_nothing_can_be_encoded_is_named(nothing_whole, pool) -> None:
    with pytest.raises(UserError, match=r"not one of \d+ rows of train/\S+ can be encoded \(.*broken image"):
        batches(nothing_whole, 1, reader=pool(nothing_whole))


# --- the cache


def cached_files(folder: Path) -> dict[str, float]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*.parquet")}


def cached(encoders: EncoderPool, config: CacheConfig, info: DatasetInfo) -> EncoderPool:
    return replace(encoders, cache=ShardCache.of(config, info))


def test_what_was_encoded_is_read_and_not_encoded_again(both, encoders, from_shards, tmp_path) -> None:
    cache = CacheConfig(path=str(tmp_path / "cache"), max_gb=1)
    assert_equal(batches(both[1], reader=cached(encoders, cache, both[1])), from_shards)
    kept = cached_files(tmp_path / "cache")
    shards = sum(shard.split == "train" for shard in both[1].shards)
    assert len(kept) == shards
    # Without any actor, there is nobody who could encode.
    alone = EncoderPool((), (), ShardCache.of(cache, both[1]))
    assert_equal(batches(both[1], reader=alone), from_shards)


def test_a_cache_that_is_deleted_or_broken_on_the_way_changes_nothing(
    both, encoders, from_shards, tmp_path
) -> None:
    folder = tmp_path / "cache"
    reader = cached(encoders, CacheConfig(path=str(folder), max_gb=1), both[1])
    stream = iter(ShardStream(both[1].root, "train", batch_size=6, seed=1, open_shards=3, reader=reader))
    ours = []
    for number, batch in enumerate(itertools.islice(stream, BATCHES)):
        ours.append(batch)
        if number == 5:
            for file in list(folder.rglob("*.parquet"))[::2]:
                file.write_bytes(file.read_bytes()[:100])
        if number == 10:  # in one step: actors may be writing into it
            shutil.rmtree(folder.rename(tmp_path / "deleted"))
    stream.close()
    assert_equal(ours, from_shards)


def test_a_cache_that_cannot_be_written_is_said(both, tmp_path, capfd) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = ShardCache.of(CacheConfig(path=str(tmp_path / "file" / "cache"), max_gb=1), both[1])
    shard = next(shard for shard in both[0].shards if shard.split == "train")
    for _ in range(2):
        cache.write(shard.path, read_shard(both[0].storage, shard.path))
    assert capfd.readouterr().out.count("data.cache: nothing can be kept") == 1


def test_the_cache_is_bounded_and_other_datasets_make_room(both, encoders, tmp_path) -> None:
    folder = tmp_path / "cache"
    other = folder / "of-another-dataset" / "train" / "part-00000.parquet"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(60_000))
    limit = 100_000
    bounded = cached(encoders, CacheConfig(path=str(folder), max_gb=limit / 1e9), both[1])
    batches(both[1], reader=bounded)
    sizes = {file: file.stat().st_size for file in folder.rglob("*.parquet")}
    assert other not in sizes
    assert 0 < len(sizes) < sum(shard.split == "train" for shard in both[1].shards)
    assert sum(sizes.values()) <= limit
    kept = cached_files(folder)
    batches(both[1], reader=bounded)
    assert set(cached_files(folder)) == set(kept), "what is kept stays: an epoch needs all of it again"
