"""The pipeline: one prompt and one seed, one image, however it is asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, TeacherSamplerConfig, gaussian_noise
from fewstep.models.adapters import LoRAConfig
from fewstep.models.heads import GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.teacher import load_teacher
from fewstep.student import (
    FewStepPipeline,
    StudentCard,
    read_student_card,
    resolve_student,
    save_student,
    write_student_card,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformer, family, reference = load_teacher("emoji", "qwen_image")
    network = PolicyNetwork(
        transformer, family, GMFlowConfig(components=3, logstd_width=16), LoRAConfig(rank=4)
    )
    with torch.no_grad():  # adapters that do something
        for name, parameter in network.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    card = StudentCard(
        teacher=reference,
        text_encoder="minilm",
        autoencoder="pixel",
        latent_shape=(3, 16, 16),
        sampler=SamplerConfig(nfe=4, shift=2.0, final_step_scale=0.5, temperature=0.7),
        teacher_sampler=TeacherSamplerConfig(guidance_scale=3.0),
    )
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

    def student(**sampler: float) -> FewStepPipeline:
        card = pipe.card.model_copy(update={"sampler": pipe.card.sampler.model_copy(update=sampler)})
        return FewStepPipeline(pipe.network, card)

    def sampled(student: FewStepPipeline) -> torch.Tensor:
        return student.sample(noise, conditioning, student.sampler_for(noise.shape[1:], nfe=2))

    sharpened = student(final_temperature=0.2, final_temperature_below=0.1)
    whole, x, sampler = sampled(sharpened), noise, sharpened.sampler_for(noise.shape[1:], nfe=2)
    for index in range(2):  # as a server does
        x, _ = sharpened.sample_step(x, conditioning, sampler.next_step(index), sampler)
    assert torch.equal(x, whole)
    for other in (pipe, student(final_temperature=0.2)):
        assert not torch.equal(whole, sampled(other))


def test_renewed_noise_changes_an_image_and_keeps_it_apart_from_its_batch(pipe: FewStepPipeline) -> None:
    together = pipe(PROMPTS, seed=[5, 6], h=1.0, output_type="latent").images
    for prompt, seed, latent in zip(PROMPTS, (5, 6), together, strict=True):
        [alone] = pipe(prompt, seed=seed, h=1.0, output_type="latent").images
        torch.testing.assert_close(alone, latent, atol=1e-4, rtol=0)
        [plain] = pipe(prompt, seed=seed, output_type="latent").images
        assert not torch.allclose(alone, plain, atol=1e-2)


def test_a_dynamic_shift_grows_with_the_image(pipe: FewStepPipeline) -> None:
    dynamic = pipe.card.sampler.model_copy(update={"shift": "dynamic"})
    student = FewStepPipeline(pipe.network, pipe.card.model_copy(update={"sampler": dynamic}))
    small, large = (student.sampler_for((3, side, side)) for side in (16, 128))
    assert 1 < small.shift < large.shift == pytest.approx(3.158, abs=1e-3)
    fixed = pipe.card.sampler.model_copy(update={"shift": small.shift})
    noise = gaussian_noise((1, 3, 16, 16), torch.Generator().manual_seed(0))
    conditioning = pipe.encode(PROMPTS[:1])
    assert torch.equal(student.sample(noise, conditioning, small), pipe.sample(noise, conditioning, fixed))


def test_other_sizes_work_and_impossible_ones_are_refused(pipe: FewStepPipeline) -> None:
    assert pipe(PROMPTS[0], height=8, width=24).images[0].size == (24, 8)
    for side in (9, 0, -8):
        message = "both sides must be multiples of 2" if side > 0 else "must be a positive number"
        with pytest.raises(UserError, match=message):
            pipe(PROMPTS[0], height=side)


def test_sizes_are_in_pixels_whatever_the_autoencoder_makes_of_them(folder: Path, tmp_path: Path) -> None:
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=3,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    student = shutil.copytree(folder, tmp_path / "student")
    card = read_student_card(student).model_copy(update={"autoencoder": str(tmp_path / "vae")})
    write_student_card(card, student)
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
        ({"h": -1.0}, "h must be 0 or more"),
        ({"h": float("nan")}, "h must be 0 or more"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent; got 'jpg'"),
    ],
)
def test_impossible_requests_are_refused(pipe: FewStepPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(PROMPTS[0], **arguments)


def test_a_caption_too_long_is_refused(pipe: FewStepPipeline) -> None:
    prompt = "very " * 100 + "long"
    with pytest.raises(UserError, match="too long"):
        pipe(prompt)
    patient = FewStepPipeline(pipe.network, pipe.card.model_copy(update={"max_tokens": 128}))
    assert patient(prompt, output_type="latent").images[0].isfinite().all()


def test_another_teacher_than_the_students_own_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "student"
    shutil.copytree(folder, copy)
    card = read_student_card(copy)
    other = replace(card.teacher, sha256="0" * 64)
    write_student_card(card.model_copy(update={"teacher": other}), copy)
    with pytest.raises(UserError, match="give the original teacher"):
        FewStepPipeline.from_pretrained(copy)


def test_a_card_is_read_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    card = read_student_card(folder).model_copy(
        update={
            "sampler": SamplerConfig(more_nfes=(2, 8), h=float("inf")),
            "teacher_sampler": TeacherSamplerConfig(guidance_interval=(0.1, 0.9)),
        }
    )
    write_student_card(card, tmp_path)
    assert read_student_card(tmp_path) == card
    assert card.sampler.nfes == (4, 2, 8)


def test_a_card_of_before_version_0_2_is_read(folder: Path, tmp_path: Path) -> None:
    card = read_student_card(folder)
    old = card.model_dump(
        mode="json", include={"teacher", "text_encoder", "autoencoder", "latent_shape", "recipe"}
    )
    old |= {
        "nfe": 2, "more_nfes": [8], "shift": 1.5, "final_step_scale": 2.0, "substeps": 64, "temperature": "auto",
        "final_temperature": 0.25, "final_temperature_below": 0.05, "guidance": 3.5, "teacher_shift": 2.0,
        "guidance_interval": [0.0, 0.7], "orthogonal": 0.5, "embedded_guidance": None, "max_tokens": 32,
        "metrics": {"x": 1.0},
    }  # fmt: skip
    (tmp_path / "fewstep.json").write_text(json.dumps(old))
    read = read_student_card(tmp_path)
    assert read.sampler == SamplerConfig(
        nfe=2, more_nfes=(8,), shift=1.5, final_step_scale=2.0, substeps=64, temperature="auto",
        final_temperature=0.25, final_temperature_below=0.05,
    )  # fmt: skip
    assert read.teacher_sampler == TeacherSamplerConfig(
        guidance_scale=3.5, guidance_interval=(0.0, 0.7), orthogonal=0.5, shift=2.0
    )
    assert (read.teacher, read.max_tokens, read.metrics) == (card.teacher, 32, {"x": 1.0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no card of a student"),
        ('{"schema_version": 99}', r"schema version 99, this fewstep reads up to 2: install a newer one"),
        ('{"schema_version": 2, "nonsense": 1}', "no card of a student"),
    ],
)
def test_a_broken_or_newer_card_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "fewstep.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_student_card(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exported student"):
        FewStepPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("asked", "most", "nearest"),
    [
        ((16, 16), 1024, (16, 16)),
        ((17, 15), 1024, (16, 16)),
        ((1024, 1024), 1024, (32, 32)),
        ((1024, 512), 1024, (44, 22)),
        ((10_000, 1), 1024, (512, 2)),
        ((1, 10_000), 1024, (2, 512)),
        ((1, 1), 1024, (2, 2)),
    ],
)
def test_the_nearest_size_is_one_that_the_model_takes(asked, most, nearest):
    pipe = FewStepPipeline.from_pretrained(resolve_student("emoji-student").folder)
    assert pipe.nearest_size(*asked, most) == nearest
    pipe.latent_shape(*nearest)
    assert nearest[0] * nearest[1] <= most
