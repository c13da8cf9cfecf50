"""Fashion-MNIST: 70,000 grey 28×28 images of clothes in 10 classes (MIT licence), read from its idx files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from fewstep.data.prepare import PreparationConfig
from fewstep.data.rows import Source, index_table
from fewstep.encoders.autoencoders import GREY
from fewstep.encoders.labels import FASHION_MNIST
from fewstep.errors import UserError
from fewstep.images import Size
from fewstep.storage import Storage

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Folder of the set's files in Debian's package `dataset-fashion-mnist`."""

PARTS = {"train": "train", "t10k": "held_out"}
"""Prefix of the files → split: the set's own 10,000 test images are held out."""

PREPARATION = PreparationConfig(
    sizes=(Size(28, 28),), text_encoder="labels:fashion-mnist", autoencoder=GREY, shard_rows=1024
)
"""Settings with which the set is prepared: pixels as latents, one channel, classes as conditions."""

ATTRIBUTION = "Fashion-MNIST, Copyright 2017 Zalando SE, MIT licence."


def fashion_mnist(folder: str = DEBIAN_FOLDER) -> Source:
    """Fashion-MNIST as a source; captions are names of classes.

    Args:
        folder: folder of its four idx files, gzipped or not; local or s3://.

    Raises:
        UserError: files are missing or broken.
    """
    storage = Storage.at(folder)
    rows = [row for part, split in PARTS.items() for row in _rows(storage, part, split)]
    names = ("key", "caption", "split", "image", "where")
    columns = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return Source("fashion-mnist", index_table(columns, len(rows)), attribution=ATTRIBUTION)


def _rows(storage: Storage, part: str, split: str) -> Iterator[tuple[str, str, str, bytes, str]]:
    """Key, caption, split, image and place of the rows in the files with prefix `part`."""
    images = _read_idx(storage, f"{part}-images-idx3-ubyte")
    labels = _read_idx(storage, f"{part}-labels-idx1-ubyte")
    if len(images) != len(labels) or images.ndim != 3 or labels.max(initial=0) >= len(FASHION_MNIST):
        raise UserError(
            f"{storage.root} holds no Fashion-MNIST ({part}: images {images.shape}, labels {labels.shape} up to "
            f"{labels.max(initial=0)}): give the folder of its four idx files, or `apt install dataset-fashion-mnist`."
        )
    # Netpbm's format for grey images: a header, then the pixels as they are. Pillow reads it, and it takes no encoding.
    header = f"P5 {images.shape[2]} {images.shape[1]} 255\n".encode()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        key = f"{part}-{index:05d}"
        yield key, FASHION_MNIST[label], split, header + image.tobytes(), key


def _read_idx(storage: Storage, name: str) -> np.ndarray:
    """The array of bytes in an idx file: magic number (0, 0, 8, number of axes), sizes as big-endian int32, content.

    Raises:
        UserError: the file is missing or broken.
    """
    content = storage.read(name)
    if content is None and (zipped := storage.read(f"{name}.gz")) is not None:
        with suppress(OSError, EOFError, zlib.error):  # a broken one has no array in it: refused below
            content = gzip.decompress(zipped)
        content = content or b""
    if content is None:
        raise UserError(
            f"there is no {name} in {storage.root}: `apt install dataset-fashion-mnist`, or give the folder of "
            "Fashion-MNIST's four idx files."
        )
    # A file that does not begin as it should is read as a whole, whose size then matches no array: refused below.
    begin = 4 + 4 * content[3] if content[:3] == b"\x00\x00\x08" else 0
    try:
        return np.frombuffer(content, np.uint8, offset=begin).reshape(np.frombuffer(content[4:begin], ">i4"))
    except ValueError as error:
        raise UserError(f"{storage.root}/{name} is a broken idx file ({error}): fetch it again.") from error
