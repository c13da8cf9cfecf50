"""Fashion-MNIST: 70,000 grey 28×28 pictures of clothes in 10 classes (MIT licence), from its idx files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from fewstep.data.labels import FASHION_MNIST
from fewstep.data.sources import INDEX, Source
from fewstep.data.storage import Storage
from fewstep.errors import UserError

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where the package `dataset-fashion-mnist` puts it."""

PARTS = {"train": "train", "t10k": "held_out"}
"""Prefix of the files → split: the set's own 10,000 test pictures are held out."""

ATTRIBUTION = "Fashion-MNIST, Copyright 2017 Zalando SE, MIT licence."


def fashion_mnist(folder: str = DEBIAN_FOLDER) -> Source:
    """The set as a source; captions are class names.

    Args:
        folder: of its four idx files, gzipped or not; local or s3://.

    Raises:
        UserError: files are missing, or are not what they should be.
    """
    storage = Storage.at(folder)
    rows = [row for part, split in PARTS.items() for row in _rows(storage, part, split)]
    columns = [
        pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), INDEX, strict=True)
    ]
    return Source("fashion-mnist", pa.table(columns, schema=INDEX), attribution=ATTRIBUTION)


def _rows(storage: Storage, part: str, split: str) -> Iterator[tuple[str, str, str, None, bytes]]:
    """Rows of INDEX."""
    images = _read_idx(storage, f"{part}-images-idx3-ubyte")
    labels = _read_idx(storage, f"{part}-labels-idx1-ubyte")
    if len(images) != len(labels) or images.ndim != 3 or labels.max(initial=0) >= len(FASHION_MNIST):
        raise UserError(
            f"{storage.root} holds no Fashion-MNIST ({part}: images {images.shape}, labels {labels.shape} up to "
            f"{labels.max(initial=0)}): give the folder of its four idx files, or `apt install dataset-fashion-mnist`."
        )
    # Netpbm's grey format: a header before the pixels as they are. Pillow reads it, and nothing need be compressed.
    header = f"P5 {images.shape[2]} {images.shape[1]} 255\n".encode()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield f"{part}-{index:05d}", FASHION_MNIST[label], split, None, header + image.tobytes()


def _read_idx(storage: Storage, name: str) -> np.ndarray:
    """An array of bytes: magic number (0, 0, 8 for bytes, number of axes), axes as big-endian int32, content."""
    content = storage.read(f"{name}.gz")  # unzipped by its suffix
    if content is None:
        content = storage.read(name)
    if content is None:
        raise UserError(
            f"there is no {name} in {storage.root}: `apt install dataset-fashion-mnist`, or give the folder of "
            "Fashion-MNIST's four idx files."
        )
    begin = 4 + 4 * content[3] if content[:3] == b"\x00\x00\x08" else 0
    try:
        return np.frombuffer(content, np.uint8, offset=begin).reshape(np.frombuffer(content[4:begin], ">i4"))
    except ValueError as error:
        raise UserError(f"{storage.root}/{name} is no whole idx file ({error}): get it anew.") from error
