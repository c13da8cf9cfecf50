"""Tables of captions are read as text files should be: nothing is cut, replaced or swallowed, and nothing vanishes."""

from __future__ import annotations

import codecs
import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewstep.data.sources import image_folder, prompts
from fewstep.data.tables import CAPTION_COLUMNS, FILE_COLUMNS, RowError, table_rows
from fewstep.errors import UserError


def read(path: Path, *, files: bool = False) -> tuple[list[str], list[str], list[str]]:
    """Captions, rejections ("place reason: detail") and notes of a table."""
    captions, rejected, notes = [], [], []
    needed = (FILE_COLUMNS, CAPTION_COLUMNS) if files else (CAPTION_COLUMNS,)
    for row in table_rows(str(path), needed=needed, tell=notes.append):
        try:
            captions.append(row.text(CAPTION_COLUMNS, "caption"))
        except RowError as error:
            rejected.append(f"{row.where} {error}")
    return captions, rejected, notes


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


BODIES = {
    "t.txt": "größe, a\n\n日本 🎂\n",
    "t.csv": 'caption\n"größe, a"\n日本 🎂\n',
    "t.tsv": "id\tcaption\n1\tgröße, a\n2\t日本 🎂\n",
    "t.jsonl": '{"caption": "größe, a"}\n"日本 🎂"\n',
    "t.ndjson": '{"text": "größe, a"}\n{"text": "日本 🎂"}\n',
    "t.json": '[{"prompt": "größe, a"},\n "日本 🎂"]',
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ],
)
def test_every_encoding_with_a_mark_and_every_kind_of_line_is_read(
    tmp_path, name, ends, encoding, mark
) -> None:
    body = mark + BODIES[name].replace("\n", ends).encode(encoding)
    for path in (
        written(tmp_path, name, body),
        written(tmp_path, name.upper(), body),
        written(tmp_path, f"{name}.gz", gzip.compress(body)),
        written(tmp_path, f"{name}.GZ", gzip.compress(body)),
    ):
        assert read(path)[:2] == (["größe, a", "日本 🎂"], [])


@pytest.mark.parametrize("name", ["t.txt", "t.csv", "t.tsv", "t.jsonl", "t.json"])
@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (b"caf\xe9", "holds bytes that can't be decoded"),
        (b"a\x00b", "NUL byte|Invalid control character"),
        (b"\xff\xfe\xfd", "holds bytes that can't be decoded"),
    ],
)
def test_what_is_no_text_costs_its_own_row_alone(tmp_path, name, bad, fault) -> None:
    rows = [b"first", bad, b"last"]
    line = 3
    if name == "t.txt":
        content, line = b"\n".join(rows), 2
    elif name.endswith("sv"):
        content = b"\n".join([b"caption", *rows])
    elif name == "t.jsonl":
        content, line = b"\n".join(b'{"caption": "%s"}' % row for row in rows), 2
    else:
        content, line = b"[" + b",".join(b'"%s"' % row.replace(b"\0", rb"\u0000") for row in rows) + b"]", 2
    captions, [rejection], _ = read(written(tmp_path, name, content))
    assert captions == ["first", "last"]
    assert rejection.startswith(f"{name}{' row ' if name == 't.json' else ':'}{line} unreadable row: ")
    assert re.search(fault, rejection)


def test_half_an_emoji_costs_its_own_row_alone(tmp_path) -> None:
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"text": "a cake \\ud83c\\udf82"}\n{"text": "half \\ud83c"}\n{"text": "a dog"}\n')
    captions, [rejection], _ = read(lines)
    assert captions == ["a cake 🎂", "a dog"]
    assert rejection.startswith("t.jsonl:2 unreadable row: the column text holds half a surrogate pair")


def test_a_replacement_character_that_somebody_wrote_is_kept(tmp_path) -> None:
    assert read(written(tmp_path, "t.txt", "a � b\n"))[:2] == (["a � b"], [])


