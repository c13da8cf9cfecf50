from __future__ import annotations

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fewstep.data import sources
from fewstep.data.datasets import emoji
from fewstep.data.prepare import PreparationConfig, plan
from fewstep.errors import UserError
from fewstep.images import Size

CONTENT_SHA256 = "67a2b1c695afee3db82fac319b24e5c2ec70d491db4f386e6059ba156afffa2f"
ROWS64_SHA256 = "4a2ba417776ab7cf6da8afd25a01c9f3b1ea3dde4659290cbcc63db35f215da5"
"""Of everything but the pixels, which another decoder of AVIF may round otherwise."""

BEGUN = {
    "folder": ("110d88608d0e2903", "4a59af4c539f0b68"),
    "prompts": ("6502f0401e1eac1a", "a4c4325551c0ca58"),
}


@pytest.fixture(scope="module")
def bundle() -> list[dict]:
    return emoji.read_bundle(16).to_pylist()


@pytest.fixture(scope="module")
def bundle64() -> list[dict]:
    return emoji.read_bundle(64).to_pylist()


def pixels(row: dict) -> np.ndarray:
    return np.asarray(sources.open_image(row["image"]))


def test_the_shipped_emoji_set_is_the_pinned_one(bundle):
    assert Counter(row["split"] for row in bundle) == {"train": 5091, "held_out": emoji.HELD_OUT_PAIRS}
    assert {row["style"] for row in bundle} == {"noto", "twemoji", "fluent"}
    digest = hashlib.sha256()
    for row in bundle:
        assert row["caption"].endswith(f", {row['style']} style")
        digest.update(f"{row['key']} {row['caption']} {row['split']}".encode() + pixels(row).tobytes())
    assert digest.hexdigest() == CONTENT_SHA256


def test_the_larger_emoji_are_those_of_the_small_set_and_more(bundle, bundle64):
    assert Counter(row["split"] for row in bundle64) == {"train": 5108, "held_out": emoji.HELD_OUT_PAIRS}
    digest = hashlib.sha256()
    for row in bundle64:
        digest.update(f"{row['key']} {row['caption']} {row['split']}".encode())
    assert digest.hexdigest() == ROWS64_SHA256
    small = {row["key"]: row for row in bundle}
    both = [row for row in bundle64 if row["key"] in small]
    assert len(both) > 0.98 * len(bundle)
    for row in both[::25]:
        image = sources.open_image(row["image"])
        assert image.size == (64, 64)
        # A picture of 64 pixels has lost some of what the original's had, and AVIF some more.
        shrunk = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS), np.float64)
        assert np.sqrt(((shrunk - pixels(small[row["key"]])) ** 2).mean()) / 255 < 0.02, row["key"]


def test_pictures_of_the_larger_set_become_latents_where_nothing_else_is_asked_for():
    assert emoji.preparation([Size(64, 64)]).autoencoder == "emoji64"
    assert emoji.preparation([Size(32, 32)]).autoencoder == emoji.preparation(None).autoencoder == "pixel"


def test_held_out_pairs_are_in_no_other_split_and_have_no_twin_there(bundle):
    assert len({row["key"] for row in bundle}) == len(bundle)
    for style in ("noto", "twemoji", "fluent"):
        rows = [row for row in bundle if row["style"] == style]
        flat = np.stack([pixels(row).reshape(-1) for row in rows]).astype(np.float64) / 255
        held_out = np.array([row["split"] == "held_out" for row in rows])
        for image in flat[held_out]:
            distance = np.sqrt(((flat[~held_out] - image) ** 2).mean(1)).min()
            assert distance > 0.99 * emoji.DUPLICATE_RMS


def test_most_held_out_concepts_are_known_from_another_style(bundle):
    train = {row["concept"] for row in bundle if row["split"] == "train"}
    held_out = [row["concept"] for row in bundle if row["split"] == "held_out"]
    assert np.mean([concept in train for concept in held_out]) > 0.9


def test_licences_and_attributions_ship_with_the_set():
    text = emoji.LICENCES.read_text()
    for file in emoji.BUNDLES.values():
        assert file.name in text
        metadata = pq.read_schema(file).metadata[b"attribution"].decode()
        for package in (*emoji.STYLES, emoji.CAPTIONS):
            for words in (package.name, package.version, package.attribution, package.licence):
                assert words in text
                assert words in metadata
    assert "Permission is hereby granted" in text
    assert "Apache License" in emoji.LICENCES.with_name("APACHE-2.0.txt").read_text()


