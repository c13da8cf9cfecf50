"""Videos from end to end: film strips to shards, a student of a tiny Wan on Ray, its pictures and its export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines import wan

import tiny
from fewstep.data.prepare import PreparationConfig, prepare
from fewstep.data.schema import DatasetInfo
from fewstep.data.sources import image_folder, prompts
from fewstep.errors import UserError
from fewstep.images import Size
from fewstep.models.teacher import load_teacher
from fewstep.student import FewStepPipeline
from fewstep.student.diffusers import save_diffusers
from fewstep.tracking.address import connect
from fewstep.train.recipe import DistillRecipe, load_recipe
from fewstep.train.trainer import fit
from fewstep.train.validation import _check_fit

FRAMES, PICTURES, SIDE = wan.FRAMES, wan.PICTURES, 16
STRIP = Size(SIDE, PICTURES * SIDE)
SHAPE = (4, FRAMES * SIDE // wan.CELL, SIDE // wan.CELL)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wan.write(folder := tmp_path_factory.mktemp("wan"))
    return folder


def settings(teacher: Path, frames: int = FRAMES) -> PreparationConfig:
    return PreparationConfig(
        (STRIP,),
        text_encoder=f"wan:{teacher}",
        autoencoder=f"{teacher}:vae:{frames}",
        max_tokens=64,
        least_shards=2,
    )


@pytest.fixture(scope="module")
def videos(teacher: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of film strips; the pictures of each become lighter."""
    strips, out = tmp_path_factory.mktemp("strips"), tmp_path_factory.mktemp("data") / "videos"
    rng, lines = np.random.default_rng(0), ["file,caption"]
    shades = np.linspace(0, 200, PICTURES).repeat(SIDE)[:, None, None]
    for index in range(20):
        pixels = shades + rng.integers(0, 50, (PICTURES * SIDE, SIDE, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(strips / f"{index}.png")
        lines.append(f"{index}.png,video {'very ' * (index % 3)}{index}")
    (strips / "captions.csv").write_text("\n".join(lines))
    prepare(image_folder(str(strips), held_out=0.2), out, settings(teacher))
    return out


def recipe(data: Path, teacher: Path, *overrides: str) -> DistillRecipe:
    fixed = [
        f"data.path={data}", "data.batch_size=4", f"teacher.path={teacher}", f"teacher.family=wan:{FRAMES}",
        "teacher.guidance_scale=2", "train.steps=4", "train.threads=1", "train.cpus_per_worker=0.5",
        "train.sample_every=2", "train.activation_checkpointing=true", "student.lora={rank: 4}",
        "student.policy={type: gmflow, components: 3, logstd_width: 16}", "sampler.nfe=2",
        "data.reading=threads",
    ]  # fmt: skip
    return load_recipe(DistillRecipe, None, [*fixed, *overrides])


def from_videos(videos: Path, teacher: Path, folder: Path) -> Path:
    """A student's folder, of a run of two workers, sharded."""
    trained = fit(recipe(videos, teacher, "train.workers=2"))
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    preview = Image.open(
        client.download_artifacts(trained.mlflow_run, "samples/step-000002.png", str(folder))
    )
    assert preview.height > PICTURES * SIDE, "film strips"
    return trained.folder


def from_prompts(_: Path, teacher: Path, folder: Path) -> Path:
    """A student's folder, trained without data."""
    (folder / "prompts.txt").write_text("\n".join(f"video {index}" for index in range(12)))
    info = prepare(prompts([str(folder / "prompts.txt")], held_out=0.3), folder / "data", settings(teacher))
    assert {shard.shape for shard in info.shards} == {SHAPE}
    tiny.train_here(recipe(folder / "data", teacher, "imitation.data_free=true"), folder / "student")
    return folder / "student"


@pytest.mark.slow
@pytest.mark.parametrize("student", [from_videos, from_prompts])
def test_a_student_of_videos(
    student: Callable[[Path, Path, Path], Path],
    videos: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {shard.shape for shard in DatasetInfo.open(videos).shards} == {SHAPE}
    pipe = FewStepPipeline.from_pretrained(student(videos, teacher, tmp_path))
    assert pipe.card.teacher.family == f"wan:{FRAMES}"
    assert pipe.card.latent_shape == SHAPE
    assert pipe.size == (STRIP.height, STRIP.width)
    prompts_given = ["video 1", "a video very very 2"]
    [first, _] = pipe(prompts_given, seed=[0, 1]).images
    assert first.size == (STRIP.width, STRIP.height)
    longer = pipe("video 1", height=2 * STRIP.height, output_type="latent").images
    assert longer.shape[1:] == (4, 2 * SHAPE[1], SHAPE[2])
    with pytest.raises(UserError, match=f"must be a multiple of {PICTURES * wan.CELL}"):
        pipe("video 1", height=STRIP.height + 8)

    save_diffusers(pipe, tmp_path / "exported", merged=True)
    exported = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    ours = pipe(prompts_given, seed=[0, 1], output_type="latent").images
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    theirs = exported(prompts_given, generator=generators, output_type="latent").images
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


def test_another_number_of_frames_than_the_datas_is_refused(videos: Path, teacher: Path) -> None:
    info = DatasetInfo.open(videos)
    for frames in (1, 4):
        network, family, _ = load_teacher(str(teacher), f"wan:{frames}")
        with pytest.raises(
            UserError, match=f"holds videos of {FRAMES} latent frames .* set teacher.family=wan:{FRAMES}"
        ):
            _check_fit(info, network, family, "t")
