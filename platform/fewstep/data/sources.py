"""Where examples come from: the emoji set, a folder of images with captions, or prompts alone (see also `fashion`).

Every source gives the same thing, a `Source`: an index of raw rows (image references, not pixels, except for
the small emoji set) and the rows that were rejected while reading it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fewstep.assets import asset
from fewstep.data import emoji
from fewstep.data.seeds import fraction
from fewstep.data.storage import Storage
from fewstep.errors import UserError

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
"""A raw row's image is encoded bytes in `image`, or `file` relative to the source's storage, or neither."""

TABLE_NAMES = tuple(
    f"{stem}.{suffix}" for stem in ("metadata", "captions") for suffix in ("jsonl", "csv", "parquet")
)
FILE_COLUMNS = ("file", "file_name", "image")
CAPTION_COLUMNS = ("caption", "text", "prompt")

EMOJI_BUNDLE, EMOJI_LICENCES = asset("emoji16.parquet"), asset("EMOJI_LICENCES.md")
BUNDLE_SIZE = 16


@dataclass(frozen=True)
class Size:
    """Size of an image bucket in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """`512`, or `640x384` for width x height.

        Raises:
            UserError: neither.
        """
        match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.strip().lower())
        if not match:
            raise UserError(
                f"the size {text!r} is not a number of pixels: write 512, or 640x384 (width x height)."
            )
        return cls(int(match[1]), int(match[2] or match[1]))

    @staticmethod
    def nearest(sizes: Sequence[Size], width: int, height: int) -> Size:
        """The bucket of the nearest aspect ratio (on a logarithmic scale); the first of equals."""
        return min(sizes, key=lambda size: abs(np.log(size.width * height / (size.height * width))))


@dataclass(frozen=True)
class Rejection:
    """A row that can't be used: where it stands, the kind of trouble, and what exactly."""

    where: str
    reason: str
    detail: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """Raw rows.

    Attributes:
        name: kind of source, kept in the manifest.
        rows: index in INDEX's columns, keys unique.
        rejected: rows that did not make it into the index.
        storage: what `file` is relative to; None where rows carry no files.
        attribution: licences and attributions to keep with the data.
    """

    name: str
    rows: pa.Table
    rejected: tuple[Rejection, ...] = ()
    storage: Storage | None = None
    attribution: str = ""

    def digest(self) -> str:
        """SHA-256 over all rows of the index, for recognising the same source on a re-run."""
        digest = hashlib.sha256(self.name.encode())
        for row in self.rows.to_pylist():
            digest.update(repr(tuple(row.values())).encode())
        return digest.hexdigest()


def emoji_set(sizes: Sequence[Size] = (Size(BUNDLE_SIZE, BUNDLE_SIZE),), cache: Path | None = None) -> Source:
    """The emoji set: at 16 pixels from the file that ships with fewstep, otherwise rebuilt from its packages.

    Args:
        sizes: one square.
        cache: folder of the npm archives; None means ~/.cache/fewstep/emoji.

    Raises:
        UserError: another choice of sizes; or see `emoji.fetch`.
    """
    if len(sizes) != 1 or sizes[0].width != sizes[0].height:
        raise UserError(
            f"the emoji set is square, not {', '.join(map(str, sizes))}: give one --size such as 32."
        )
    size = sizes[0].width
    table = (
        read_bundle() if size == BUNDLE_SIZE else _emoji_table(emoji.build(size, cache or default_cache()))
    )
    columns = [
        table["key"],
        table["caption"],
        table["split"],
        pa.nulls(len(table), pa.string()),
        table["image"],
    ]
    return Source("emoji", pa.table(columns, schema=INDEX), attribution=emoji.attributions())


def read_bundle() -> pa.Table:
    """The shipped 16-pixel emoji set: key, concept, style, group, caption, split, image (PNG)."""
    import pyarrow.parquet as pq

    return pq.read_table(EMOJI_BUNDLE)


def write_bundle(cache: Path, target: Path = EMOJI_BUNDLE) -> int:
    """Rebuild the shipped emoji set from the packages; returns the number of images."""
    import pyarrow.parquet as pq

    table = _emoji_table(emoji.build(BUNDLE_SIZE, cache))
    metadata = {b"attribution": emoji.attributions().encode()}
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), target, compression="zstd", compression_level=19)
    return len(table)