def test_files_that_were_joined_have_a_mark_in_their_middle(tmp_path) -> None:
    content = codecs.BOM_UTF8 + b'"a"\n' + codecs.BOM_UTF8 + b'"b"\n'
    assert read(written(tmp_path, "t.jsonl", content))[0] == ["a", "b"]
    content = codecs.BOM_UTF8 + b"a\n" + codecs.BOM_UTF8 + b"b\n"
    assert read(written(tmp_path, "t.txt", content))[0] == ["a", "b"]


def test_lines_end_at_line_ends_alone(tmp_path) -> None:
    odd = "one\u2028two\x0bthree\x85four"
    assert read(written(tmp_path, "t.txt", f"{odd}\nfive\n"))[0] == [odd, "five"]
    assert read(written(tmp_path, "t.jsonl", json.dumps(odd, ensure_ascii=False) + "\n"))[0] == [odd]
    assert read(written(tmp_path, "t.csv", f"caption\n{odd}\nfive\n"))[0] == [odd, "five"]


@pytest.mark.parametrize(
    ("content", "captions", "rejected"),
    [
        # Commas without quotation marks: never cut at the first.
        ("file,text\na.png,a red mug, on a table\nb.png,a dog\n", ["a dog"], ["t.csv:2"]),
        # Cells beyond the last column that are empty come from spreadsheets.
        ("file,text\na.png,a mug,,\n", ["a mug"], []),
        ("file,text\na.png\nb.png,a dog\n", ["a dog"], ["t.csv:2"]),
        # A quotation mark that is not closed: at the end, before a quoted row, before a row that would become a cell.
        ('file,text\na.png,"a mug\nb.png,a dog\nc.png,a cat\n', ["a dog", "a cat"], ["t.csv:2"]),
        ('file,text\na.png,"a mug\nb.png,"a dog"\nc.png,a cat\n', ["a dog", "a cat"], ["t.csv:2"]),
        ('file,text\na.png,"a mug\nb.png,a dog"\nc.png,a cat\n', ["a cat"], ["t.csv:2", "t.csv:3"]),
        ('file,text\na.png,"a mug\nb.png,x\nc.png,y",z\n', [], ["t.csv:2", "t.csv:3", "t.csv:4"]),
        # Rows behind a forgotten mark, or one row with a list in it: not taken for what it may not be.
        ('file,text,tag\na.png,"red,x\nb.png,blue,y"\nc.png,green,z\n', ["green"], ["t.csv:2", "t.csv:3"]),
        ('file,text\na.png,"red\nb.png,blue, sky"\n', [], ["t.csv:2", "t.csv:3"]),
        ('text,file\n"red,a.png\nblue,b.png"\n', [], ["t.csv:2", "t.csv:3"]),
        ('file,text\na.png,"A list:\nb.png, a picture\nend"\n', [], ["t.csv:2", "t.csv:3", "t.csv:4"]),
        ('text,file\n"two dogs, one.cat\nrunning",a.png\n', [], ["t.csv:2", "t.csv:3"]),
        ('file,id,text\na.png,1,"red\n,,blue fox\nb.png,x3,green"\n', [], ["t.csv:2", "t.csv:3", "t.csv:4"]),
        # A separator at the end of every line makes no column in which the rest of a caption may vanish.
        ("file,text,\na.png,red, hot,\nb.png,blue,\n", ["blue"], ["t.csv:2"]),
        (",file,text\n0,a.png,red\n", ["red"], []),
        # Blanks behind a closing quotation mark
        ('file,text\na.png,"red, hot" \nb.png,"blue" ,\n', ["red, hot", "blue"], []),
        ("#TYPE Selected.Row\nfile,text\na.png,a mug\n", ["a mug"], []),
        ('"sep=,"\nfile,text\na.png,a mug\n', ["a mug"], []),
        ("\ufeff\ufefffile,text\na.png,a mug\n", ["a mug"], []),
        ("file,Text,text\na.png,a mug,\n", ["a mug"], []),
        # Quotation marks inside a cell are its own.
        ('file,text\na.png,a "red" mug\n', ['a "red" mug'], []),
        ('file,text\na.png,"a ""red"" mug"\n', ['a "red" mug'], []),
        ('file,text\na.png,"Hello" on a wall\nb.png,a dog\n', ["a dog"], ["t.csv:2"]),
        # Line breaks in a quoted cell are part of it.
        ('file,text\na.png,"a mug,\non a table"\nb.png,a dog\n', ["a mug,\non a table", "a dog"], []),
        ('text,file\n"a mug,\n\non a table",a.png\n', ["a mug,\n\non a table"], []),
        ('text,file\n"a mug,a.png\na dog,b.png\na cat",c.png\n', [], ["t.csv:2", "t.csv:3", "t.csv:4"]),
        ('text,file\n"a mug,a.png\na cat",c.png\nx,d.png\n', ["x"], ["t.csv:2", "t.csv:3"]),
        # A blank after the comma does not hide the quotation mark.
        ('file, text\na.png, "a red, tall mug"\n', ["a red, tall mug"], []),
        ("File , TEXT\na.png,a mug\n", ["a mug"], []),
        ("file;text\na.png;a red, tall mug\n", ["a red, tall mug"], []),
        ("file\ttext\na.png\ta mug; red, tall\n", ["a mug; red, tall"], []),
        ("file|text\na.png|a mug\n", ["a mug"], []),
        ("sep=;\nfile;text\na.png;a mug\n", ["a mug"], []),
        ("\n\nfile,text\n\na.png,a mug\n\n", ["a mug"], []),
        ("file,text\n,\na.png,a mug\n", ["a mug"], ["t.csv:2"]),
        ("file,text,text\na.png,,a mug\n", ["a mug"], []),
        ("file,text,embedding\na.png,a mug," + "9" * 300_000 + "\nb.png,a dog,1\n", ["a mug", "a dog"], []),
        ("file,text\na.png," + "mug " * 50_000 + "\n", [("mug " * 50_000).strip()], []),
    ],
)  # fmt: skip
def test_csv_as_people_write_it(tmp_path, content, captions, rejected) -> None:
    found, rejections, notes = read(written(tmp_path, "t.csv", content), files=True)
    assert found == captions
    assert [rejection.split()[0] for rejection in rejections] == rejected
    assert len(notes) == any(f"file{other}text" in content for other in ";\t|")


