"""Fashion-MNIST: every pixel and label of the idx files, its own held-out split, one sentence where it is missing."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data.datasets.fashion_mnist import PREPARATION, fashion_mnist
from fewstep.data.prepare import EncodeImages, EncodeText, plan
from fewstep.data.schema import Encoding, read_shard
from fewstep.data.sources import Source
from fewstep.data.stream import Batch
from fewstep.encoders.autoencoders import load_autoencoder
from fewstep.encoders.labels import FASHION_MNIST
from fewstep.errors import UserError
from fewstep.images import fit, measure, open_image
from fewstep.storage import Storage

COUNTS = {"train": 20, "t10k": 6}


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(int(side).to_bytes(4, "big") for side in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def pixels() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {part: rng.integers(0, 256, (count, 28, 28), dtype=np.uint8) for part, count in COUNTS.items()}


@pytest.fixture
def folder(pixels: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """The set's layout; the training part gzipped, as Debian has it."""
    for part, images in pixels.items():
        files = {
            f"{part}-images-idx3-ubyte": idx(images),
            f"{part}-labels-idx1-ubyte": idx(np.arange(len(images), dtype=np.uint8) % 10),
        }
        for name, content in files.items():
            if part == "train":
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / name).write_bytes(content)
    return tmp_path


def encoded(source: Source, root: Path) -> dict[str, Batch]:
    """Its splits, prepared in this process."""
    encoding = Encoding(PREPARATION.text_encoder, 0, PREPARATION.autoencoder)
    text, images = EncodeText(PREPARATION), EncodeImages(PREPARATION, encoding, None, Storage.at(root), True)
    batches = {}
    for shard in plan(source, replace(PREPARATION, least_shards=1))[0]:
        images(text(shard.as_item()))
        batches[shard.split] = Batch.of(read_shard(Storage.at(root), shard.path), encoding)
    return batches


def test_pixels_and_labels_arrive_in_latents_and_conditioning(folder, pixels, tmp_path) -> None:
    splits = encoded(fashion_mnist(str(folder)), tmp_path / "out")
    assert {split: len(batch) for split, batch in splits.items()} == {"train": 20, "held_out": 6}
    for part, split in (("train", "train"), ("t10k", "held_out")):
        batch = splits[split]
        assert batch.shape == (1, 28, 28)
        numbers = [int(key.removeprefix(f"{part}-")) for key in batch.keys]
        restored = load_autoencoder("grey").decode(batch.latent)
        assert np.array_equal(restored.numpy(), pixels[part][numbers][..., None].repeat(3, -1))
        assert batch.conditioning.labels.tolist() == [number % 10 for number in numbers]
        assert batch.captions == [FASHION_MNIST[number % 10] for number in numbers]


def test_images_are_read_without_a_change(folder, pixels) -> None:
    row = fashion_mnist(str(folder)).rows.slice(3, 1).to_pylist()[0]
    assert measure(row["image"]) == (28, 28)
    image = fit(open_image(row["image"]), PREPARATION.sizes[0])
    assert np.array_equal(image, pixels["train"][3][..., None].repeat(3, -1))


def test_colour_becomes_brightness_and_grey_stays_exact() -> None:
    grey = load_autoencoder("grey")
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    latents = grey.encode(images)
    assert latents.shape == (1, *grey.latent_shape(16, 16)) == (1, 1, 16, 16)
    assert torch.equal(grey.decode(latents), images)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 2, 2, 3)
    assert grey.decode(grey.encode(red)).unique().tolist() == [85]


def test_a_missing_set_names_its_package(tmp_path) -> None:
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist") as caught:
        fashion_mnist(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"not zipped", "broken idx file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"hello, world"), "broken idx file"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(3, np.uint8))), "holds no Fashion-MNIST"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(np.full(20, 10, np.uint8))), "labels .* up to 10"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(20, np.uint8))[:-5]), "broken idx file"),
    ],
    # gzip stamps the time into its bytes, and every pytest worker has to collect the same names.
    ids=["not-zipped", "not-idx", "too-few", "no-label", "cut"],
)
def test_files_that_are_not_the_set_are_refused(folder, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        fashion_mnist(str(folder))
    assert "\n" not in str(caught.value)