def image_folder(folder: str, *, captions: str | None = None, held_out: float) -> Source:
    """A folder of images (local or s3://) with a table of captions.

    Args:
        captions: the table, JSONL, CSV or Parquet; None looks for metadata.* or captions.* in the folder.
            Columns `file` (`file_name`, `image`), relative to the folder, and `caption` (`text`, `prompt`).
        held_out: fraction of images, by a hash of their names, that goes into the held-out split.

    Raises:
        UserError: no such folder or table, or not one usable row in it.
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
    rows, rejected, seen = [], [], {}
    for where, record in _records(captions):
        if isinstance(record, Rejection):
            rejected.append(record)
            continue
        file, caption = _first(record, FILE_COLUMNS), _first(record, CAPTION_COLUMNS)
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
            seen[file] = seen.get(file, 0) + 1
            key = file if seen[file] == 1 else f"{file}#{seen[file]}"
            rows.append((key, caption, _split(file, held_out), file, None))
    return _checked(Source("folder", _index(rows), tuple(rejected), storage), captions)


def prompts(paths: Sequence[str], *, held_out: float) -> Source:
    """Prompts alone: text files, one a line; or JSONL, CSV, Parquet with a column `caption` (or `text`).

    A prompt's key is a hash of its text; exact repetitions are rejected, so that no prompt is in both splits.

    Raises:
        UserError: a file doesn't exist, or holds not one usable row.
    """
    rows, rejected = {}, []
    for path in paths:
        for where, record in _records(path):
            if isinstance(record, Rejection):
                rejected.append(record)
                continue
            caption = _first(record, CAPTION_COLUMNS)
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
    """Decode an image's bytes: upright, transparent parts on white, RGB.

    Raises:
        ValueError: the bytes are no image that Pillow reads, or it is broken.
    """
    from PIL import Image, ImageOps

    with _broken_as_value_error():
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")


def measure(content: bytes) -> tuple[int, int]:
    """Width and height that `open_image` will give, from the header alone.

    Raises:
        ValueError: the bytes are no image that Pillow reads.
    """
    from PIL import ExifTags, Image

    with _broken_as_value_error(), Image.open(io.BytesIO(content)) as image:
        quarter_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.height, image.width) if quarter_turned else image.size


def fit(image: Image, size: Size) -> np.ndarray:
    """Scale to cover `size`, cut the centre out: (height, width, 3) uint8."""
    from PIL import Image, ImageOps

    return np.asarray(
        ImageOps.fit(image, (size.width, size.height), Image.Resampling.LANCZOS), dtype=np.uint8
    )


def default_cache() -> Path:
    return Path.home() / ".cache" / "fewstep" / "emoji"


@contextmanager
def _broken_as_value_error() -> Iterator[None]:
    from PIL import UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:
        # Its own text names a buffer's address, and shards keep the text: the same input, the same bytes.
        raise ValueError("not an image that Pillow reads") from error
    except Exception as error:  # Pillow's plug-ins raise whatever their parsers do
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _emoji_table(images: Sequence[emoji.EmojiImage]) -> pa.Table:
    names = ("key", "concept", "style", "group", "caption", "split")
    columns: dict[str, Any] = {name: [getattr(image, name) for image in images] for name in names}
    columns["image"] = pa.array([_png(image.pixels) for image in images], pa.large_binary())
    return pa.table(columns)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _records(path: str) -> Iterator[tuple[str, dict[str, Any] | Rejection]]:
    """Rows of a table or text file with the place each stands at; one that can't be read is a Rejection."""
    folder, _, name = str(path).rpartition("/")
    storage = Storage.at(folder or ".")
    content = storage.read(name)
    if content is None:
        raise UserError(f"the file {path} doesn't exist: check the path.")
    read = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}.get(
        Path(name).suffix, _text_lines
    )
    for number, record in read(content, path):
        where = f"{name}:{number}"
        if isinstance(record, str):
            yield where, Rejection(where, "unreadable row", record)
        else:
            yield where, record


Numbered = Iterator[tuple[int, dict[str, Any] | str]]
"""Row number and row, or row number and what is wrong with it."""


def _json_lines(content: bytes, path: str) -> Numbered:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            yield number, f"not JSON: {error}"
            continue
        if isinstance(record, str):
            record = {"caption": record}
        yield number, record if isinstance(record, dict) else "not a JSON object"


def _csv_rows(content: bytes, path: str) -> Numbered:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig", errors="replace"), newline=""))
    for record in reader:
        yield reader.line_num, {name: value for name, value in record.items() if name}


def _parquet_rows(content: bytes, path: str) -> Numbered:
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: write it again.") from error
    columns = [name for name in (*FILE_COLUMNS, *CAPTION_COLUMNS) if name in table.column_names]
    yield from enumerate(table.select(columns).to_pylist(), 1)


def _text_lines(content: bytes, path: str) -> Numbered:
    for number, line in enumerate(content.splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            yield number, "not UTF-8 text"
            continue
        if text:
            yield number, {"caption": text}


def _first(record: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first filled text among some columns; a whole number is one too (a class, `labels:1000`)."""
    values = (str(value) if type(value := record.get(name)) is int else value for name in names)
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), None)


def _split(name: str, held_out: float) -> str:
    return "held_out" if fraction(0, f"split/{name}") < held_out else "train"


def _index(rows: Sequence[tuple[str | bytes | None, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [[] for _ in INDEX]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, INDEX, strict=True)], schema=INDEX)


def _checked(source: Source, where: str) -> Source:
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