def test_many_unclosed_quotation_marks_take_no_more_than_their_rows(tmp_path) -> None:
    lines = ["file,text"]
    for n in range(300):
        lines.append(f'{n}.png,"row {n}' if n % 3 == 0 else f"{n}.png,row {n}")
    captions, rejections, _ = read(written(tmp_path, "t.csv", "\n".join(lines)), files=True)
    assert captions == [f"row {n}" for n in range(300) if n % 3]
    assert len(rejections) == 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "a.png,a red mug\n", r"t.csv has the columns a.png, a red mug, and none of caption, text, prompt"),
        ("t.csv", "", "t.csv is empty"),
        ("t.csv", "caption\na".encode("utf-16-le"), r"first line of t.csv holds a NUL byte.*byte-order mark"),
        ("t.json", '{"a.png": {"caption": "a mug"}}', r"one JSON object with the keys a.png: write a list"),
        ("t.json", '{"data": [{"text": "a mug"}]}', r"one JSON object with the keys data"),
        ("t.tsv", "\n \n", "t.tsv is empty"),
        ("t.json", '[{"text": "a"},', "t.json is not JSON"),
        ("t.parquet", "PAR1", "t.parquet is not a readable Parquet file"),
        ("t.xlsx", "x", r"t.xlsx has the suffix .xlsx.* reads .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt"),
        ("prompts", "a mug\n", "prompts has no suffix"),
        ("t.md", "a mug\n", "suffix .md"),
        ("t.gz", "a mug\n", "t.gz has no suffix"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_as_a_whole_is_refused_in_one_sentence(tmp_path, name, content, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(written(tmp_path, name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [5, -10])
def test_a_torn_gzip_file_is_refused(tmp_path, cut) -> None:
    with pytest.raises(UserError, match=r"t.jsonl.gz is not a whole gzip file .*: compress it again"):
        read(written(tmp_path, "t.jsonl.gz", gzip.compress(b'"a mug"\n' * 1000)[:cut]))


def test_json_of_other_shapes(tmp_path) -> None:
    assert read(written(tmp_path, "a.json", '{"text": "one"}\n{"text": "two"}\n'))[0] == ["one", "two"]
    assert read(written(tmp_path, "b.json", '{"text": "one"}'))[0] == ["one"]
    captions, rejections, _ = read(
        written(tmp_path, "c.jsonl", '["a"]\n{"x": 1}\n3\n{"text": ["a"]}\n' + "[" * 9999)
    )
    assert captions == []
    assert [rejection.partition(": ")[2] for rejection in rejections][:4] == [
        "a JSON list, not an object",
        "none of the columns caption, text, prompt is filled; the row has x",
        "a JSON int, not an object",
        "the column text holds a list, not text",
    ]


def test_parquet_columns_of_every_kind_of_text(tmp_path) -> None:
    texts = ["one", None, "日本"]
    for number, kind in enumerate(
        (
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.binary(),
            pa.dictionary(pa.int32(), pa.string()),
        )
    ):
        values = [t and t.encode() for t in texts] if kind == pa.binary() else texts
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"Text": pa.array(values, kind)}), path)
        captions, [rejection], _ = read(path)
        assert captions == ["one", "日本"]
        assert rejection.startswith(f"{number}.parquet row 2 no caption")
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeok")]
    )
    pq.write_table(pa.table({"text": broken}), tmp_path / "broken.parquet")
    captions, [rejection], _ = read(tmp_path / "broken.parquet")
    assert captions == ["ok"]
    assert "row 1 unreadable row" in rejection


