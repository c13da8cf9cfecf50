"""A batch job writes each image once, goes on where it was ended, and draws what the pipeline draws."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest
from PIL import Image

from fewstep.data.sources import prompt_list
from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.student import FewStepPipeline, resolve_student
from fewstep.workflow.batch_generation import BatchConfig, generate_batch

PROMPTS = [f"thing {number}, noto style" for number in range(9)]


@pytest.fixture(scope="module")
def student() -> Path:
    return resolve_student("emoji-student").folder


def manifest(out: Path) -> list[dict[str, object]]:
    return sorted(pads.dataset(out / "manifest").to_table().to_pylist(), key=lambda row: row["index"])


def test_it_draws_what_the_pipeline_draws_and_goes_on(
    student: Path, tmp_path: Path, ray_cluster: str
) -> None:
    prompts = [*PROMPTS, "far too long " * 200]
    config = BatchConfig(images_per_prompt=2, seed=5, nfe=2, unit=8, batch_size=3)
    result = generate_batch(student, prompts, config, str(tmp_path))
    assert (result.images, result.refused, result.made) == (18, 2, 18)
    rows = manifest(tmp_path)
    assert [row["index"] for row in rows] == list(range(20))
    assert [row["seed"] for row in rows] == list(range(5, 25))
    assert "tokens" in rows[-1]["refused"]
    pipe = FewStepPipeline.from_pretrained(student)
    for row in rows[:18]:
        content = (tmp_path / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
    for index in (0, 11):
        row = rows[index]
        assert row["prompt"] == prompts[index // 2]
        [expected] = pipe(row["prompt"], seed=row["seed"], num_inference_steps=2).images
        drawn = np.asarray(Image.open(tmp_path / row["file"]), dtype=int)
        assert np.abs(drawn - np.asarray(expected, dtype=int)).max() <= 1

    again = generate_batch(student, prompts, config, str(tmp_path))
    assert (again.images, again.made) == (18, 0)
    (tmp_path / "manifest" / "part-000000008.parquet").unlink()
    again = generate_batch(student, prompts, config, str(tmp_path))
    assert (again.images, again.made) == (18, 8)
    assert manifest(tmp_path) == rows
    (tmp_path / "manifest" / "part-000000008.parquet").unlink()
    again = generate_batch(student, prompts, config.model_copy(update={"batch_size": 8}), str(tmp_path))
    assert again.made == 8
    # Other batches round otherwise, so that bytes may differ where pixels are one level apart.
    assert [row | {"sha256": None} for row in manifest(tmp_path)] == [row | {"sha256": None} for row in rows]

    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        generate_batch(student, prompts, config.model_copy(update={"seed": 6}), str(tmp_path))
    with pytest.raises(UserError, match="prompts"):
        generate_batch(student, PROMPTS, config, str(tmp_path))


def test_it_writes_to_a_bucket(student: Path, s3_bucket: str, ray_cluster: str) -> None:
    result = generate_batch(student, PROMPTS[:3], BatchConfig(format="webp", nfe=1), f"{s3_bucket}/images")
    assert result.images == 3
    storage = Storage.at(f"{s3_bucket}/images")
    with Image.open(io.BytesIO(storage.read("images/0000/000000002.webp"))) as image:
        assert image.size == (16, 16)


def test_a_job_that_is_killed_twice_ends_with_each_image_once(tmp_path: Path, ray_cluster: str) -> None:
    import ray

    count, out = 96, tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("".join(f"thing {number}, noto style\n" for number in range(count)))
    command = [
        sys.executable, "-m", "fewstep.cli", "generate-batch", "--prompts", str(tmp_path / "prompts.txt"),
        "--out", str(out), "--unit", "8", "--batch-size", "4",
    ]  # fmt: skip
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    for parts in (2, 6):
        running = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
        deadline = time.monotonic() + 180
        while len(list((out / "manifest").glob("part-*.parquet"))) < parts and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{count} images in {out}" in done.stdout
    rows = manifest(out)
    assert [row["index"] for row in rows] == list(range(count))
    files = sorted(str(file.relative_to(out)) for file in (out / "images").rglob("*.*"))
    assert files == sorted(row["file"] for row in rows), "each image once, and nothing else"
    assert all(hashlib.sha256((out / row["file"]).read_bytes()).hexdigest() == row["sha256"] for row in rows)


def test_prompts_are_read_from_tables_and_faulty_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,other\na cat,1\n,2\na cat,3\n")
    told: list[str] = []
    assert prompt_list(str(tmp_path / "p.csv"), told.append) == ["a cat", "a cat"]
    assert "1 rows can't be used" in told[-1]
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="no usable prompt"):
        prompt_list(str(tmp_path / "empty.txt"))
