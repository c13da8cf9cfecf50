from __future__ import annotations

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fewstep.data.prepare import EncodeImages, EncodeText, PreparationConfig, claim, plan, prepare
from fewstep.data.schema import DatasetInfo, Encoding
from fewstep.data.sources import Source, image_folder, prompts
from fewstep.data.stream import read_split
from fewstep.encoders import encoder_widths
from fewstep.errors import UserError
from fewstep.images import Size
from fewstep.storage import Storage

JOB = Path(__file__).parents[2] / "jobs" / "prepare_data.py"
SMALL = PreparationConfig(sizes=(Size(8, 8),), shard_rows=4, least_shards=1)
CLASSES = replace(SMALL, text_encoder="labels:a cat,a very long and winding caption about a cat")
"""For tests that are not about texts: a text encoder takes longer to load than all else."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images with captions, two of them broken, and three bad rows in the table."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    captions = ["a cat", "a cat", "a very long and winding caption about a cat", ""]
    with (folder / "metadata.jsonl").open("w") as table:
        for number in range(12):
            name = f"{number:02d}.png"
            Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(folder / name)
            print(json.dumps({"file_name": name, "text": captions[number % 3]}), file=table)
        print("{not json", file=table)
        print(json.dumps({"file_name": "00.png", "text": ""}), file=table)
        print(json.dumps({"file_name": "gone.png", "text": "a cat"}), file=table)
    content = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(content[: len(content) // 2])
    (folder / "07.png").write_bytes(b"this is no image")
    return folder


def shard_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.parquet"))}


text_stage = functools.cache(EncodeText)


def encoded_here(source: Source, settings: PreparationConfig, root: Path) -> dict[str, bytes]:
    """The shards of a source, made one after the other in this process."""
    width, _ = encoder_widths(settings.text_encoder)
    encoding = Encoding(settings.text_encoder, width, settings.autoencoder)
    images = EncodeImages(settings, encoding, source.storage, Storage.at(root), source.name != "prompts")
    for shard in plan(source, settings)[0]:
        images(text_stage(settings)(shard.as_item()))
    return shard_files(root)


def test_a_folder_becomes_a_dataset_and_what_is_broken_is_counted_listed_and_skipped(
    photos, tmp_path, ray_cluster
):
    lines: list[str] = []
    out = tmp_path / "out"
    info = prepare(image_folder(str(photos), held_out=0.25), out, SMALL, report=lines.append)
    assert info == DatasetInfo.open(out)
    assert sum(info.rows(split) for split in ("train", "held_out")) == 10
    assert info.rejected == {"broken image": 2, "missing file": 1, "no caption": 1, "unreadable row": 1}
    listed = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {row["where"] for row in listed} == {
        "metadata.jsonl:4", "metadata.jsonl:8", "metadata.jsonl:13", "metadata.jsonl:14", "metadata.jsonl:15",
    }  # fmt: skip
    assert {row["detail"].partition(":")[0] for row in listed if row["reason"] == "broken image"} == {
        "03.png",
        "07.png",
    }
    assert any("rejected 5 rows (" in line and "2 broken image" in line for line in lines)

    train, held_out = read_split(out, "train"), read_split(out, "held_out")
    assert not set(train.keys) & set(held_out.keys)
    encoder = text_stage(SMALL).encoder
    for batch in (train, held_out):
        for key, caption, latent, states, mask in zip(
            batch.keys,
            batch.captions,
            batch.latent,
            batch.conditioning.states,
            batch.conditioning.mask,
            strict=True,
        ):
            pixels = Image.open(photos / key).resize((8, 8), Image.Resampling.LANCZOS, box=(4, 0, 16, 12))
            assert torch.equal(
                ((latent.movedim(0, -1) + 1) * 127.5).round(), torch.from_numpy(np.array(pixels)).float()
            )
            assert torch.equal(states[mask], encoder.stored_states([caption])[0])


def test_a_rerun_makes_only_missing_shards_and_the_same_bytes(photos, tmp_path, ray_cluster):
    source, out = image_folder(str(photos), held_out=0.0), tmp_path / "out"
    before = encoded_here(source, CLASSES, out)
    times = {name: (out / name).stat().st_mtime_ns for name in before}
    lost = sorted(before)[1]
    (out / lost).unlink()
    lines: list[str] = []
    manifest = prepare(source, out, CLASSES, report=lines.append).storage.read("dataset.json")
    assert "2 of 3 shards are finished already and are skipped" in lines
    assert shard_files(out) == before
    assert {name for name in before if (out / name).stat().st_mtime_ns != times[name]} == {lost}
    assert prepare(source, out, CLASSES).storage.read("dataset.json") == manifest


def test_other_settings_or_rows_in_the_same_folder_are_refused(photos, tmp_path):
    source, out = image_folder(str(photos), held_out=0.0), tmp_path / "out"
    claim(Storage.at(out), source, SMALL)
    claim(Storage.at(out), source, SMALL)
    with pytest.raises(
        UserError, match=r"was prepared with sizes \['8x8'\], not \['16x16'\]: choose another --out"
    ):
        prepare(source, out, PreparationConfig(sizes=(Size(16, 16),), shard_rows=4))
    with pytest.raises(UserError, match="was prepared with other rows: choose another --out"):
        prepare(image_folder(str(photos), held_out=0.5), out, SMALL)


def test_small_sets_have_shards_for_several_workers_and_older_folders_keep_theirs(photos, tmp_path):
    source = image_folder(str(photos), held_out=0.25)
    settings = PreparationConfig(sizes=(Size(8, 8),))
    shards = Counter(shard.split for shard in plan(source, settings)[0])
    assert shards == {"train": min(8, source.rows["split"].to_pylist().count("train")), "held_out": 1}
    record = claim(Storage.at(tmp_path / "out"), source, settings)
    assert record == settings
    # A folder that a version before 0.2 began has neither of these keys, and one shard per split.
    plan_file = tmp_path / "out" / "plan.json"
    old = {
        k: v for k, v in json.loads(plan_file.read_text()).items() if k not in ("max_pixels", "least_shards")
    }
    plan_file.write_text(json.dumps(old))
    kept = claim(Storage.at(tmp_path / "out"), source, settings)
    assert len([shard for shard in plan(source, kept)[0] if shard.split == "train"]) == 1


def test_images_go_to_the_bucket_of_the_nearest_shape(photos, ray_cluster):
    rng = np.random.default_rng(1)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 12, 3), dtype=np.uint8)).save(photos / f"{number:02d}.png")
    settings = PreparationConfig(sizes=(Size(8, 8), Size(12, 8), Size(8, 12)), shard_rows=4, least_shards=1)
    plans, rejected = plan(image_folder(str(photos), held_out=0.0), settings)
    assert [(p.path, p.size, len(p.rows)) for p in plans] == [
        ("train/3x8x12/part-00000.parquet", Size(12, 8), 4),
        ("train/3x8x12/part-00001.parquet", Size(12, 8), 3),
        ("train/3x12x8/part-00000.parquet", Size(8, 12), 4),
    ]
    assert [(r.where, r.reason) for r in rejected[-1:]] == [("metadata.jsonl:8", "broken image")]


def test_prompts_alone_become_a_dataset_without_latents(tmp_path, ray_cluster):
    text, lines = tmp_path / "prompts.txt", tmp_path / "more.jsonl"
    text.write_text("a red heart\n\na dog\na red heart\n" + "word " * 100 + "\n")
    lines.write_text('{"prompt": "a tree"}\n"a plain string"\n{"caption": null}\n{"caption": 3}\n')
    source = prompts([str(text), str(lines)], held_out=0.0)
    info = prepare(source, tmp_path / "out", SMALL)
    batch = read_split(tmp_path / "out", "train")
    assert sorted(batch.captions) == ["3", "a dog", "a plain string", "a red heart", "a tree"]
    assert batch.latent is None
    assert batch.shape == (3, 8, 8)
    assert info.rejected == {"caption too long": 1, "no caption": 1, "repeated prompt": 1}


def test_a_student_takes_prompts_as_long_as_the_captions_it_learned_from(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("very " * 80 + "long\nshort\n")
    settings = replace(SMALL, max_tokens=128)
    prepare(prompts([str(text)], held_out=0.0), tmp_path / "out", settings, encode=False)
    assert DatasetInfo.open(tmp_path / "out").encoding.max_tokens == 128
    assert read_split(tmp_path / "out", "train").conditioning.mask.sum(1).max() > SMALL.max_tokens


def test_images_and_shards_may_lie_on_s3(photos, tmp_path, s3_bucket, ray_cluster):
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    for file in photos.iterdir():
        client.upload_file(str(file), s3_bucket.removeprefix("s3://"), f"photos/{file.name}")
    out = f"{s3_bucket}/out"
    prepare(image_folder(f"{s3_bucket}/photos", held_out=0.0), out, CLASSES)
    local, remote = encoded_here(image_folder(str(photos), held_out=0.0), CLASSES, tmp_path), Storage.at(out)
    assert {path: remote.read(path) for path in remote.list() if path.endswith(".parquet")} == local

    listed = client.list_objects_v2(Bucket=s3_bucket.removeprefix("s3://"), Prefix="out/train")["Contents"]
    lines: list[str] = []
    prepare(image_folder(f"{s3_bucket}/photos", held_out=0.0), out, CLASSES, report=lines.append)
    again = client.list_objects_v2(Bucket=s3_bucket.removeprefix("s3://"), Prefix="out/train")["Contents"]
    assert "3 of 3 shards are finished already and are skipped" in lines
    assert [(o["Key"], o["LastModified"]) for o in again] == [(o["Key"], o["LastModified"]) for o in listed]


def test_a_killed_run_leaves_whole_shards_only_and_a_rerun_completes_them(tmp_path, ray_cluster):
    import ray

    text, out = tmp_path / "prompts.txt", tmp_path / "out"
    text.write_text("".join(f"prompt number {number}\n" for number in range(120)))
    command = [sys.executable, str(JOB), "--source", "prompts", str(text), "--out", str(out)]
    command += ["--size", "8", "--shard-rows", "4", "--held-out", "0"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while job.poll() is None and len(list(out.rglob("*.parquet"))) < 3:
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL

    whole = {name: (out / name).stat().st_mtime_ns for name in shard_files(out)}
    assert 3 <= len(whole) < 30
    assert all(pq.read_table(out / name).num_rows == 4 for name in whole)
    with pytest.raises(UserError, match="did not finish: run the same"):
        DatasetInfo.open(out)

    source, settings = (
        prompts([str(text)], held_out=0.0),
        PreparationConfig(sizes=(Size(8, 8),), shard_rows=4),
    )
    prepare(source, out, settings)
    assert shard_files(out) == encoded_here(source, settings, tmp_path / "uninterrupted")
    assert all((out / name).stat().st_mtime_ns == changed for name, changed in whole.items())
    assert not list(out.rglob("*.partial"))


def test_an_encoder_that_can_not_be_loaded_is_one_sentence(photos, tmp_path, ray_cluster):
    source = image_folder(str(photos), held_out=0.0)
    with pytest.raises(UserError, match=r"the text encoder '.*nothing' can't be loaded"):
        prepare(
            source,
            tmp_path / "a",
            PreparationConfig(sizes=(Size(8, 8),), text_encoder=str(tmp_path / "nothing")),
        )
    import shutil

    from fewstep.encoders.text import _minilm_folder

    shutil.copytree(_minilm_folder(), tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = PreparationConfig(sizes=(Size(8, 8),), text_encoder=str(tmp_path / "weightless"))
    with pytest.raises(UserError, match=r"^the text encoder '.*weightless' can't be loaded"):
        prepare(source, tmp_path / "c", settings)
    with pytest.raises(UserError, match=r"the autoencoder '.*nothing' can't be loaded"):
        prepare(
            source,
            tmp_path / "b",
            PreparationConfig(sizes=(Size(8, 8),), autoencoder=str(tmp_path / "nothing")),
        )


def test_when_nothing_can_be_encoded_it_says_so(photos, tmp_path, ray_cluster):
    with (tmp_path / "only.csv").open("w") as table:
        writer = csv.writer(table)
        writer.writerows([("file", "caption"), ("07.png", "a cat")])
    source = image_folder(str(photos), captions=str(tmp_path / "only.csv"), held_out=0.0)
    with pytest.raises(
        UserError, match=r"not one row .* could be encoded \(1 broken image; .*rejected.jsonl"
    ):
        prepare(source, tmp_path / "out", SMALL)


def test_the_job_explains_itself_and_its_errors_without_a_traceback(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(JOB), *flags], capture_output=True, text=True, env=os.environ | {"PATH": path}
        )

    page = run("--help")
    assert page.returncode == 0
    assert all(
        word in page.stdout for word in ("--source", "--held-out", "examples", "s3://", "ray job submit")
    )
    failed = run("--out", str(tmp_path / "out"), "--size", "big")
    assert failed.returncode == 2
    assert (
        failed.stderr
        == "error: the size 'big' is not a number of pixels: write 512, or 640x384 (width x height).\n"
    )
    assert run("--source", "folder", "--out", str(tmp_path)).returncode == 2
