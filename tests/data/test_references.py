"""Datasets for editing: rows with reference images."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.datasets import emoji
from fewstep.data.mixture import mixture
from fewstep.data.prepare import EncodeImages, EncodeText, PreparationConfig, plan, prepare
from fewstep.data.schema import Encoding, read_shard
from fewstep.data.sources import Source, image_folder
from fewstep.data.stream import Batch
from fewstep.encoders import encoder_widths, load_autoencoder
from fewstep.errors import UserError
from fewstep.images import Size, fit, open_image
from fewstep.models.conditioning import TextConditioning
from fewstep.storage import Storage

SMALL = PreparationConfig(sizes=(Size(8, 8),), least_shards=1)
text_stage = functools.cache(EncodeText)


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    """Six edits of two references each, of which four can be used."""
    folder = tmp_path / "edits"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(18):
        pixels = random.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (folder / "12.png").write_bytes(b"this is no image")
    with (folder / "metadata.jsonl").open("w") as table:
        for number in range(6):
            names = [f"{number + 6:02d}.png", f"{number + 12:02d}.png"]
            row = {"file": f"{number:02d}.png", "caption": f"edit {number}", "references": names}
            if number == 5:
                row["references"] = names[0]
            print(json.dumps(row), file=table)
    return folder


def encoded(source: Source, root: Path) -> Batch:
    """All rows of a source of few rows, as one batch of a dataset that is prepared in this process."""
    width, _ = encoder_widths(SMALL.text_encoder)
    encoding = Encoding(SMALL.text_encoder, width, SMALL.autoencoder, references=source.references)
    storage = Storage.at(root)
    images = EncodeImages(SMALL, encoding, source.storage, storage, has_images=True)
    [shard], _ = plan(source, SMALL)
    images(text_stage(SMALL)(shard.as_item()))
    return Batch.of(read_shard(storage, shard.path), encoding)


def fitted(file: Path) -> torch.Tensor:
    """The latent of an image file, (C, H, W)."""
    pixels = torch.tensor(fit(open_image(file.read_bytes()), SMALL.sizes[0])[None])
    return load_autoencoder("pixel").encode(pixels)[0]


def test_each_row_of_a_folder_has_its_reference_images(edits: Path, tmp_path: Path) -> None:
    source = image_folder(str(edits), held_out=0.0)
    assert source.references == 2
    assert [(r.where, r.reason) for r in source.rejected] == [
        ("metadata.jsonl:6", "other number of references")
    ]
    # Reference images are used, too: only one is not.
    assert source.notes == (f"1 pictures in {edits} are in no usable row of the table",)
    batch = encoded(source, tmp_path / "out")
    # The row whose second reference is broken is left out.
    assert sorted(batch.keys) == ["01.png", "02.png", "03.png", "04.png"]
    assert batch.latent is not None
    first, second = batch.conditioning.references
    for row, key in enumerate(batch.keys):
        number = int(key[:2])
        assert torch.equal(batch.latent[row], fitted(edits / key))
        assert torch.equal(first[row], fitted(edits / f"{number + 6:02d}.png"))
        assert torch.equal(second[row], fitted(edits / f"{number + 12:02d}.png"))
    assert batch.head(2).conditioning.references[1].shape == (2, 3, 8, 8)


def test_a_missing_reference_is_told(edits: Path) -> None:
    (edits / "09.png").unlink()
    rejected = image_folder(str(edits), held_out=0.0).rejected
    assert ("metadata.jsonl:4", "missing file") in [(r.where, r.reason) for r in rejected]


def test_shards_from_before_there_were_references_are_read(edits: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = edits / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps(row | {"references": None}) + "\n" for row in rows))
    source = image_folder(str(edits), held_out=0.0)
    batch = encoded(source, tmp_path / "out")
    assert source.references == 0
    assert batch.conditioning.references == ()
    [shard] = (tmp_path / "out").rglob("*.parquet")
    pq.write_table(pq.read_table(shard, partitioning=None).drop_columns("references"), shard)
    path = str(shard.relative_to(tmp_path / "out"))
    again = Batch.of(
        read_shard(Storage.at(tmp_path / "out"), path), Encoding(SMALL.text_encoder, 384, "pixel")
    )
    assert again.keys == batch.keys
    assert again.conditioning.references == ()


def test_references_go_with_texts_and_not_into_mixtures(edits: Path, tmp_path: Path) -> None:
    source = image_folder(str(edits), held_out=0.0)
    classes = PreparationConfig(sizes=SMALL.sizes, text_encoder="labels:cat,dog")
    with pytest.raises(UserError, match="reference images go with texts"):
        prepare(source, tmp_path / "out", classes)
    file = tmp_path / "mix.yaml"
    file.write_text(f"edits: {{source: folder, path: {edits}}}\n")
    with pytest.raises(UserError, match="the rows of edits have reference images"):
        mixture(str(file), held_out=0.0)


def test_edits_of_emoji_change_the_style_and_no_held_out_image_is_trained_on(tmp_path: Path) -> None:
    images = {row["image"]: row for row in emoji.read_bundle(16).to_pylist()}
    source = emoji.emoji_edits(emoji.PREPARATION.sizes)
    rows = source.rows.to_pylist()
    assert source.references == 1
    assert Counter(row["split"] for row in rows) == {"train": 9080, "held_out": 1005}
    assert len({row["key"] for row in rows}) == len(rows)
    for row in rows:
        [before], after = [images[image["image"]] for image in row["references"]], images[row["image"]]
        assert before["concept"] == after["concept"]
        assert before["style"] != after["style"]
        assert row["caption"] == f"in {after['style']} style"
        assert row["split"] == after["split"]
        if row["split"] == "train":
            assert before["split"] == "train"


def test_references_keep_their_places_when_rows_are_taken() -> None:
    states = torch.zeros(3, 1, 2)
    references = (torch.arange(3.0).view(3, 1, 1, 1), torch.arange(3.0, 6).view(3, 1, 1, 1))
    batch = TextConditioning(states, torch.ones(3, 1, dtype=torch.bool), references=references)
    assert [image.flatten().tolist() for image in batch[slice(1, 3)].references] == [[1, 2], [4, 5]]
    assert [image.flatten().tolist() for image in batch.repeat(2).references] == [
        [0, 1, 2, 0, 1, 2],
        [3, 4, 5, 3, 4, 5],
    ]
