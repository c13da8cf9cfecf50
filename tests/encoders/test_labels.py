"""Classes as conditioning: exact through shards, and refused by name where they are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fewstep.data.columns import condition_columns, conditioning_of
from fewstep.data.prepare import EncodeText, PreparationConfig
from fewstep.data.schema import DatasetInfo, Encoding, Shard, encode_table
from fewstep.data.stream import read_split
from fewstep.encoders import encoder_widths, load_encoder
from fewstep.encoders.labels import FASHION_MNIST, MOST_CLASSES
from fewstep.errors import UserError
from fewstep.images import Size
from fewstep.storage import Storage


def index(encoder: str, caption: str) -> int:
    [condition] = load_encoder(encoder).encode([caption])
    assert condition.labels.shape == (1,)
    assert condition.labels.dtype == torch.int64
    return condition.labels.item()


def test_a_class_is_its_index_by_name_or_number_and_nothing_is_the_null_class() -> None:
    for number, name in enumerate(FASHION_MNIST):
        assert index("labels:fashion-mnist", name) == number
        assert index("labels:fashion-mnist", name.upper()) == number
        assert index("labels:fashion-mnist", str(number)) == number
    assert index("labels:fashion-mnist", "") == 10
    assert index("labels:cat, dog", "dog") == 1
    assert index("labels:1000", "999") == 999
    assert index("labels:1000", "") == 1000


def test_every_label_survives_a_shard(tmp_path: Path) -> None:
    name, shape = f"labels:{MOST_CLASSES}", (1, 2, 2)
    captions = [*map(str, range(MOST_CLASSES)), ""]
    encoder = load_encoder(name)
    columns = condition_columns(encoder.encode(captions))
    rows = pa.table({"key": [f"{i:05d}" for i in range(len(captions))], "caption": captions, **columns})
    encoding = Encoding(name, encoder_widths(name)[0], "grey")
    table = encode_table(rows, np.zeros((len(captions), *shape), np.float32), shape, "train")
    (tmp_path / "train/1x2x2").mkdir(parents=True)
    path = "train/1x2x2/part-00000.parquet"
    pq.write_table(table.replace_schema_metadata(encoding.metadata()), tmp_path / path)
    DatasetInfo(
        Storage.at(tmp_path), encoding, "test", True, (Shard(path, "train", shape, len(captions)),)
    ).save()
    labels = read_split(tmp_path, "train").conditioning.labels
    assert labels.tolist() == list(range(MOST_CLASSES + 1))


def test_labels_in_shards_of_before_version_0_2_are_read(tmp_path: Path) -> None:
    """They held a class as the one float16 token state of its caption, and had no column for it."""
    name, shape, count = f"labels:{MOST_CLASSES}", (1, 2, 2), MOST_CLASSES + 1
    new = condition_columns(load_encoder(name).encode([*map(str, range(MOST_CLASSES)), ""]))
    old = new | {
        "tokens": pa.array([np.float16(i).tobytes() for i in range(count)], pa.large_binary()),
        "token_count": pa.array([1] * count, pa.int32()),
    }
    rows = pa.table({"key": [f"{i:05d}" for i in range(count)], "caption": ["x"] * count, **old})
    table = encode_table(rows, np.zeros((count, *shape), np.float32), shape, "train").drop_columns(["label"])
    (tmp_path / "train/1x2x2").mkdir(parents=True)
    path, encoding = "train/1x2x2/part-00000.parquet", Encoding(name, 1, "grey")
    pq.write_table(table.replace_schema_metadata(encoding.metadata()), tmp_path / path)
    shard = Shard(path, "train", shape, count)
    DatasetInfo(Storage.at(tmp_path), encoding, "test", True, (shard,)).save()
    assert read_split(tmp_path, "train").conditioning.labels.tolist() == list(range(count))


def test_rows_of_old_and_new_shards_may_share_a_batch() -> None:
    """As in a dataset that an old version began to prepare and this one finished."""
    new = condition_columns(load_encoder("labels:4").encode(["1", "3"]))
    rows = pa.table(new)
    old = {
        "tokens": pa.array([np.float16(2).tobytes(), np.float16(0).tobytes()], rows["tokens"].type),
        "token_count": pa.array([1, 1], rows["token_count"].type),
        "label": pa.nulls(2, rows["label"].type),
    }
    older = pa.table(new | old)
    mixed = pa.concat_tables([rows.slice(0, 1), older, rows.slice(1)]).combine_chunks()
    assert conditioning_of(mixed, Encoding("labels:4", 1, "grey")).labels.tolist() == [1, 2, 0, 3]


def test_what_is_no_class_is_refused_with_the_nearest() -> None:
    encoder = load_encoder("labels:fashion-mnist")
    encoder.check(["sneaker", ""])
    for refuse in (encoder.check, encoder.encode):
        with pytest.raises(
            UserError, match=r"no class 'sneakers': the nearest is 'sneaker'.*0 to 9"
        ) as caught:
            refuse(["bag", "sneakers"])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no class '10'"):
        encoder.encode(["10"])


def test_a_row_of_no_class_is_skipped_and_listed() -> None:
    from fewstep.data.prepare import ShardPlan, unpack
    from fewstep.data.sources import INDEX

    rows = pa.table(
        [
            ["a", "b", "c"],
            ["dog", "cow", ""],
            ["train"] * 3,
            [None] * 3,
            [None] * 3,
            ["t:1", "t:2", "t:3"],
            [None] * 3,
            [None] * 3,
        ],
        schema=INDEX,
    )
    config = PreparationConfig(sizes=(Size(4, 4),), text_encoder="labels:cat,dog")
    item = EncodeText(config)(
        ShardPlan("p", "train", Size(4, 4), (3, 4, 4), rows, np.arange(len(rows))).as_item()
    )
    assert unpack(item["rows"])["key"].to_pylist() == ["a", "c"]
    assert '"where": "t:2", "reason": "unknown class"' in item["rejected"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels:fashion", "nearest is 'labels:fashion-mnist'"),
        ("labels:", "names no known set"),
        ("labels:0", "no classes"),
        ("labels:2049", "too many classes: give 1 to 2048"),
        ("labels:cat,dog,Cat", "empty or repeated"),
        ("labels:cat,", "empty or repeated"),
    ],
)
def test_label_sets_that_cannot_be_are_refused(name: str, message: str) -> None:
    for use in (load_encoder, encoder_widths):
        with pytest.raises(UserError, match=message) as caught:
            use(name)
        assert "\n" not in str(caught.value)
