"""Layouts of datasets as people have them, made by the public libraries that write them."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fewstep.data.addresses import find_files, in_braces
from fewstep.data.image_parquet import image_parquet
from fewstep.data.members import image_bytes, rows_with_cells
from fewstep.data.mixture import mixture
from fewstep.data.prepare import PreparationConfig, plan, prepare
from fewstep.data.rows import Source
from fewstep.data.sources import image_folder, prompts
from fewstep.data.stream import read_split
from fewstep.data.tables import Columns
from fewstep.data.webdataset import webdataset
from fewstep.errors import UserError
from fewstep.images import Size, open_image
from fewstep.storage import Storage

COUNT = 12
CAPTIONS = [f"{kind} {number}" for kind in ("picture", "photo", "art", "old") for number in range(COUNT)]
# Captions are classes here: a text encoder takes longer to load than all else.
SMALL = PreparationConfig(
    sizes=(Size(8, 8),), text_encoder=f"labels:{','.join(CAPTIONS)}", shard_rows=4, least_shards=1
)


def picture(number: int, width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def contents(source: Source) -> dict[str, np.ndarray]:
    """Pixels of each row's image by its caption."""
    rows = rows_with_cells(source.rows, source.storage)
    return {row["caption"]: np.asarray(open_image(image_bytes(row, source.storage))) for row in rows}


def assert_all_there(source: Source, caption: str = "picture {}") -> None:
    found = contents(source)
    assert sorted(found) == sorted(caption.format(number) for number in range(COUNT))
    for number in range(COUNT):
        assert np.array_equal(found[caption.format(number)], np.asarray(picture(number)))


def splits(source: Source) -> dict[str, str]:
    return dict(zip(*(source.rows[name].to_pylist() for name in ("caption", "split")), strict=True))


# Hugging Face's imagefolder


def image_files(folder: Path, numbers: range = range(COUNT)) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture(number).save(folder / f"{number:04d}.png")
    return [f"{number:04d}.png" for number in numbers]


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("column", ["text", "caption", "description"])
def test_an_imagefolder_with_metadata_by_pandas(tmp_path: Path, table: str, column: str) -> None:
    pandas = pytest.importorskip("pandas")
    names = image_files(tmp_path / "images")
    frame = pandas.DataFrame(
        {
            "file_name": [f"images/{name}" for name in names],
            column: [f"picture {number}" for number in range(COUNT)],
            "width": 20,
        }
    )
    path = tmp_path / table
    if table.endswith("jsonl"):
        frame.to_json(path, orient="records", lines=True)
    elif table.endswith("csv"):
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    columns = Columns.named([column]) if column == "description" else None
    assert_all_there(image_folder(str(tmp_path), held_out=0.2, columns=columns))


def test_an_imagefolder_that_the_library_datasets_reads_alike(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for split, numbers in {"train": range(8), "validation": range(8, COUNT)}.items():
        folder = tmp_path / "set" / "data" / split
        rows = [
            {"file_name": name, "text": f"picture {n}"}
            for n, name in zip(numbers, image_files(folder, numbers), strict=True)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "c")
    )
    ours = image_folder(str(tmp_path / "set"), held_out=0.0)
    assert_all_there(ours)
    for split, rows in theirs.items():
        for row in rows:
            assert np.array_equal(np.asarray(row["image"]), contents(ours)[row["text"]])
            # Of a folder with other folders around the splits, theirs is the first folder's name alone.
            assert split in ("train", "validation")


