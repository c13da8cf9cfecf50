"""Random tables and pictures: no source fails in any other way than by a sentence, and every row is accounted for."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fewstep.data.sources import image_folder, prompts
from fewstep.errors import UserError
from fewstep.images import measure, open_image

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
}
# Any text that has no line break, because what is to be read then is a matter of the format's own rules
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=30)
cells = texts | st.sampled_from(
    ["a mug", '"', '""', 'a "b" c', "a, b", "a; b", "\t", " ", "", "\0", "é", "1"]
)


@given(
    st.binary(max_size=400), st.sampled_from(["txt", "csv", "tsv", "jsonl", "json", "parquet", "jsonl.gz"])
)
@MANY
def test_any_bytes_are_read_or_refused_in_one_sentence(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t.{suffix}"
        path.write_bytes(content)
        try:
            captions = prompts([str(path)], held_out=0.5).rows["caption"].to_pylist()
        except UserError as error:
            captions = []
            one_sentence(error)
        for caption in captions:
            assert caption.encode()
            assert "\0" not in caption


@given(
    st.lists(st.tuples(texts, cells), min_size=1, max_size=12),
    st.sampled_from(sorted(ENCODINGS)),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
@MANY
def test_what_csv_writes_is_read_again_and_nothing_else(rows, encoding, separator, end, zipped) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "caption"])
    writer.writerows(rows)
    content = ENCODINGS[encoding] + buffer.getvalue().encode(encoding)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("t.csv.gz" if zipped else "t.csv")
        path.write_bytes(gzip.compress(content) if zipped else content)
        kept, rejected = outcome([str(path)])
    captions = [caption.strip().removeprefix("\ufeff").strip() for _, caption in rows]
    usable = {caption for caption in captions if caption and "\0" not in caption}
    assert set(kept) == usable
    assert len(kept) + rejected == len(rows)


@given(st.lists(cells, min_size=1, max_size=12), st.sampled_from([",", ";", "\t"]))
@MANY
def test_lines_written_by_hand_are_all_accounted_for(captions: list[str], separator: str) -> None:
    lines = [f"{number}.png{separator}{caption}" for number, caption in enumerate(captions)]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(len(captions)):
            (Path(folder) / f"{number}.png").touch()
        (Path(folder) / "metadata.csv").write_text("\n".join([f"file{separator}text", *lines]) + "\n")
        try:
            source = image_folder(folder, held_out=0.0)
        except UserError as error:
            one_sentence(error, f"{len(captions)} rejected")
            return
    found = dict(zip(*(source.rows[name].to_pylist() for name in ("key", "caption")), strict=True))
    assert len(found) + len(source.rejected) == len(captions)
    for number, caption in enumerate(captions):
        if f"{number}.png" in found and '"' not in caption:
            # Empty cells at the end are what spreadsheets add.
            whole = caption.strip(f"{separator} \t").strip().removeprefix("\ufeff").strip()
            assert found[f"{number}.png"].rstrip(f"{separator} \t") == whole, "cut or joined"


@given(
    st.lists(
        st.text(max_size=20) | st.none() | st.integers() | st.lists(st.text(max_size=3)),
        min_size=1,
        max_size=12,
    )
)
@MANY
def test_json_of_any_values_is_accounted_for(values: list[object]) -> None:
    documents = {
        "t.jsonl": "\n".join(json.dumps({"text": value}) for value in values),
        "t.json": json.dumps([{"text": value} for value in values]),
    }
    for name, document in documents.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(document)
            kept, rejected = outcome([str(path)])
        assert len(kept) + rejected == len(values)


@given(
    st.sampled_from(
        ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B"]
    ),
    st.sampled_from(["PNG", "TIFF", "JPEG", "GIF", "BMP", "PPM", "WEBP", "ICO", "TGA"]),
    st.integers(1, 9),
    st.integers(0, 2**31 - 1),
    st.none() | st.integers(0, 300),
)
@MANY
def test_pictures_of_any_mode_are_read_or_rejected_with_a_reason(mode, kind, side, seed, cut) -> None:
    random = np.random.default_rng(seed)
    dtype, size = {
        "I": (np.int32, 4),
        "F": (np.float32, 4),
        "I;16": (np.uint16, 2),
        "I;16B": (np.uint16, 2),
    }.get(mode, (np.uint8, 1))
    count = (
        side * side * {"LA": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    )
    pixels = random.integers(0, 256, count * size, dtype=np.uint8).tobytes()
    buffer = io.BytesIO()
    try:
        if mode == "1":
            image = Image.fromarray(random.random((side, side)) > 0.5)
        else:
            image = Image.frombytes(mode, (side, side), pixels)
        image.save(buffer, kind)
    except (OSError, ValueError, KeyError):
        return  # Pillow doesn't write this mode into this kind of file
    content = buffer.getvalue()[:cut]
    try:
        shown = open_image(content)
    except ValueError as error:
        one_sentence(error)
        return
    assert shown.mode == "RGB"
    assert measure(content) == shown.size
    assert np.dtype(dtype).itemsize == size


def one_sentence(error: Exception, words: str = "") -> str:
    """The message of an error, which has one line and these words in it."""
    assert "\n" not in str(error)
    assert words in str(error)
    return str(error)


def outcome(paths: list[str]) -> tuple[list[str], int]:
    """The captions of a source of prompts, and how many rows were rejected."""
    try:
        source = prompts(paths, held_out=0.0)
    except UserError as error:
        text = one_sentence(error, "has no usable row (")
        return [], int(text.partition("has no usable row (")[2].split()[0])
    return source.rows["caption"].to_pylist(), len(source.rejected)
