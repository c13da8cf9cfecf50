from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fewstep.data.columns import condition_columns, latent_column
from fewstep.data.schema import DatasetInfo, Encoding, encode_table, parquet_bytes, read_shard
from fewstep.data.stream import Batch, read_split
from fewstep.encoders import as_stored
from fewstep.errors import UserError
from fewstep.models.conditioning import ClassConditioning, TextConditioning
from fewstep.storage import Storage

SHAPE = (3, 2, 4)


def edit_manifest(info: DatasetInfo, **changes: object) -> None:
    path = Path(info.root, "dataset.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_rows_come_back_as_they_were_written(make_dataset):
    info = DatasetInfo.open(make_dataset({SHAPE: [5, 4]}).root)
    assert info.rows("train") == 9
    batch = Batch.of(read_shard(info.storage, info.shards[1].path), info.encoding)
    assert batch.keys == ["row-5", "row-6", "row-7", "row-8"]
    assert batch.captions[0] == "caption of row-5"
    assert batch.latent is not None
    assert batch.latent.shape == (4, *SHAPE)
    assert batch.latent[:, 0, 0, 0].tolist() == [5, 6, 7, 8]
    assert batch.conditioning.mask.sum(1).tolist() == [2, 3, 4, 2]
    assert batch.conditioning.states[1, :3].unique().tolist() == [6 % 7]
    assert not batch.conditioning.states[0, 2:].any()


def test_vectors_of_whole_captions_come_back_with_their_rows(tmp_path):
    storage, encoding = Storage.at(tmp_path), Encoding("none", 4, "pixel", pooled_dim=2)
    pooled = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    texts = [
        TextConditioning.collate([torch.ones(length, 4)], [vector])
        for length, vector in zip((2, 3), pooled, strict=True)
    ]
    rows = pa.table({"key": ["a", "b"], "caption": ["first", "second"], **condition_columns(texts)})
    table = encode_table(rows, None, SHAPE, "train")
    pq.write_table(table.replace_schema_metadata(encoding.metadata()), tmp_path / "part.parquet")
    batch = Batch.of(read_shard(storage, "part.parquet"), encoding)
    assert batch.latent is None
    assert batch.conditioning.pooled.tolist() == pooled.tolist()


def test_states_beyond_float16s_range_come_back_beside_others(tmp_path):
    """A language model's few large activations; rows of either kind, and shards from before there were such."""
    storage, encoding = Storage.at(tmp_path), Encoding("none", 4, "pixel")
    usual, large = torch.randn(3, 4), torch.randn(2, 4) * torch.tensor([1.0, 1.0, 2e6, 1e-2])
    texts = [TextConditioning.collate([as_stored(states)]) for states in (usual, large)]
    rows = pa.table({"key": ["a", "b"], "caption": ["first", "second"], **condition_columns(texts)})
    table = encode_table(rows, None, SHAPE, "train").replace_schema_metadata(encoding.metadata())
    assert table["token_scale"].to_pylist()[0] is None
    pq.write_table(table, tmp_path / "part.parquet")
    pq.write_table(table.slice(0, 1).drop_columns(["token_scale"]), tmp_path / "old.parquet")
    both = pa.concat_tables([read_shard(storage, "part.parquet"), read_shard(storage, "old.parquet")])
    batch = Batch.of(both, encoding).conditioning
    assert torch.equal(batch.states[:2], TextConditioning.join(texts).states)
    assert torch.equal(batch.states[2, :3], texts[0].states[0])
    assert batch.states.max() > 1e5 or batch.states.min() < -1e5
    torch.testing.assert_close(batch.states[1, :2], large, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("latents", [True, False])
def test_shards_of_version_1_are_read(make_dataset, tmp_path, latents: bool):
    """They held token states and latents as lists of numbers."""
    info = make_dataset({SHAPE: [5]})
    shard = Path(info.root, info.shards[0].path)
    now = read_shard(info.storage, info.shards[0].path)
    if not latents:
        place = now.column_names.index("latent")
        now = now.set_column(place, "latent", pa.nulls(len(now), pa.large_binary()))
    old = now
    for name, kind in (("tokens", np.float16), ("latent", np.float32)):
        rows = [None if row is None else np.frombuffer(row, kind) for row in now[name].to_pylist()]
        lists = pa.array(rows, pa.list_(pa.from_numpy_dtype(kind)))
        old = old.set_column(old.column_names.index(name), name, lists)
    metadata = {b"fewstep": json.dumps({"version": 1, "rejected": []}).encode()}
    pq.write_table(old.replace_schema_metadata(metadata), shard, compression="zstd")
    again = read_shard(info.storage, info.shards[0].path)
    assert again.schema.equals(now.schema)
    assert again.equals(now)
    # A part of such a table, too
    pq.write_table(old.slice(2, 2).replace_schema_metadata(metadata), shard)
    assert read_shard(info.storage, info.shards[0].path).equals(now.slice(2, 2))


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "float16"])
def test_latents_come_back_as_the_numbers_that_they_are_stored_as(tmp_path, numbers):
    storage, encoding = Storage.at(tmp_path), Encoding("labels:2", 0, "pixel", latent_type=numbers)
    latents, kind = torch.randn(3, *SHAPE), getattr(torch, numbers)
    labels = [ClassConditioning(torch.tensor([i % 2])) for i in range(3)]
    rows = pa.table({"key": ["a", "b", "c"], "caption": ["", "", ""], **condition_columns(labels)})
    table = encode_table(rows, latent_column(latents, numbers), SHAPE, "train")
    storage.write("part.parquet", parquet_bytes(table.replace_schema_metadata(encoding.metadata())))
    rows = read_shard(storage, "part.parquet")
    for part in (slice(0, 3), slice(1, 3)):
        some = rows.slice(part.start, part.stop - part.start)
        assert torch.equal(Batch.of(some, encoding).latent, latents[part].to(kind).float())
        stored = Batch.of(some, encoding, stored=True)
        assert stored.latent.dtype == kind
        assert torch.equal(stored.to(torch.device("cpu")).latent, latents[part].to(kind).float())