def test_several_captions_of_an_image_in_columns_lists_and_structures(tmp_path: Path) -> None:
    names = image_files(tmp_path)
    rows = [
        {"file_name": name, "short": f"s{n}", "long": f"l{n}", "all": [f"a{n}", "", f"b{n}"],
         "nested": {"en": f"e{n}", "De": [f"d{n}"]}}
        for n, name in enumerate(names)
    ]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def captions(*columns: str, seed: int = 0) -> list[str]:
        source = image_folder(str(tmp_path), held_out=0.0, columns=Columns.named(columns, seed=seed))
        return source.rows["caption"].to_pylist()

    assert captions("Long") == [f"l{n}" for n in range(COUNT)]
    chosen = captions("short", "long")
    assert {caption[0] for caption in chosen} == {"s", "l"}
    assert [int(caption[1:]) for caption in chosen] == list(range(COUNT))
    assert chosen == captions("short", "long") != captions("short", "long", seed=1)
    assert {caption[0] for caption in captions("all")} == {"a", "b"}
    assert captions("nested.de") == [f"d{n}" for n in range(COUNT)]
    with pytest.raises(UserError, match="no caption, the column nested holds a structure"):
        captions("nested")
    with pytest.raises(UserError, match=r"none of the columns title is filled; the row has file_name, short"):
        captions("title")


def test_several_captions_in_lists_of_a_parquet_table(tmp_path: Path) -> None:
    names = image_files(tmp_path)
    captions = [[f"a{n}", f"b{n}"] for n in range(COUNT)]
    pq.write_table(pa.table({"file_name": names, "caption": captions}), tmp_path / "metadata.parquet")
    found = image_folder(str(tmp_path), held_out=0.0).rows["caption"].to_pylist()
    assert all(caption in pair for caption, pair in zip(found, captions, strict=True))
    assert {caption[0] for caption in found} == {"a", "b"}
    table = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"title": [f"t{n}" for n in range(5)]}), table)
    source = prompts([str(table)], held_out=0.0, columns=Columns.named(["title"]))
    assert source.rows["caption"].to_pylist() == [f"t{n}" for n in range(5)]


# Parquet with images


def test_parquet_by_the_library_datasets(tmp_path: Path, ray_cluster: str) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, numbers in {
        "train-00000-of-00002": range(5), "train-00001-of-00002": range(5, 9), "test-00000-of-00001": range(9, 12)
    }.items():  # fmt: skip
        rows = {"image": [picture(n) for n in numbers], "text": [f"picture {n}" for n in numbers]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            str(folder / f"{name}.parquet"), batch_size=3
        )
    source = image_parquet([str(tmp_path / "set")], held_out=0.5)
    assert_all_there(source)
    assert splits(source) == {f"picture {n}": "train" if n < 9 else "held_out" for n in range(COUNT)}
    info = prepare(source, tmp_path / "out", SMALL)
    assert (info.rows("train"), info.rows("held_out"), info.rejected) == (9, 3, {})
    latents = {
        caption: latent
        for split in ("train", "held_out")
        for batch in [read_split(tmp_path / "out", split)]
        for caption, latent in zip(batch.captions, batch.latent, strict=True)
    }
    for number in range(COUNT):
        pixels = picture(number).resize((8, 8), Image.Resampling.LANCZOS, box=(4, 0, 16, 12))
        shown = ((latents[f"picture {number}"].movedim(0, -1) + 1) * 127.5).round().numpy()
        assert np.array_equal(shown, np.array(pixels))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), "struct", "paths", "struct of paths"])
def test_parquet_with_images_of_every_kind(tmp_path: Path, ray_cluster: str, kind: Any) -> None:
    names = image_files(tmp_path / "pictures")
    if kind == "struct":
        images = pa.array([{"bytes": png(n), "path": None} for n in range(COUNT)])
    elif kind == "struct of paths":
        images = pa.array(
            [{"bytes": None, "path": f"pictures/{name}"} for name in names],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    elif kind == "paths":
        images = pa.array([f"pictures/{name}" for name in names])
    else:
        images = pa.array([png(n) for n in range(COUNT)], kind)
    table = pa.table({"n": range(COUNT), "image": images, "caption": [f"picture {n}" for n in range(COUNT)]})
    pq.write_table(table, tmp_path / "set.parquet", row_group_size=5)
    assert_all_there(image_parquet([str(tmp_path)], held_out=0.2))
    renamed = table.rename_columns(["n", "Photo of it", "title"])
    pq.write_table(renamed, tmp_path / "set.parquet", row_group_size=5)
    columns = Columns.named(["Title"], "photo of it")
    assert_all_there(image_parquet([f"{tmp_path}/*.parquet"], held_out=0.2, columns=columns))


def test_parquet_by_pandas(tmp_path: Path, ray_cluster: str) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "image": [{"bytes": png(n), "path": f"{n}.png"} for n in range(COUNT)],
            "text": [f"picture {n}" for n in range(COUNT)],
        }
    )
    frame.to_parquet(tmp_path / "set.parquet")
    assert_all_there(image_parquet([str(tmp_path / "set.parquet")], held_out=0.2))


