"""The pipeline: one prompt and one seed, one image, however it is asked for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from fewstep.errors import UserError
from fewstep.export import FewStepPipeline, StudentCard, save_student
from fewstep.export.pipeline import read_student_card, write_card
from fewstep.models.heads import GMFlowSettings
from fewstep.models.network import LoRASettings, PolicyNetwork
from fewstep.models.teacher import load_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformer, family, reference = load_teacher("emoji", "qwen_image")
    network = PolicyNetwork(
        transformer, family, GMFlowSettings(components=3, logstd_width=16), LoRASettings(rank=4)
    )
    with torch.no_grad():  # adapters that do something
        for name, parameter in network.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    card = StudentCard(reference, "minilm", "pixel", (3, 16, 16), 4, 2.0, 0.5, 128, 0.7, 3.0)
    save_student(network, card, folder := tmp_path_factory.mktemp("student"))
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> FewStepPipeline:
    return FewStepPipeline.from_pretrained(folder)


PROMPTS = ["red heart, noto style", "a very much longer caption of an owl, fluent style"]


def test_an_image_does_not_depend_on_its_batch(pipe: FewStepPipeline) -> None:
    together = pipe(PROMPTS, seed=[5, 6], output_type="latent").images
    for prompt, seed, latent in zip(PROMPTS, (5, 6), together, strict=True):
        alone = pipe(prompt, seed=seed, output_type="latent").images[0]
        torch.testing.assert_close(alone, latent, atol=1e-4, rtol=0)


def test_the_same_request_twice_is_the_same_image(pipe: FewStepPipeline) -> None:
    first, second = (np.asarray(pipe(PROMPTS[0], seed=3).images[0]) for _ in range(2))
    assert np.array_equal(first, second)
    other = np.asarray(pipe(PROMPTS[0], seed=4).images[0])
    assert not np.array_equal(first, other)


def test_a_loaded_student_is_the_saved_one(pipe: FewStepPipeline, folder: Path) -> None:
    again = FewStepPipeline.from_pretrained(str(folder))
    assert torch.equal(
        pipe(PROMPTS, output_type="latent").images[0], again(PROMPTS, output_type="latent").images[0]
    )


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_other_step_counts_work_and_previews_arrive_after_each(pipe: FewStepPipeline, steps: int) -> None:
    seen: list[int] = []
    images = pipe(PROMPTS, num_inference_steps=steps, on_step=lambda i, x, preview: seen.append(i)).images
    assert seen == list(range(steps))
    assert [image.size for image in images] == [(16, 16)] * 2


def test_the_last_temperature_is_the_card_s_however_it_is_sampled(pipe: FewStepPipeline) -> None:
    conditioning = pipe.encode(PROMPTS[:1])
    noise = torch.randn(1, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0))

    def student(**card: float) -> FewStepPipeline:
        return FewStepPipeline(pipe.network, replace(pipe.card, **card))

    sharpened = student(final_temperature=0.2, final_temperature_below=0.1)
    drawn, x = sharpened.sample(noise, conditioning, 2), noise
    for index in range(2):  # as a server does
        x, _ = sharpened.sample_step(x, conditioning, sharpened.next_step(index, 2))
    assert torch.equal(x, drawn)
    for other in (pipe, student(final_temperature=0.2)):
        assert not torch.equal(drawn, other.sample(noise, conditioning, 2))


def test_other_sizes_work_and_impossible_ones_are_refused(pipe: FewStepPipeline) -> None:
    assert pipe(PROMPTS[0], height=8, width=24).images[0].size == (24, 8)
    for side in (9, 0, -8):
        with pytest.raises(UserError, match="both sides must be multiples of 2"):
            pipe(PROMPTS[0], height=side)


def test_sizes_are_in_pixels_whatever_the_autoencoder_makes_of_them(folder: Path, tmp_path: Path) -> None:
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=3,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    student = shutil.copytree(folder, tmp_path / "student")
    write_card(replace(read_student_card(student), autoencoder=str(tmp_path / "vae")), student)
    pipe = FewStepPipeline.from_pretrained(student)
    assert pipe.size == (32, 32)
    assert pipe.latent_shape() == (3, 16, 16)
    assert pipe(PROMPTS[0], height=16, width=24).images[0].size == (24, 16)
    assert pipe(PROMPTS[0], width=24).images[0].size == (24, 32)
    with pytest.raises(UserError, match=r"an image of 32x18 pixels .* multiples of 4"):
        pipe(PROMPTS[0], height=18)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 to 128, got 0"),
        ({"num_inference_steps": 1000}, "num_inference_steps must be 1 to 128"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"output_type": "pt"}, "output_type must be one of pil, np, latent; got 'pt'"),
    ],
)
def test_impossible_requests_are_refused(pipe: FewStepPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(PROMPTS[0], **arguments)


def test_a_caption_too_long_is_refused(pipe: FewStepPipeline) -> None:
    prompt = "very " * 100 + "long"
    with pytest.raises(UserError, match="too long"):
        pipe(prompt)
    patient = FewStepPipeline(pipe.network, replace(pipe.card, max_tokens=128))
    assert patient(prompt, output_type="latent").images[0].isfinite().all()


def test_another_teacher_than_the_students_own_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "student"
    shutil.copytree(folder, copy)
    card = read_student_card(copy)
    write_card(replace(card, teacher=replace(card.teacher, sha256="0" * 64)), copy)
    with pytest.raises(UserError, match="give the original teacher"):
        FewStepPipeline.from_pretrained(copy)


def test_a_card_is_read_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    card = replace(read_student_card(folder), more_nfes=(2, 8), guidance_interval=(0.1, 0.9))
    write_card(card, tmp_path)
    assert read_student_card(tmp_path) == card
    assert card.nfes == (4, 2, 8)


def test_a_folder_that_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exported student"):
        FewStepPipeline.from_pretrained(tmp_path)
