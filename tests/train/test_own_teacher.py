"""A teacher of one's own, end to end: trained, distilled, exported, found again, and generating."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fewstep.data.stream import read_split
from fewstep.evaluate.generation import Method, generate_images
from fewstep.models import get_family
from fewstep.models.family_code import CODE, use_module
from fewstep.models.teacher import load_teacher
from fewstep.student import FewStepPipeline
from fewstep.train.recipe import DistillRecipe, TeacherRecipe, load_recipe
from fewstep.train.trainer import TrainedModel, fit

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "jobs" / "examples" / "own_teacher.py"
CONFIG = {"width": 16, "depth": 2}
SHORT = [
    "data.batch_size=8", "train.steps=4", "train.threads=1", "train.cpus_per_worker=0.5", "train.sample_every=2",
    "data.reading=threads",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """Working folder and home of this module's runs: what is trusted here is trusted nowhere else."""
    home, before = tmp_path_factory.mktemp("own"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        os.chdir(home)
        yield home
        os.chdir(before)


@pytest.fixture(scope="module")
def student(home: Path, tiny_data: Path) -> TrainedModel:
    torch.manual_seed(0)
    use_module(EXAMPLE)
    (folder := home / "teacher").mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(get_family("conv_flow").build(CONFIG).network.state_dict(), folder / "conv_flow.safetensors")
    settings = [
        f"data.path={tiny_data}", f"teacher.module={EXAMPLE}", "teacher.family=conv_flow", f"teacher.path={folder}",
        "teacher.guidance_scale=2", "student.lora={rank: 4}",
        "student.policy={type: gmflow, components: 3, logstd_width: 16}",
        *SHORT,
    ]  # fmt: skip
    return fit(load_recipe(DistillRecipe, None, settings))


def test_the_student_differs_from_its_teacher_and_generates(student: TrainedModel) -> None:
    adapters = load_file(student.folder / "diffusion_pytorch_model.safetensors")
    assert any("lora_B" in name and tensor.any() for name, tensor in adapters.items())
    pipe = FewStepPipeline.from_pretrained(student.folder)
    [image] = pipe("small thing 1", num_inference_steps=2, seed=0).images
    assert image.size == (8, 8)
    assert len(image.getcolors()) > 10


def test_the_student_carries_its_family_along(student: TrainedModel) -> None:
    assert (student.folder / CODE).read_bytes() == EXAMPLE.read_bytes()


def test_samplers_on_the_cluster_find_the_family(student: TrainedModel, tiny_data: Path) -> None:
    methods = [Method("student", 2, student=True), Method("teacher", 2)]
    images = generate_images(student.folder, read_split(str(tiny_data), "held_out", 4), methods)
    assert all(pixels.shape == (4, 8, 8, 3) for pixels in images.values())
    assert not np.array_equal(images["student"], images["teacher"])
    [kept] = Path(".fewstep/teacher_images").iterdir()
    assert np.array_equal(np.load(kept), images["teacher"])


def test_another_process_finds_the_family(student: TrainedModel, home: Path) -> None:
    def generate(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, str(ROOT / "jobs" / "generate.py"), "--model", str(student.folder.absolute()),
            "--prompt", "small thing 1", "--out", str(home / "one.png"),
        ]  # fmt: skip
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | environment, timeout=300
        )

    (home / "elsewhere").mkdir()
    refused = generate(HOME=str(home / "elsewhere"))
    assert refused.returncode == 2
    assert "if you trust it, set FEWSTEP_MODULES" in refused.stderr
    for environment in ({}, {"HOME": str(home / "elsewhere"), "FEWSTEP_MODULES": str(EXAMPLE)}):
        done = generate(**environment)
        assert done.returncode == 0, done.stderr
    with Image.open(home / "one.png") as image:
        assert len(image.getcolors(1 << 16)) > 10


def test_fewstep_trains_such_a_teacher(home: Path, tiny_data: Path) -> None:
    settings = [
        f"data.path={tiny_data}", f"network.module={EXAMPLE}", "network.family=conv_flow",
        f"network.config={CONFIG}", *SHORT, "train.sample_every=0",
    ]  # fmt: skip
    trained = fit(load_recipe(TeacherRecipe, None, settings))
    transformer, _, _ = load_teacher(str(trained.folder), "conv_flow")
    assert transformer.config == CONFIG