def test_token_states_may_stay_as_they_are_stored(tmp_path):
    texts = [TextConditioning.collate([torch.randn(length, 4).half().float()]) for length in (2, 3)]
    large = TextConditioning.collate([as_stored(torch.full((1, 4), 1e6))])
    encoding = Encoding("none", 4, "pixel")

    def batch(conditions: list[TextConditioning], stored: bool) -> TextConditioning:
        rows = pa.table({"key": ["a"] * len(conditions), "caption": [""] * len(conditions),
                         **condition_columns(conditions)})  # fmt: skip
        return Batch.of(encode_table(rows, None, SHAPE, "train"), encoding, stored=stored).conditioning

    assert batch(texts, True).states.dtype == torch.float16
    assert torch.equal(batch(texts, True).states.float(), batch(texts, False).states)
    assert torch.equal(batch(texts, False).states, TextConditioning.join(texts).states)
    assert batch([*texts, large], True).states.dtype == torch.float32
    assert batch([*texts, large], True).states.max() == large.states.max()


def test_shards_from_before_there_were_such_vectors_are_read(make_dataset):
    info = DatasetInfo.open(make_dataset({SHAPE: [5]}).root)
    shard = Path(info.root, info.shards[0].path)
    pq.write_table(pq.read_table(shard).drop_columns(["pooled", "label"]), shard)
    manifest = json.loads(Path(info.root, "dataset.json").read_text())
    edit_manifest(info, encoding={k: v for k, v in manifest["encoding"].items() if k != "pooled_dim"})
    old = DatasetInfo.open(info.root)
    assert old.encoding.pooled_dim is None
    batch = Batch.of(read_shard(old.storage, old.shards[0].path), old.encoding)
    assert batch.conditioning.pooled is None
    assert batch.latent.shape == (5, *SHAPE)


def test_a_folder_without_a_dataset_is_refused_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(
        UserError, match=r"no dataset at .*nowhere, which holds nothing: make one with fewstep prepare"
    ):
        DatasetInfo.open(tmp_path / "nowhere")
    (tmp_path / "a.png").touch()
    with pytest.raises(
        UserError, match=r"holds no prepared dataset: make one .*--source folder for pictures"
    ):
        DatasetInfo.open(tmp_path)


def test_an_unfinished_dataset_is_refused(make_dataset):
    info = make_dataset({SHAPE: [3]})
    Path(info.root, "dataset.json").rename(Path(info.root, "plan.json"))
    with pytest.raises(UserError, match="did not finish: run the same"):
        DatasetInfo.open(info.root)