def test_parquet_columns_of_one_name_or_of_numbers(tmp_path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet has two columns text"):
        read(tmp_path / "twice.parquet")
    pq.write_table(pa.table({"Text": ["a", None], "text": ["b", "c"]}), tmp_path / "capitals.parquet")
    assert read(tmp_path / "capitals.parquet")[0] == ["a", "c"]
    pq.write_table(pa.table({"file": [1], "text": ["a"]}), tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match="missing file, there is no 1 in"):
        image_folder(str(tmp_path), held_out=0.0)


def test_pictures_in_a_table_are_said_to_be_there(tmp_path) -> None:
    for kind, value in (
        (pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"bytes": b"x"}),
        (pa.binary(), b"x"),
    ):
        pq.write_table(
            pa.table({"image": pa.array([value], kind), "text": ["a mug"]}), tmp_path / "metadata.parquet"
        )
        with pytest.raises(UserError, match=r"the column image of metadata.parquet holds pictures \("):
            image_folder(str(tmp_path), held_out=0.0)
    (tmp_path / "metadata.parquet").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"image": {"bytes": "eA=="}, "text": "a mug"}\n')
    with pytest.raises(
        UserError, match=r"metadata.jsonl:1, no file, the column image holds a structure, not text"
    ):
        image_folder(str(tmp_path), held_out=0.0)


def test_every_rejection_names_its_file_and_line(tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    written(one, "p.txt", "a mug\n")
    written(two, "p.txt", "a dog\na mug\n")
    source = prompts([str(one / "p.txt"), str(two / "p.txt")], held_out=0.0)
    [rejection] = source.rejected
    assert rejection.where == f"{two}/p.txt:2"
    assert rejection.detail == f"a mug stands at {one}/p.txt:1 already"
    assert source.rows["where"].to_pylist() == [f"{one}/p.txt:1", f"{two}/p.txt:1"]