def test_a_changed_package_is_refused_by_its_hash(tmp_path):
    (tmp_path / emoji.CAPTIONS.archive).write_bytes(b"changed")
    with pytest.raises(
        UserError, match=r"emojibase-data-17.0.0.tgz has SHA-256 \w+, expected d01d0e2c\w+: delete it"
    ):
        emoji.fetch(emoji.CAPTIONS, tmp_path)


def test_without_npm_the_shipped_set_is_recommended(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is needed to rebuild"):
        emoji.emoji_set([Size(32, 32)], tmp_path)


def test_sizes_are_parsed_as_width_by_height_and_chosen_by_aspect_ratio():
    assert Size.parse("512") == Size(512, 512)
    assert Size.parse("640x384") == Size(640, 384)
    for text in ("0", "12x", "a", "-3", "1x2x3"):
        with pytest.raises(UserError, match=re.escape(repr(text))):
            Size.parse(text)
    sizes = [Size(512, 512), Size(640, 384), Size(384, 640)]
    assert Size.nearest(sizes, 1920, 1080) == Size(640, 384)
    assert Size.nearest(sizes, 1000, 1010) == Size(512, 512)
    assert Size.nearest(sizes, 100, 300) == Size(384, 640)
    with pytest.raises(UserError, match="the emoji set is square"):
        emoji.emoji_set([Size(640, 384)])


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.parquet"])
def test_captions_are_read_from_any_of_the_tables(tmp_path, name):
    for file in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / file)
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text('{"file": "a.png", "caption": "one, two"}\n{"file": "a.png", "caption": "again"}\n')
    elif name.endswith("csv"):
        path.write_text('file,caption\na.png,"one, two"\na.png,again\n')
    else:
        pq.write_table(pa.table({"image": ["a.png"] * 2, "prompt": ["one, two", "again"], "x": [1, 2]}), path)
    source = sources.image_folder(str(tmp_path), held_out=0.5)
    assert source.rows["key"].to_pylist() == ["a.png", "a.png#2"]
    assert source.rows["caption"].to_pylist() == ["one, two", "again"]
    assert len(set(source.rows["split"].to_pylist())) == 1, "an image is in one split, whatever its captions"


def test_the_held_out_fraction_is_stable_under_growth(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(1000)))
    first = sources.prompts([str(path)], held_out=0.1)
    path.write_text("a new one\n" + path.read_text())
    second = sources.prompts([str(path)], held_out=0.1)
    splits = [
        dict(zip(*(s.rows[c].to_pylist() for c in ("key", "split")), strict=True)) for s in (first, second)
    ]
    assert splits[0].items() <= splits[1].items()
    assert 60 < Counter(splits[0].values())["held_out"] < 140
    assert first.digest() != second.digest()


def test_datasets_that_older_versions_began_can_be_finished(tmp_path):
    """Digests and plans as fewstep 0.2 made them, before rows were read in columns."""
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    names = ["a.png", "b.png", "c.png"] * 20
    lines = [{"file": name, "text": f"caption {number}"} for number, name in enumerate(names)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {number % 400}\n" for number in range(500)))
    sizes = (Size(16, 16), Size(24, 8), Size(8, 24))
    made = {}
    for source in (
        sources.image_folder(str(tmp_path), held_out=0.3),
        sources.prompts([str(tmp_path / "prompts.txt")], held_out=0.1),
    ):
        settings = PreparationConfig(sizes=sizes if source.name == "prompts" else sizes[:1], shard_rows=32)
        shards, rejected = plan(source, settings)
        whole = [(s.path, s.split, s.rows["key"].to_pylist(), s.rows["split"].to_pylist()) for s in shards]
        digest = hashlib.sha256(repr((whole, [r.as_dict() for r in rejected])).encode()).hexdigest()
        made[source.name] = (source.digest()[:16], digest[:16])
    assert made == BEGUN


def test_sources_without_a_usable_row_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*, or nothing in it"):
        sources.image_folder(str(tmp_path), held_out=0.0)
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"no table of captions in .* \(looked for metadata.jsonl"):
        sources.image_folder(str(tmp_path), held_out=0.0)
    with pytest.raises(UserError, match=r"nothing.txt doesn't exist"):
        sources.prompts([str(tmp_path / "nothing.txt")], held_out=0.0)
    (tmp_path / "metadata.csv").write_text("file,caption\nx.png,a cat\n")
    with pytest.raises(
        UserError, match=r"has no usable row \(1 rejected; the first: metadata.csv:2, missing file"
    ):
        sources.image_folder(str(tmp_path), held_out=0.0)