def test_another_schema_version_is_refused_in_the_manifest_and_in_a_shard(make_dataset):
    info = make_dataset({SHAPE: [3]})
    edit_manifest(info, version=3)
    with pytest.raises(UserError, match="has schema version 3, this fewstep reads versions 1 and 2: prepare"):
        DatasetInfo.open(info.root)

    other = make_dataset({SHAPE: [3]}, name="other")
    shard = Path(other.root, other.shards[0].path)
    pq.write_table(pq.read_table(shard).replace_schema_metadata({b"fewstep": b'{"version": 7}'}), shard)
    with pytest.raises(UserError, match=r"part-00000.parquet has schema version 7"):
        DatasetInfo.open(other.root)


def test_an_empty_dataset_is_refused(make_dataset):
    info = make_dataset({SHAPE: [3]})
    edit_manifest(info, shards=[])
    with pytest.raises(UserError, match="is empty: give"):
        DatasetInfo.open(info.root)


def test_missing_shards_are_named(make_dataset):
    info = make_dataset({SHAPE: [3, 3]})
    Path(info.root, info.shards[1].path).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its 2 shards .*part-00001.parquet"):
        DatasetInfo.open(info.root)


def test_a_truncated_shard_is_refused(make_dataset):
    info = make_dataset({SHAPE: [3]})
    shard = Path(info.root, info.shards[0].path)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        DatasetInfo.open(info.root)


def test_a_split_without_rows_is_refused_with_the_splits_there_are(make_dataset):
    with pytest.raises(UserError, match=r"no rows in its split 'held_out' \(it has train\)"):
        read_split(make_dataset({SHAPE: [3]}).root, "held_out")


def test_a_split_is_read_by_key_and_a_limit_takes_a_fixed_fair_sample(make_dataset):
    root = make_dataset({SHAPE: [40, 40]}).root
    whole, part = read_split(root, "train"), read_split(root, "train", 10)
    assert whole.keys == sorted(whole.keys)
    assert len(whole) == 80
    assert part.keys == read_split(root, "train", 10).keys == sorted(part.keys)
    assert part.keys != whole.keys[:10]
    assert set(part.keys) <= set(read_split(root, "train", 20).keys)


def test_a_split_of_several_shapes_is_read_by_shape(make_dataset):
    root = make_dataset({SHAPE: [4], (3, 4, 2): [5]}).root
    with pytest.raises(UserError, match="has the shapes"):
        read_split(root, "train")
    assert len(read_split(root, "train", shape=(3, 4, 2))) == 5


def test_a_dataset_on_s3_reads_like_a_local_one(make_dataset, s3_bucket):
    info = make_dataset({SHAPE: [4, 4]})
    remote = Storage.at(f"{s3_bucket}/some/where")
    for path in info.storage.list():
        remote.write(path, Path(info.root, path).read_bytes())
    batch, local = read_split(remote.root, "train"), read_split(info.root, "train")
    assert batch.keys == local.keys
    assert np.array_equal(batch.latent, local.latent)
    with pytest.raises(UserError, match="no dataset at s3://"):
        DatasetInfo.open(f"{s3_bucket}/else")


def test_an_unreachable_s3_is_reported_in_seconds(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"s3://bucket/data can't be reached .*AWS_ENDPOINT_URL \(now http://127.0.0.1:9\)"
    ):
        DatasetInfo.open("s3://bucket/data")
    assert time.monotonic() - started < 30


def test_the_leftovers_of_a_killed_writer_are_no_part_of_a_dataset(tmp_path):
    storage = Storage.at(tmp_path)
    storage.write("a/part", b"whole")
    (tmp_path / "a" / ".part.0.partial").write_bytes(b"half")
    assert storage.list() == {"a/part": 5}
    storage.sweep()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["part"]


def test_an_evaluation_of_too_few_held_out_rows_is_refused_before_the_training(make_dataset):
    from fewstep.train.recipe import EvaluationConfig
    from fewstep.train.validation import _check_evaluation

    few = make_dataset({(3, 4, 4): [2], (3, 4, 8): [2]}, "held_out", "few")
    with pytest.raises(UserError, match=r"holds out 2 rows, and an evaluation needs 3 .* --held-out"):
        _check_evaluation(EvaluationConfig(), few)
    _check_evaluation(EvaluationConfig(enabled=False), few)
    _check_evaluation(
        EvaluationConfig(), make_dataset({(3, 4, 4): [1], (3, 4, 8): [3]}, "held_out", "enough")
    )
