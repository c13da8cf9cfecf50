"""A student that diffusers loads by itself, and to which its own calls add a style."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from peft import LoraConfig, get_peft_model_state_dict

from fewstep.errors import UserError
from fewstep.student import FewStepPipeline
from fewstep.student.diffusers import save_diffusers, to_diffusers

PROMPTS = ["red heart, noto style", "strawberry, fluent style"]


@pytest.fixture(scope="module")
def student() -> FewStepPipeline:
    return FewStepPipeline.from_pretrained("emoji-student")


@pytest.fixture(scope="module", params=["adapters", "merged"])
def folder(request, student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "emoji"
    save_diffusers(student, folder, merged=request.param == "merged")
    return folder


@pytest.fixture(scope="module")
def merged(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "merged"
    save_diffusers(student, folder, merged=True)
    return folder


@pytest.fixture
def pipe(folder):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def latents(pipe, **options) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(PROMPTS, generator=generators, output_type="latent", **options).images


def test_every_exported_file_is_readable_as_any_other(folder) -> None:
    modes = {file.name: file.stat().st_mode for file in folder.rglob("*") if file.is_file()}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.parametrize("steps", [None, 2])
def test_diffusers_draws_what_the_student_draws(student, pipe, steps) -> None:
    expected = student(PROMPTS, seed=0, num_inference_steps=steps, output_type="latent").images
    drawn = latents(pipe, **({} if steps is None else {"num_inference_steps": steps}))
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


def test_the_transformer_is_diffusers_own(pipe, merged) -> None:
    from diffusers import QwenImageTransformer2DModel

    assert type(pipe.transformer) is QwenImageTransformer2DModel
    QwenImageTransformer2DModel.from_pretrained(merged / "transformer")


def test_adapters_alone_are_small_and_want_the_very_teacher(student, merged, tmp_path) -> None:
    save_diffusers(student, tmp_path)
    size = {f: sum(x.stat().st_size for x in f.rglob("*.safetensors")) for f in (tmp_path, merged)}
    assert size[tmp_path] < 0.5 * size[merged]
    card = tmp_path / "transformer" / "fewstep.json"
    card.write_text(card.read_text().replace(student.card.teacher.sha256, "0" * 64))
    with pytest.raises(UserError, match="give the original teacher"):
        DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)


def test_steps_are_shown_and_called_back_and_images_are_pictures(pipe, capfd) -> None:
    seen = []

    def on_step(caller, index, left, given) -> dict:
        seen.append((index, round(left, 3), given["latents"].shape))
        return given

    [image] = pipe(PROMPTS[0], num_inference_steps=3, callback_on_step_end=on_step).images
    assert image.size == (16, 16)
    assert seen == [(i, round(1 - (i + 1) / 3, 3), (1, 3, 16, 16)) for i in range(3)]
    assert "3/3" in capfd.readouterr().err


def test_a_style_goes_on_top_and_off_again_by_diffusers_own_calls(pipe, tmp_path) -> None:
    plain = latents(pipe)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights="gaussian")
    style = DiffusionPipeline.from_pretrained(
        Path(pipe.config._name_or_path), trust_remote_code=True
    ).transformer
    style.add_adapter(config)
    for name, parameter in style.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    QwenImagePipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(style))

    pipe.load_lora_weights(tmp_path)
    styled = latents(pipe)
    assert (styled - plain).abs().max() > 0.01
    by_hand = to_diffusers(FewStepPipeline.from_pretrained("emoji-student"))
    for name, layer in style.named_modules():
        if hasattr(layer, "get_delta_weight"):
            by_hand.transformer.get_submodule(name).weight.data += layer.get_delta_weight("default").detach()
    torch.testing.assert_close(styled, latents(by_hand), atol=1e-4, rtol=0)

    pipe.unload_lora_weights()
    torch.testing.assert_close(latents(pipe), plain, atol=1e-6, rtol=0)


def test_a_dtype_is_the_transformers_and_the_head_stays_exact(folder, pipe) -> None:
    plain = latents(pipe)
    half = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, trust_remote_code=True)
    for loaded in (half, pipe.to(torch.bfloat16)):
        assert (loaded.transformer.dtype, loaded.head.dtype) == (torch.bfloat16, torch.float32)
        assert (latents(loaded) - plain).square().mean().sqrt() < 0.1


def test_half_the_bytes_draw_nearly_the_same(student, merged, tmp_path) -> None:
    save_diffusers(student, tmp_path / "half", merged=True, dtype=torch.bfloat16)
    size = {
        f: sum(x.stat().st_size for x in (f / "transformer").glob("*.safetensors"))
        for f in (merged, tmp_path / "half")
    }
    assert size[tmp_path / "half"] < 0.52 * size[merged]
    half = DiffusionPipeline.from_pretrained(
        tmp_path / "half", torch_dtype=torch.bfloat16, trust_remote_code=True
    )
    assert half.transformer.dtype == torch.bfloat16
    whole = DiffusionPipeline.from_pretrained(merged, trust_remote_code=True)
    assert (latents(half) - latents(whole)).square().mean().sqrt() < 0.1


def test_what_diffusers_has_no_pipeline_for_is_refused(student, tmp_path) -> None:
    from dataclasses import replace

    card = student.card.model_copy(update={"teacher": replace(student.card.teacher, family="dit")})
    with pytest.raises(UserError, match=r"family 'dit' can't be exported .* qwen_image, flux, flux2"):
        to_diffusers(FewStepPipeline(student.network, card))