def test_rows_of_parquet_files_that_can_not_be_used(tmp_path: Path, ray_cluster: str) -> None:
    images = [
        {"bytes": png(0), "path": "a"},
        {"bytes": None, "path": None},
        {"bytes": b"x", "path": "c"},
        None,
    ]
    pq.write_table(pa.table({"image": images, "text": CAPTIONS[:4]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": images[:2], "text": [CAPTIONS[4], None]}), tmp_path / "b.parquet")
    source = image_parquet([str(tmp_path)], held_out=0.0)
    assert [r.where for r in source.rejected] == ["b.parquet row 2"]
    info = prepare(source, tmp_path / "out", SMALL)
    assert info.rows("train") == 2
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {(row["where"], row["detail"].partition(": ")[2]) for row in listed[1:]} == {
        ("a.parquet row 2", "the cell is empty"), ("a.parquet row 3", "not an image that Pillow reads"),
        ("a.parquet row 4", "the cell is empty"),
    }  # fmt: skip


def test_a_parquet_file_that_is_damaged_costs_its_own_rows(tmp_path: Path, ray_cluster: str) -> None:
    path = tmp_path / "a.parquet"
    images = [{"bytes": png(n), "path": None} for n in range(COUNT)]
    table = pa.table({"image": images, "text": [f"picture {n}" for n in range(COUNT)]})
    pq.write_table(table, path, row_group_size=6, compression="zstd")
    content = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    info = prepare(image_parquet([str(path)], held_out=0.0), tmp_path / "out", SMALL)
    assert info.rows("train") == 6
    assert info.rejected == {"broken image": 6}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1]}, "a.parquet has the columns label, and none of image, img,.*--image-column"),
        (
            {"image": [png(0)], "label": [1]},
            "none of caption, text, prompt, txt: name .* with --caption-column",
        ),
    ],
)
def test_columns_that_are_missing_are_named(
    tmp_path: Path, ray_cluster: str, columns: dict[str, list], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        image_parquet([str(tmp_path)], held_out=0.0)


def test_rows_that_are_read_together_stay_together_and_others_are_shuffled(
    tmp_path: Path, ray_cluster: str
) -> None:
    rows = {"image": [b"x"] * 1000, "text": [f"{n}" for n in range(1000)]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet", row_group_size=500)
    source = image_parquet([str(tmp_path)], held_out=0.0)
    settings = PreparationConfig(sizes=(Size(8, 8),), shard_rows=128, least_shards=1)
    [first, *_], _ = plan(source, settings)
    numbers = [int(caption) for caption in first.rows["caption"].to_pylist()]
    runs = 1 + sum(after != before + 1 for before, after in itertools.pairwise(numbers))
    assert 2 <= runs <= 4
    assert numbers != list(range(numbers[0], numbers[0] + len(numbers)))


# WebDataset


def write_tars(folder: Path, pattern: str, samples: list[dict[str, Any]], per_tar: int = 5) -> None:
    wds = pytest.importorskip("webdataset")
    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(folder / pattern), maxcount=per_tar, verbose=0) as sink:
        for sample in samples:
            sink.write(sample)


@pytest.mark.parametrize("kind", ["txt", "json", "other json", "cls"])
@pytest.mark.parametrize("image", ["png", "webp"])
def test_tars_by_the_library_webdataset(tmp_path: Path, ray_cluster: str, kind: str, image: str) -> None:
    texts = {
        "txt": lambda n: {"txt": f"picture {n}"},
        "json": lambda n: {"json": {"width": 20, "caption": f"picture {n}"}},
        "other json": lambda n: {"json": {"meta": {"title": f"picture {n}"}}, "txt": "no"},
        "cls": lambda n: {"cls": n},
    }[kind]
    encoded = {"png": png, "webp": lossless_webp}[image]
    samples = [{"__key__": f"a/{n:04d}", image: encoded(n), **texts(n)} for n in range(COUNT)]
    write_tars(tmp_path / "set", "%03d.tar", samples)
    columns = Columns.named(["meta.title"]) if kind == "other json" else None
    source = webdataset([f"{tmp_path}/set/{{000..002}}.tar"], held_out=0.2, columns=columns)
    assert_all_there(source, "{}" if kind == "cls" else "picture {}")
    assert source.rows["key"].to_pylist()[0] == "000.tar/a/0000"
    assert webdataset([str(tmp_path / "set")], held_out=0.2, columns=columns).digest() == source.digest()


def lossless_webp(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def test_tars_of_splits_on_s3_are_prepared(tmp_path: Path, ray_cluster: str, s3_bucket: str) -> None:
    samples = [{"__key__": f"{n:04d}", "png": png(n), "txt": f"picture {n}"} for n in range(COUNT)]
    write_tars(tmp_path, "train-%03d.tar", samples[:8], 4)
    write_tars(tmp_path, "val-%03d.tar", samples[8:], 4)
    storage = Storage.at(f"{s3_bucket}/a set")
    for tar in tmp_path.glob("*.tar"):
        storage.write(tar.name, tar.read_bytes())
    source = webdataset([f"{s3_bucket}/a set/{{train-{{000..001}},val-000}}.tar"], held_out=0.0)
    assert_all_there(source)
    assert splits(source) == {f"picture {n}": "train" if n < 8 else "held_out" for n in range(COUNT)}
    info = prepare(source, f"{s3_bucket}/out", SMALL)
    assert (info.rows("train"), info.rows("held_out"), info.rejected) == (8, 4, {})


def test_tars_with_odd_samples(tmp_path: Path, ray_cluster: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in {
            "./" + "x" * 120 + ".jpg": png(0), "./" + "x" * 120 + ".txt": b"a long name",
            "folder.v1/a.b.png": png(1), "folder.v1/a.b.txt": b"no",
            "none.txt": b"no image", "broken.png": png(2), "broken.json": b"{", "c.PNG": png(3), "c.TXT": b"capitals",
            ".hidden": b"", "README": b"", "d.png": png(4), "d.txt": b"\xff", "e.npy": b"\0", "e.txt": b"x",
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo("folder"))
    source = webdataset([str(tmp_path / "a.tar")], held_out=0.0)
    assert source.rows["caption"].to_pylist() == ["a long name", "capitals"]
    assert [(r.where, r.reason) for r in source.rejected] == [
        ("a.tar/folder.v1/a", "no caption"), ("a.tar/none", "no image"), ("a.tar/broken", "unreadable row"),
        ("a.tar/d", "unreadable row"), ("a.tar/e", "no image"),
    ]  # fmt: skip


def test_a_tar_that_is_cut_or_zipped_or_none(tmp_path: Path, ray_cluster: str) -> None:
    samples = [{"__key__": f"{n:04d}", "png": png(n), "txt": f"picture {n}"} for n in range(COUNT)]
    write_tars(tmp_path / "set", "%03d.tar", samples, COUNT)
    path = tmp_path / "set" / "000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    source = webdataset([str(path)], held_out=0.0)
    assert 3 <= len(source.rows) < COUNT
    assert len(contents(source)) == len(source.rows)
    [rejection] = source.rejected
    assert rejection.reason == "broken archive"
    import gzip

    path.write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=r"000.tar is compressed, .*: unzip it first"):
        webdataset([str(path)], held_out=0.0)
    with pytest.raises(UserError, match=r"there is no .tar file at .*/nothing"):
        webdataset([str(tmp_path / "nothing")], held_out=0.0)
    with pytest.raises(UserError, match=r"the file .*/7.tar doesn't exist"):
        webdataset([str(tmp_path / "7.tar")], held_out=0.0)
    path.write_bytes(b"no tar" * 1000)
    with pytest.raises(
        UserError, match=r"has no usable row \(1 rejected; the first: 000.tar, broken archive"
    ):
        webdataset([str(path)], held_out=0.0)


# Addresses


def test_braces_stand_for_several() -> None:
    assert list(in_braces("a{08..11}.tar")) == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert list(in_braces("{a,b}{1..2}")) == ["a1", "a2", "b1", "b2"]
    assert list(in_braces("{9..11}")) == ["9", "10", "11"]
    assert list(in_braces("{2..0}")) == ["2", "1", "0"]
    assert list(in_braces("a{b}{}")) == ["a{b}{}"]
    assert list(in_braces("x/{a-{0..1},b}")) == ["x/a-0", "x/b", "x/a-1"]


def test_files_folders_and_patterns_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.tar", "a/2.TAR", "a/b/3.tar", "c/4.tar", "c/x.txt", "c/.cache/5.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def found(*paths: str) -> tuple[str, list[str]]:
        storage, names = find_files(paths, ".tar")
        return storage.root.removeprefix(str(tmp_path)), names

    assert found("a") == ("/a", ["1.tar", "2.TAR", "b/3.tar"])
    assert found(f"{tmp_path}/a/", "c") == ("", ["a/1.tar", "a/2.TAR", "a/b/3.tar", "c/4.tar"])
    assert found("a/*.tar") == ("/a", ["1.tar"])
    assert found("*/*.tar") == ("", ["a/1.tar", "c/4.tar"])
    assert found("**/*.tar", "c/4.tar") == ("", ["a/1.tar", "a/b/3.tar", "c/4.tar"])
    assert found("a/[12].*") == ("/a", ["1.tar", "2.TAR"])
    assert found("c/4.tar", "a/1.tar") == ("", ["c/4.tar", "a/1.tar"])
    assert found(f"file://{tmp_path}/a/b") == ("/a/b", ["3.tar"])
    with pytest.raises(UserError, match="are in different storages: prepare them with --source mix"):
        found("a", "s3://bucket/a")
    with pytest.raises(UserError, match="are in different storages"):
        found("s3://one/a", "s3://two/a")


@pytest.mark.parametrize("offline", [True, False], ids=["asked for", "found out"])
def test_without_a_network_a_hub_address_is_one_sentence(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    # The hub's client lists nothing where it was told not to connect, and raises where it can't.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    address = "hf://datasets/org/name"
    for read in (image_parquet, webdataset, image_folder):
        with pytest.raises(UserError, match=f"{address}.*network") as caught:
            read(address if read is image_folder else [address], held_out=0.0)
        assert "\n" not in str(caught.value)


# Mixtures


def test_a_mixture_has_rows_by_weight_and_the_images_of_each(tmp_path: Path, ray_cluster: str) -> None:
    names = image_files(tmp_path / "photos")
    rows = [{"file_name": name, "title": f"photo {n}"} for n, name in enumerate(names)]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*rows, {}])))
    tars = [{"__key__": f"{n:04d}", "png": png(n), "txt": f"art {n}"} for n in range(COUNT)]
    write_tars(tmp_path / "art", "%03d.tar", tars)
    table = {"image": [png(n) for n in range(COUNT)], "text": [f"old {n}" for n in range(COUNT)]}
    pq.write_table(pa.table(table), tmp_path / "old.parquet")
    sources = tmp_path / "sources.yaml"
    sources.write_text(f"""
photos: {{source: folder, path: {tmp_path}/photos, caption_column: title, weight: 2, held_out: 0.34}}
art: {{source: webdataset, path: ["{tmp_path}/art"], weight: 0.5, held_out: 0}}
old: {{source: parquet, path: "{tmp_path}/*.parquet", weight: 1.5, held_out: 0}}
""")
    source = mixture(str(sources), held_out=0.0)
    assert len(set(source.rows["key"].to_pylist())) == len(source.rows)
    captions = source.rows["caption"].to_pylist()
    counts = {name: [c.split()[0] for c in captions].count(name) for name in ("photo", "art", "old")}
    held_out = sum(split == "held_out" for split in source.rows["split"].to_pylist())
    assert held_out >= 3
    assert counts["photo"] == 2 * COUNT - held_out
    assert 0 < counts["art"] < COUNT < counts["old"] < 2 * COUNT
    for caption, pixels in contents(source).items():
        assert np.array_equal(pixels, np.asarray(picture(int(caption.split()[1]))))
    assert [(r.where, r.reason) for r in source.rejected] == [("photos: metadata.jsonl:13", "no file")]
    assert source.digest() == mixture(str(sources), held_out=0.0).digest()
    assert source.digest() != mixture(str(sources), held_out=0.0, seed=1).digest()
    info = prepare(source, tmp_path / "out", replace(SMALL, sizes=(Size(8, 8), Size(16, 8)), shard_rows=256))
    assert sum(info.rows(split) for split in info.splits) == len(source.rows)


