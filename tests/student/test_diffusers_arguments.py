"""Both pipelines, fewstep's own and the exported one, take the arguments of diffusers' pipelines and mean the same."""

from __future__ import annotations

import inspect
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image

from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep.models.heads import GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.teacher import load_teacher
from fewstep.student import FewStepPipeline, StudentCard
from fewstep.student.diffusers import save_diffusers, to_diffusers

OWL, FOX = "owl, noto style", "a fox, fluent style"


@pytest.fixture(scope="module")
def student() -> FewStepPipeline:
    return FewStepPipeline.from_pretrained("emoji-student")


@pytest.fixture(scope="module")
def exported(student: FewStepPipeline, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("exported")
    save_diffusers(student, folder)
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["own", "exported"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("student" if request.param == "own" else "exported")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latent(pipe: Any, prompt: Any = OWL, **arguments: Any) -> torch.Tensor:
    arguments = {"generator": generator(0), "output_type": "latent"} | arguments
    return pipe(prompt, **arguments).images


def assert_near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_each_kind_of_output_is_the_same_images_in_diffusers_form(pipe: Any) -> None:
    def call(output_type: str) -> Any:
        return pipe([OWL, FOX], generator=[generator(1), generator(2)], output_type=output_type).images

    pictures, floats, tensor, latents = (call(kind) for kind in ("pil", "np", "pt", "latent"))
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    assert (type(floats), floats.dtype, floats.shape) == (np.ndarray, np.float32, (2, 16, 16, 3))
    assert (tensor.dtype, tensor.shape) == (torch.float32, (2, 3, 16, 16))
    assert 0 <= floats.min() < 0.3 < 0.7 < floats.max() <= 1
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    assert np.array_equal((floats * 255).round().astype(np.uint8), pixels)
    assert np.array_equal(tensor.movedim(1, -1).numpy(), floats)
    assert latents.shape == (2, 3, 16, 16)
    # Tensors that can be gone on with, also in training.
    latents.clone().requires_grad_().square().sum().backward()
    (latents * torch.ones((), requires_grad=True)).sum().backward()


def test_images_of_one_prompt_follow_each_other_and_are_what_each_source_gives(pipe: Any) -> None:
    sources = [generator(seed) for seed in range(4)]
    together = latent(pipe, [OWL, FOX], num_images_per_prompt=2, generator=sources)
    assert together.shape[0] == 4
    for index, (prompt, image) in enumerate(zip([OWL, OWL, FOX, FOX], together, strict=True)):
        assert_near(latent(pipe, prompt, generator=generator(index))[0], image)
    assert len(pipe(OWL, num_images_per_prompt=3).images) == 3
    assert not torch.equal(*latent(pipe, num_images_per_prompt=2)), (
        "one source draws different noise for each"
    )


def test_fewsteps_own_seeds_count_images(student: FewStepPipeline) -> None:
    counted = student(OWL, seed=5, num_images_per_prompt=2, output_type="latent").images
    listed = student([OWL, OWL], seed=[5, 6], output_type="latent").images
    assert_near(counted, listed)
    assert_near(student(OWL, seed=np.int64(5), output_type="latent").images, listed[:1])


def test_torch_s_own_seed_repeats_an_image_as_diffusers_pipelines_do(exported: Any) -> None:
    def seeded(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return latent(exported, generator=None)

    assert torch.equal(seeded(3), seeded(3))
    assert not torch.equal(seeded(3), seeded(4))


def test_given_noise_is_where_images_begin(pipe: Any) -> None:
    noise = torch.randn(2, 3, 16, 16, generator=generator(7))
    drawn = latent(pipe, [OWL, FOX], latents=noise)
    assert_near(latent(pipe, [OWL, FOX], generator=generator(7)), drawn)
    assert_near(latent(pipe, [OWL, FOX], latents=noise.double()), drawn)
    wide = torch.randn(1, 3, 8, 24, generator=generator(7))
    assert latent(pipe, latents=wide, height=8, width=24).shape == (1, 3, 8, 24)


def test_encoded_prompts_stand_for_their_captions(student: FewStepPipeline, pipe: Any) -> None:
    texts = student.encode([OWL, FOX])
    both = [generator(0), generator(1)]
    expected = latent(pipe, [OWL, FOX], generator=both)
    embeds = {"prompt_embeds": texts.states, "prompt_embeds_mask": texts.mask.long()}
    both = [generator(0), generator(1)]
    assert_near(latent(pipe, None, generator=both, **embeds), expected)
    # Without a mask all tokens count: right for a single caption, which has no padding.
    assert_near(latent(pipe, None, prompt_embeds=student.encode([OWL]).states), latent(pipe))
    again = latent(
        pipe, None, num_images_per_prompt=2, generator=[generator(i) for i in (0, 5, 1, 5)], **embeds
    )
    assert_near(again[::2], expected)


def test_a_callback_sees_asks_changes_and_interrupts(pipe: Any) -> None:
    plain, seen = latent(pipe, num_inference_steps=3), []

    def zero(caller: Any, index: int, left: float, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert caller is pipe
        seen.append((index, round(left, 3), sorted(given), caller.num_timesteps))
        given["latents"] *= 0  # in place, as some users do
        return given

    drawn = latent(pipe, num_inference_steps=3, callback_on_step_end=zero)
    assert seen == [(i, round(1 - (i + 1) / 3, 3), ["latents"], 3) for i in range(3)]
    assert torch.equal(drawn, torch.zeros_like(drawn))

    def stop(caller: Any, index: int, left: float, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states.append(given["latents"].clone())
        caller._interrupt = index == 1
        return given

    states: list[torch.Tensor] = []
    interrupted = latent(pipe, num_inference_steps=3, callback_on_step_end=stop)
    assert len(states) == 2
    assert torch.equal(interrupted, states[1])
    assert torch.equal(latent(pipe, num_inference_steps=3), plain), "and the next call goes to its end"
    assert torch.equal(latent(pipe, num_inference_steps=3, callback_on_step_end=lambda *_: None), plain)


def test_a_callback_may_change_the_prompt(student: FewStepPipeline, pipe: Any) -> None:
    names = ["latents", "prompt_embeds"]
    given_states = []

    def other(_: Any, index: int, left: float, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given_states.append(given["prompt_embeds"])
        return {"prompt_embeds": torch.zeros_like(given["prompt_embeds"])}

    changed = latent(pipe, callback_on_step_end=other, callback_on_step_end_tensor_inputs=names)
    assert_near(given_states[0], student.encode([OWL]).states)
    assert not given_states[1].any()
    assert not torch.allclose(changed, latent(pipe), atol=1e-2)


def test_diffusers_own_callback_objects_say_what_they_want(pipe: Any) -> None:
    class Halving(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(
            self, pipeline: Any, index: int, timestep: float, given: dict[str, Any]
        ) -> dict[str, Any]:
            return {"latents": given["latents"] / 2} if index + 1 == pipeline.num_timesteps else given

    plain = latent(pipe)
    for callback in (Halving(), MultiPipelineCallbacks([Halving()])):
        assert_near(latent(pipe, callback_on_step_end=callback), plain / 2)


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        ({"guidance_scale": 1.0}, None),
        ({"guidance_scale": 0}, None),
        ({"true_cfg_scale": 1.0, "negative_prompt": ""}, None),
        (
            {"guidance_scale": 7.5},
            r"without effect: guidance_scale 7.5, because guidance of scale [\d.]+ is",
        ),
        (
            {"true_cfg_scale": 9.0, "negative_prompt": "blurry"},
            "effect: true_cfg_scale 9, negative_prompt, because",
        ),
        ({"negative_prompt": ["blurry"]}, "without effect: negative_prompt, because"),
        ({"negative_prompt": ["", ""], "negative_prompt_2": ("",)}, None),
        ({"negative_prompt": ["", "blurry"]}, "without effect: negative_prompt, because"),
        ({"negative_prompt_2": "blurry"}, "without effect: negative_prompt_2, because"),
        ({"negative_prompt_embeds": torch.ones(1, 2, 384)}, "effect: negative_prompt_embeds, because"),
        (
            {
                "negative_pooled_prompt_embeds": torch.ones(1, 2),
                "negative_prompt_embeds_mask": torch.ones(1, 2),
            },
            "effect: negative_pooled_prompt_embeds, negative_prompt_embeds_mask, because",
        ),
        ({"attention_kwargs": {}, "joint_attention_kwargs": {"scale": 1.0}, "prompt_2": OWL}, None),
        ({"attention_kwargs": None, "sigmas": None, "timesteps": None, "prompt_2": None}, None),
    ],
)
def test_guidance_that_is_distilled_in_changes_nothing_and_a_warning_says_so(
    pipe: Any, arguments: dict[str, Any], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    plain = latent(pipe)
    with caplog.at_level(logging.WARNING, logger="fewstep"):
        assert torch.equal(latent(pipe, **arguments), plain)
    if warning is None:
        assert not caplog.records
    else:
        [record] = caplog.records
        assert re.search(warning, record.getMessage())


def test_the_scale_that_the_student_was_distilled_at_is_no_surprise(
    pipe: Any, student: FewStepPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    latent(pipe, guidance_scale=student.card.teacher_sampler.guidance_scale)
    assert not caplog.records


def test_a_network_that_takes_the_scale_gets_it(caplog: pytest.LogCaptureFixture) -> None:
    transformer, family, reference = load_teacher("emoji-flux", "flux", 3.0)
    network = PolicyNetwork(transformer, family, GMFlowConfig(components=2, logstd_width=8), lora=None)
    card = StudentCard(
        teacher=reference, text_encoder="minilm", autoencoder="pixel", latent_shape=(3, 16, 16),
        sampler=SamplerConfig(nfe=2), teacher_sampler=TeacherSamplerConfig(embedded_guidance_scale=3.0),
    )  # fmt: skip
    own = FewStepPipeline(network, card)
    told = replace(family, embedded_guidance_scale=1.0)
    for pipe in (own, to_diffusers(own)):
        plain = latent(pipe)
        assert_near(latent(pipe, guidance_scale=3.0), plain)
        assert not caplog.records
        other = latent(pipe, guidance_scale=1.0)
        assert "this student was distilled at 3" in caplog.text
        caplog.clear()
        assert not torch.allclose(other, plain, atol=1e-3)
        network.family, kept = told, network.family
        assert_near(latent(own), other)
        network.family = kept


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        (None, {}, "give either prompt"),
        (OWL, {"prompt_embeds": torch.zeros(1, 2, 384)}, "give either prompt"),
        ([], {}, "at least one caption"),
        ([OWL, 3], {}, "at least one caption"),
        (7, {}, "at least one caption"),
        (OWL, {"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least 1, got 0"),
        (OWL, {"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number"),
        (OWL, {"num_inference_steps": 2.5}, "num_inference_steps must be a whole number from 1 to 128, got 2.5"),
        (OWL, {"num_inference_steps": "4"}, "num_inference_steps must be a whole number from 1 to 128, got '4'"),
        (OWL, {"h": "much"}, "h must be 0 or more"),
        (OWL, {"height": 16.5}, "height must be a whole number of pixels, got 16.5"),
        (OWL, {"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        (OWL, {"guidance_scale": "7"}, "guidance_scale must be a number"),
        (OWL, {"true_cfg_scale": -1}, "true_cfg_scale must be a number of at least 0"),
        ([OWL, FOX], {"generator": [generator(0)]}, "1 generators for 2 prompts"),
        (OWL, {"generator": [generator(0)], "num_images_per_prompt": 2}, "1 generators for 2 prompts"),
        (OWL, {"generator": 3}, "generator must be a torch.Generator"),
        (OWL, {"generator": [3]}, "generator must be a torch.Generator"),
        (OWL, {"latents": torch.zeros(1, 64, 12)}, r"latents must be noise of shape .* \(1, 3, 16, 16\), not packed"),
        (OWL, {"latents": torch.zeros(2, 3, 16, 16)}, r"\(1, 3, 16, 16\).*got \(2, 3, 16, 16\)"),
        (OWL, {"latents": np.zeros((1, 3, 16, 16))}, "latents must be noise"),
        (None, {"prompt_embeds": torch.zeros(1, 2, 9)}, r"prompt_embeds must have shape \(prompts, tokens, 384\)"),
        (
            None,
            {"prompt_embeds": torch.zeros(1, 2, 384), "prompt_embeds_mask": torch.ones(1, 3)},
            r"prompt_embeds_mask must have shape \(1, 2\), got \(1, 3\)",
        ),
        (
            None,
            {"prompt_embeds": torch.zeros(1, 2, 384), "pooled_prompt_embeds": torch.ones(1, 3)},
            "pooled_prompt_embeds: this model takes none",
        ),
        (OWL, {"max_sequence_length": 2}, r"tokens, more than max_sequence_length=2, and captions are not cut"),
        (OWL, {"callback_on_step_end_tensor_inputs": ["noise_pred"]}, "noise_pred is not among latents, prompt_embeds"),
        (OWL, {"callback_on_step_end": lambda *_: {"sigma": 1}}, "callback_on_step_end returned sigma"),
        (OWL, {"callback_on_step_end": lambda *_: {"latents": torch.ones(2)}}, "callback_on_step_end returned latents"),
        (OWL, {"callback_on_step_end": lambda *_: 5}, "callback_on_step_end returned 5: it may return None, or a dict"),
        (OWL, {"callback_on_step_end": lambda *_: False}, "callback_on_step_end returned False: it may"),
        (OWL, {"callback_on_step_end": lambda *_: torch.ones(2, 3)}, r"step_end returned \(2, 3\) of .*a dict"),
        (OWL, {"callback_on_step_end": lambda *_: {"latents": torch.ones(1, 3, 16, 16, device="meta")}},
         "callback_on_step_end returned latents"),
        (OWL, {"callback_on_step_end": "x"}, "callback_on_step_end must be a function or a callback object, got 'x'"),
        (OWL, {"callback_on_step_end_tensor_inputs": 5}, "tensor_inputs must be a list of names, got 5"),
        (OWL, {"negative_prompt": torch.ones(2, 3)}, "negative_prompt must be a text"),
        (OWL, {"negative_prompt": [3]}, r"negative_prompt must be a text or a list of texts, got \[3\]"),
        (OWL, {"negative_prompt_2": torch.ones(2, 3)}, "negative_prompt_2 must be a text"),
        (OWL, {"prompt_2": "a cat"}, "prompt_2 must be left out or repeat prompt, got 'a cat'"),
        (OWL, {"prompt_2": torch.ones(2, 3)}, "prompt_2 must be left out or repeat prompt"),
        (OWL, {"attention_kwargs": {"scale": 0.5}}, "attention_kwargs must be empty.*set_adapters"),
        (OWL, {"joint_attention_kwargs": {"scale": torch.ones(2)}}, "joint_attention_kwargs must be empty"),
        (OWL, {"attention_kwargs": {"ip_adapter_masks": 1}}, "attention_kwargs must be empty"),
        (torch.ones(2, 3), {}, r"prompt must be a caption .*\(2, 3\)"),
        (np.ones((2, 3)), {}, "prompt must be a caption"),
        (OWL, {"attention_kwargs": 5}, "attention_kwargs must be empty"),
        (OWL, {"sigmas": [1.0, 0.5]}, "sigmas: a few-step student has its own schedule"),
        (OWL, {"timesteps": torch.tensor([999, 500])}, "timesteps: a few-step student has its own schedule"),
        (OWL, {"latents": torch.full((1, 3, 16, 16), float("nan"))}, "latents must be finite"),
        (OWL, {"latents": torch.full((1, 3, 16, 16), float("inf"))}, "latents must be finite"),
        (OWL, {"latents": torch.ones(1, 3, 16, 16, device="meta")}, "latents is on the meta device"),
        (OWL, {"prompt_embeds_mask": torch.ones(1, 2)}, "prompt_embeds_mask belongs to prompt_embeds"),
        (OWL, {"pooled_prompt_embeds": torch.ones(1, 2)}, "pooled_prompt_embeds belongs to prompt_embeds"),
        (None, {"prompt_embeds": torch.ones(1, 2, 384, dtype=torch.int64)}, "prompt_embeds must .*floating-point"),
        (None, {"prompt_embeds": torch.ones(1, 0, 384)}, r"prompt_embeds must .*at least one of each.*\(1, 0, 384\)"),
        (None, {"prompt_embeds": torch.ones(0, 2, 384)}, r"prompt_embeds must .*at least one of each.*\(0, 2, 384\)"),
        (None, {"prompt_embeds": torch.ones(1, 2, 384, device="meta")}, "prompt_embeds is on the meta device"),
        (None, {"prompt_embeds": torch.full((1, 2, 384), float("nan"))}, "prompt_embeds must be finite"),
        (
            None,
            {"prompt_embeds": torch.ones(1, 2, 384), "prompt_embeds_mask": torch.zeros(1, 2)},
            "prompt_embeds_mask must be nonzero for at least one token",
        ),
        (
            None,
            {"prompt_embeds": torch.ones(1, 2, 384), "prompt_embeds_mask": torch.ones(1, 2, device="meta")},
            "prompt_embeds_mask is on the meta device",
        ),
        (OWL, {"height": 0}, "height must be a positive number of pixels, got 0"),
        (OWL, {"width": -16}, "width must be a positive number of pixels, got -16"),
        (OWL, {"temperature": "0.5"}, "temperature must be a number above 0 and at most 1, or 'auto'; got '0.5'"),
        (OWL, {"temperature": True}, "temperature must be a number .*got True"),
        (OWL, {"temperature": torch.ones(2)}, "temperature must be a number"),
        (OWL, {"temperature": 1.5}, "temperature must be above 0 and at most 1"),
        ("owl \ud83d", {}, r"the caption 'owl \\ud83d' holds half a surrogate pair"),
        ([OWL, "owl \udced\udca0\udcbd"], {}, r"the caption 'owl .* or bytes that are no UTF-8"),
        ("owl \ud83d", {"max_sequence_length": 9}, "holds half a surrogate pair"),
        (OWL, {"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent"),
    ],
)  # fmt: skip
def test_what_can_t_be_honoured_is_one_sentence_before_any_work(
    pipe: Any, prompt: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pipe(prompt, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [1.5, "3", [0.5], 2**64, [True]])
def test_seeds_are_whole_numbers(student: FewStepPipeline, seed: Any) -> None:
    with pytest.raises(UserError, match=r"^seed must be a whole number"):
        student(OWL, seed=seed)


def test_a_model_of_classes_takes_no_encoded_prompts() -> None:
    with pytest.raises(UserError, match="not conditioned on texts; give prompt"):
        FewStepPipeline.from_pretrained("fashion-student")(prompt_embeds=torch.zeros(1, 2, 384))


def test_what_users_pass_along_is_accepted(pipe: Any) -> None:
    plain = latent(pipe)
    assert torch.equal(latent(pipe, max_sequence_length=512, num_images_per_prompt=None), plain)
    [image] = pipe(OWL, generator=generator(0), output_type="latent", return_dict=False)
    assert torch.equal(image, plain)


def test_the_exported_call_says_its_arguments_by_name(student: FewStepPipeline, exported: Any) -> None:
    own, theirs = (set(inspect.signature(one.__call__).parameters) for one in (student, exported))
    assert own - theirs == {"seed", "on_step", "lora"}  # diffusers' pipelines have LoRAs by `set_adapters`
    assert not theirs - own
    assert "callback_on_step_end_tensor_inputs" in theirs


def test_an_argument_that_no_pipeline_has_is_still_a_type_error(pipe: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidence_scale'"):
        pipe(OWL, guidence_scale=1.0)


def test_a_pipeline_made_of_another_s_parts_draws_the_same(exported: Any) -> None:
    again = type(exported).from_pipe(exported)
    assert again.transformer is exported.transformer
    assert_near(latent(again), latent(exported))


def test_saved_in_half_and_loaded_again_it_draws_the_same(exported: Any, tmp_path: Path) -> None:
    half = DiffusionPipeline.from_pretrained(exported.config._name_or_path, trust_remote_code=True)
    half.set_progress_bar_config(disable=True)
    half.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(
        tmp_path / "again", torch_dtype=torch.bfloat16, trust_remote_code=True
    )
    arguments = {"num_images_per_prompt": 2, "guidance_scale": 1.0}
    assert_near(latent(again, **arguments), latent(half, **arguments))
    noise = torch.randn(1, 3, 16, 16, generator=generator(3), dtype=torch.bfloat16)
    assert latent(again, latents=noise).isfinite().all()


def test_offloading_by_diffusers_own_hooks_changes_nothing(exported: Any) -> None:
    plain = latent(exported)
    pipe = DiffusionPipeline.from_pretrained(exported.config._name_or_path, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload(device="cpu")  # an accelerator's hooks, here without one
    for _ in range(2):
        assert_near(latent(pipe), plain)
        assert hasattr(pipe.transformer, "_hf_hook")
