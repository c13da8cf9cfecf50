"""Names of files are found however a table writes them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from fewstep.data.file_names import FileNames
from fewstep.data.sources import image_folder
from fewstep.errors import UserError

NFC, NFD = "café.png", unicodedata.normalize("NFD", "café.png")
FILES = ["a.png", "sub/b.png", "sub/a.png", NFD, "UP.PNG", "odd\\name.png", " blank.png", "sub/deep/c.png"]


@pytest.mark.parametrize(
    ("written", "folder", "found"),
    [
        ("a.png", "", "a.png"),
        ("./a.png", "", "a.png"),
        (".//sub/./b.png", "", "sub/b.png"),
        ("sub\\b.png", "", "sub/b.png"),
        (".\\sub\\deep\\c.png", "", "sub/deep/c.png"),
        ("odd\\name.png", "", "odd\\name.png"),
        ("sub//b.png", "", "sub/b.png"),
        ("/data/photos/sub/b.png", "", "sub/b.png"),
        ("/data/photos//a.png", "", "a.png"),
        ("/data/photos/a.png", "sub", "a.png"),
        ("/elsewhere/a.png", "", None),
        ("/a.png", "", None),
        (NFC, "", NFD),
        (NFD, "", NFD),
        ("UP.PNG", "", "UP.PNG"),
        ("up.png", "", None),
        ("a.png", "sub", "sub/a.png"),
        ("b.png", "sub", "sub/b.png"),
        ("../a.png", "sub", "a.png"),
        ("sub/b.png", "sub", "sub/b.png"),
        ("../photos/a.png", "", None),
        ("../../etc/passwd", "sub", None),
        ("", "", None),
        (".", "", None),
        ("sub", "", None),
    ],
)
def test_a_file_is_found_however_its_name_is_written(written: str, folder: str, found: str | None) -> None:
    assert FileNames("/data/photos", FILES).find(written, folder) == found


def test_names_that_differ_in_their_accents_alone_are_told_apart_by_exact_names() -> None:
    names = FileNames("s3://bucket/my photos", [NFC, NFD])
    assert (names.find(NFC), names.find(NFD)) == (NFC, NFD)
    assert FileNames("s3://bucket/my photos", ["a b.png"]).find("s3://bucket/my photos/a b.png") == "a b.png"


def pictures(folder: Path, table: str, rows: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in rows:
        Image.new("RGB", (4, 4)).save(folder / name)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
    (folder / table).write_text("\n".join(lines))


def test_tables_in_split_folders_are_found_and_their_folders_decide_the_split(tmp_path: Path) -> None:
    pictures(tmp_path / "train", "metadata.jsonl", {"a.png": "one", "b.png": "two"})
    source = image_folder(str(tmp_path), held_out=0.5)
    assert sorted(source.rows["key"].to_pylist()) == ["train/a.png", "train/b.png"]
    assert set(source.rows["split"].to_pylist()) == {"train", "held_out"}, "one folder: the hash decides"
    pictures(tmp_path / "validation", "METADATA.JSONL", {"a.png": "three"})
    source = image_folder(str(tmp_path), held_out=0.5)
    splits = dict(zip(*(source.rows[name].to_pylist() for name in ("key", "split")), strict=True))
    assert splits == {"train/a.png": "train", "train/b.png": "train", "validation/a.png": "held_out"}
    assert source.rows["where"].to_pylist()[0] == "train/metadata.jsonl:1"
    assert source.notes


def test_folders_of_splits_count_however_they_are_written_and_wherever_the_table_is(tmp_path: Path) -> None:
    for folder in ("Train", "Test", "extra"):
        pictures(tmp_path / folder, "metadata.jsonl", {"a.png": folder})
    source = image_folder(str(tmp_path), held_out=0.9)
    splits = dict(zip(*(source.rows[name].to_pylist() for name in ("key", "split")), strict=True))
    assert splits == {"Train/a.png": "train", "Test/a.png": "held_out", "extra/a.png": "train"}
    assert "what is in no such folder is for training" in source.notes[0]
    (tmp_path / "captions.csv").write_text("file,text\nTrain/a.png,one\nTest/a.png,two\n")
    source = image_folder(str(tmp_path), held_out=0.9)
    assert source.rows["split"].to_pylist() == ["train", "held_out"]


def test_tables_that_are_not_read_are_named_and_leftovers_of_programs_are_none(tmp_path: Path) -> None:
    pictures(tmp_path, "metadata.jsonl", {"a.png": "one"})
    (tmp_path / "metadata.csv").write_text("file,text\na.png,two\n")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "metadata.csv").write_bytes(b"\0\0")
    source = image_folder(str(tmp_path), held_out=0.0)
    assert source.rows["caption"].to_pylist() == ["one"]
    assert source.notes == ("metadata.jsonl has the captions; not read: metadata.csv",)


def test_a_name_in_other_capitals_is_hinted_at_and_keys_are_unique(tmp_path: Path) -> None:
    pictures(tmp_path, "metadata.jsonl", {"a.png": "one"})
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png#2", "PNG")
    lines = [
        {"file": "a.png#2", "text": "x"},
        *[{"file": "a.png", "text": "y"}] * 2,
        {"file": "A.PNG", "text": "z"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = image_folder(str(tmp_path), held_out=0.0)
    assert source.rows["key"].to_pylist() == ["a.png#2", "a.png", "a.png#3"]
    assert source.rejected[0].detail == f"there is no A.PNG in {tmp_path} (but a.png)"


def test_a_table_outside_of_the_folder_names_files_below_it(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", "other.jsonl", {"a.png": "one"})
    (tmp_path / "photos" / "other.jsonl").rename(tmp_path / "table.jsonl")
    source = image_folder(str(tmp_path / "photos"), captions=str(tmp_path / "table.jsonl"), held_out=0)
    assert source.rows["file"].to_pylist() == ["a.png"]


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [(1, 0.02, 0), (2, 0.02, 1), (5, 0.02, 2), (20, 0.001, 4), (20, 0.999, 16), (20, 0.0, 0), (20, 1.0, 20)],
)
def test_a_small_set_has_rows_of_both_splits(tmp_path: Path, count: int, share: float, held_out: int) -> None:
    pictures(tmp_path, "metadata.jsonl", {f"{number}.png": f"picture {number}" for number in range(count)})
    source = image_folder(str(tmp_path), held_out=share)
    assert source.rows["split"].to_pylist().count("held_out") == held_out
    assert len(source.notes) == (0 < share < 1 and count > 1), "told in one line"


def test_the_columns_that_were_found_and_looked_for_are_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("path,title\na.png,a mug\n")
    with pytest.raises(
        UserError, match=r"has the columns path, title, and none of file, file_name, image: its first line"
    ):
        image_folder(str(tmp_path), held_out=0.0)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"path": "a.png", "title": "a mug"}\n')
    with pytest.raises(UserError, match=r"file, file_name, image is filled; the row has path, title"):
        image_folder(str(tmp_path), held_out=0.0)