def test_a_mixture_of_prompts_is_one_of_prompts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{n} of both\n" for n in range(COUNT)))
    sources = tmp_path / "sources.yaml"
    lines = [f"{name}: {{source: prompts, path: {tmp_path}/{name}.txt}}" for name in ("a", "b")]
    sources.write_text("\n".join(lines))
    source = mixture(str(sources), held_out=0.1)
    assert (source.name, source.storage, len(source.rows)) == ("prompts", None, 2 * COUNT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no sources by name"),
        ("- a", "holds no sources by name"),
        ("a: {", "is not YAML"),
        ("a/b: {source: folder, path: x}", "'a/b' can't be the name of a source"),
        ("a: {source: books, path: x}", r"a.*source"),
        ("a: {source: folder, path: x, wieght: 2}", r"wieght"),
        ("a: {source: folder, path: x, weight: 0}", r"weight"),
        ("a: {source: folder, path: [x, y]}", "has one path, not 2"),
        ("a: {source: prompts, path: P}\nb: {source: folder, path: F}", "a has prompts without images and b has"),
    ],
)  # fmt: skip
def test_a_file_of_sources_that_can_not_be_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    image_files(tmp_path / "f", range(2))
    (tmp_path / "f" / "metadata.csv").write_text("file,text\n0000.png,one\n")
    path = tmp_path / "sources.yaml"
    path.write_text(content.replace("P", str(tmp_path / "p.txt")).replace("F", str(tmp_path / "f")))
    with pytest.raises(UserError, match=message) as caught:
        mixture(str(path), held_out=0.0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="can't be read"):
        mixture(str(tmp_path / "none.yaml"), held_out=0.0)


# Small images


@pytest.mark.parametrize("sizes", [(Size(8, 8),), (Size(8, 8), Size(16, 8))])
def test_images_that_are_too_small_are_rejected(
    tmp_path: Path, ray_cluster: str, sizes: tuple[Size, ...]
) -> None:
    for number, (width, height) in enumerate([(20, 12), (12, 12), (30, 11), (11, 40)]):
        picture(number, width, height).save(tmp_path / f"{number}.png")
    (tmp_path / "metadata.csv").write_text(
        "file,text\n" + "".join(f"{n}.png,picture {n}\n" for n in range(4))
    )
    settings = replace(SMALL, sizes=sizes, min_size=12)
    info = prepare(image_folder(str(tmp_path), held_out=0.0), tmp_path / "out", settings)
    assert (info.rows("train"), info.rejected) == (2, {"small image": 2})
    listed = [
        json.loads(line)["detail"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert sorted(listed) == [
        "2.png: 30x11 pixels, and --min-size is 12", "3.png: 11x40 pixels, and --min-size is 12",
    ]  # fmt: skip
