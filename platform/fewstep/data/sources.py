"""Sources of examples: a folder of images with captions, or prompts without images. `datasets` has the bundled sets.

Every source is read into a `Source`: an index of raw rows (with the names of image files rather than pixels, except for
the small bundled sets), and the rows that were rejected.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fewstep.data.seeds import fraction
from fewstep.data.tables import CAPTION_COLUMNS, FILE_COLUMNS, Rejection, first_text, table_rows
from fewstep.errors import UserError
from fewstep.storage import Storage

if TYPE_CHECKING:
    from PIL.Image import Image

INDEX = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("file", pa.string()),
        pa.field("image", pa.large_binary()),
    ]
)
"""Columns of raw rows. A row's image is the bytes in `image`, or the `file` in the source's storage, or neither."""

# Files that are looked for as the table of captions, in this order
TABLE_NAMES = tuple(
    f"{stem}.{suffix}" for stem in ("metadata", "captions") for suffix in ("jsonl", "csv", "parquet")
)


@dataclass(frozen=True)
class Size:
    """Size of an image bucket in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read a size written as `512` (a square) or `640x384` (width x height).

        Raises:
            UserError: it is written otherwise.
        """
        match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.strip().lower())
        if not match:
            raise UserError(
                f"the size {text!r} is not a number of pixels: write 512, or 640x384 (width x height)."
            )
        return cls(int(match[1]), int(match[2] or match[1]))

    @staticmethod
    def nearest(sizes: Sequence[Size], width: int, height: int) -> Size:
        """The size with the aspect ratio nearest to width / height, on a logarithmic scale; the first of equals."""
        return min(sizes, key=lambda size: abs(np.log(size.width * height / (size.height * width))))


@dataclass(frozen=True)
class Source:
    """Raw rows to prepare.

    Attributes:
        name: kind of source; stored in the manifest.
        rows: index with INDEX's columns; keys are unique.
        rejected: rows that could not be used.
        storage: the storage that holds the rows' files; None where rows name no files.
        attribution: licences and attributions, stored with the data.
    """

    name: str
    rows: pa.Table
    rejected: tuple[Rejection, ...] = ()
    storage: Storage | None = None
    attribution: str = ""

    def digest(self) -> str:
        """SHA-256 over all rows of the index, by which the same source is recognised when preparing again."""
        digest = hashlib.sha256(self.name.encode())
        for row in self.rows.to_pylist():
            digest.update(repr(tuple(row.values())).encode())
        return digest.hexdigest()


def image_folder(folder: str, *, captions: str | None = None, held_out: float) -> Source:
    """The images of a folder, with a table of their captions.

    Args:
        folder: local, or s3://.
        captions: the table, JSONL, CSV or Parquet; None looks for metadata.* or captions.* in the folder.
            Columns `file` (`file_name`, `image`), relative to the folder, and `caption` (`text`, `prompt`).
        held_out: share of the images, chosen by a hash of their names, that goes into the held-out split.

    Raises:
        UserError: there is no such folder or table, or no usable row in it.
    """
    storage = Storage.at(folder)
    files = storage.list()
    if captions is None:
        found = [name for name in TABLE_NAMES if name in files]
        if not found:
            raise UserError(
                f"there is no table of captions in {storage.root} (looked for {', '.join(TABLE_NAMES)}): "
                "add one with the columns file and caption, or name it with --captions."
            )
        captions = f"{storage.root}/{found[0]}"
    rows: list[tuple[str | bytes | None, ...]] = []
    rejected: list[Rejection] = []
    seen: dict[str, int] = {}
    # Rows that can't be used are listed rather than fatal: large tables have some.
    for where, record in table_rows(captions):
        if isinstance(record, Rejection):
            rejected.append(record)
            continue
        file, caption = first_text(record, FILE_COLUMNS), first_text(record, CAPTION_COLUMNS)
        if file is None:
            rejected.append(
                Rejection(where, "no file", f"none of the columns {', '.join(FILE_COLUMNS)} is filled")
            )
        elif caption is None:
            rejected.append(
                Rejection(where, "no caption", f"none of the columns {', '.join(CAPTION_COLUMNS)} is filled")
            )
        elif file not in files:
            rejected.append(Rejection(where, "missing file", f"{storage.root}/{file} doesn't exist"))
        else:
            # An image with several captions is several rows; keys have to be unique.
            seen[file] = seen.get(file, 0) + 1
            key = file if seen[file] == 1 else f"{file}#{seen[file]}"
            rows.append((key, caption, _split(file, held_out), file, None))
    return _checked(Source("folder", _index(rows), tuple(rejected), storage), captions)


def prompts(paths: Sequence[str], *, held_out: float) -> Source:
    """Prompts without images, for data-free distillation.

    A prompt's key is a hash of its text. Exact repetitions are rejected, so that no prompt is in both splits.

    Args:
        paths: text files with a prompt per line; or JSONL, CSV, Parquet with a column `caption` (`text`, `prompt`).
        held_out: share of the prompts, chosen by a hash of their text, that goes into the held-out split.

    Raises:
        UserError: a file doesn't exist, or there is no usable row in any.
    """
    rows, rejected = {}, []
    for path in paths:
        for where, record in table_rows(path):
            if isinstance(record, Rejection):
                rejected.append(record)
                continue
            caption = first_text(record, CAPTION_COLUMNS)
            if caption is None:
                rejected.append(
                    Rejection(where, "no caption", f"none of {', '.join(CAPTION_COLUMNS)} is filled")
                )
                continue
            key = hashlib.sha256(caption.encode()).hexdigest()[:24]
            if key in rows:
                rejected.append(Rejection(where, "repeated prompt", caption[:80]))
            else:
                rows[key] = (key, caption, _split(key, held_out), None, None)
    return _checked(Source("prompts", _index(list(rows.values())), tuple(rejected)), ", ".join(paths))


def open_image(content: bytes) -> Image:
    """Decode an image's bytes to RGB, turned upright, with transparent parts on white.

    Raises:
        ValueError: the bytes are no image that Pillow reads, or a broken one.
    """
    from PIL import Image, ImageOps

    with _broken_as_value_error():
        # Cameras may store an image unrotated, with its orientation in EXIF.
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")


def measure(content: bytes) -> tuple[int, int]:
    """Width and height of the image that `open_image` gives, from the file's header.

    Raises:
        ValueError: the bytes are no image that Pillow reads.
    """
    from PIL import ExifTags, Image

    with _broken_as_value_error(), Image.open(io.BytesIO(content)) as image:
        # EXIF orientations 5 to 8 turn by 90° or 270°.
        quarter_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.height, image.width) if quarter_turned else image.size


def fit(image: Image, size: Size) -> np.ndarray:
    """Scale an image to cover `size` and cut out its centre, (height, width, 3) uint8."""
    from PIL import Image, ImageOps

    return np.asarray(
        ImageOps.fit(image, (size.width, size.height), Image.Resampling.LANCZOS), dtype=np.uint8
    )


@contextmanager
def _broken_as_value_error() -> Iterator[None]:
    """A context in which whatever Pillow raises about an image becomes a ValueError of one line."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:
        # Pillow's own text has a memory address in it, and shards store the text: the same input must make the same
        # bytes.
        raise ValueError("not an image that Pillow reads") from error
    except Exception as error:  # Pillow's plug-ins raise errors of many kinds
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _split(name: str, held_out: float) -> str:
    """The split of a row: by a hash of its name, so that it is the same whatever other rows there are."""
    return "held_out" if fraction(0, f"split/{name}") < held_out else "train"


def _index(rows: Sequence[tuple[str | bytes | None, ...]]) -> pa.Table:
    """Rows, given as values of INDEX's columns, as a table."""
    columns = zip(*rows, strict=True) if rows else [[] for _ in INDEX]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, INDEX, strict=True)], schema=INDEX)


def _checked(source: Source, where: str) -> Source:
    """The source, if it has any row.

    Raises:
        UserError: it has none.
    """
    if not len(source.rows):
        first = (
            f"; the first: {source.rejected[0].reason}, {source.rejected[0].detail}"
            if source.rejected
            else ""
        )
        raise UserError(
            f"{where} has no usable row ({len(source.rejected)} rejected{first}): nothing can be prepared."
        )
    return source
