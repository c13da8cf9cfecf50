"""The pipeline that generates images with an exported student.

    pipe = FewStepPipeline.from_pretrained("emoji64-student")
    image = pipe("red heart, noto style", num_inference_steps=4, seed=0).images[0]
    image = editor("in noto style", image=picture).images[0]  # of a student that takes a reference image

A student's folder is an adapter (see `adapter.py`) together with its card (see `card.py`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from fewstep.config import PartsConfig, Shape
from fewstep.encoders import Autoencoder, ConditionEncoder, encode_each, load_autoencoder, load_encoder
from fewstep.encoders.text import TextEncoder
from fewstep.errors import UserError
from fewstep.flow import (
    Generators,
    NextStep,
    SamplerConfig,
    StepSchedule,
    euler_step,
    gaussian_noise,
    generate,
    generate_step,
)
from fewstep.images import Size, fit
from fewstep.models.conditioning import Conditioning, TextConditioning
from fewstep.models.devices import check_device
from fewstep.models.family_code import CODE, code_of, find_code
from fewstep.models.guided_teacher import GuidedTeacher
from fewstep.models.network import PolicyNetwork
from fewstep.models.own_schedule import teacher_schedule
from fewstep.models.precision import check_arithmetic, precision_of
from fewstep.models.pretrained import scheduler_config
from fewstep.models.solvers import Solver, solve
from fewstep.models.styles import Style, StyledConditioning, StyleMix, read_style
from fewstep.models.teacher import checked_meanwhile, open_teacher
from fewstep.student.adapter import load_adapter, save_adapter
from fewstep.student.arguments import (
    OutputType,
    StepEnd,
    asked_tensors,
    changed_by,
    check_latents,
    check_others,
    check_output_type,
    embedded,
    generators_for,
    images_as,
    network_guidance,
    prompt_list,
    reference_images,
    whole_number,
)
from fewstep.student.card import StudentCard, read_student_card, write_student_card
from fewstep.student.resolve import fetch_lora, resolve_student


@dataclass
class FewStepOutput:
    """Result of a pipeline call."""

    images: Any
    """Depending on `output_type`: a list of PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) of floats from 0
    to 1, or a tensor of latents (B, C, H, W)."""


def save_student(
    network: PolicyNetwork, card: StudentCard, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a student's folder.

    If the teacher's family comes from a user's file, the folder gets a copy of that file.

    Args:
        network: the student's.
        card: the student's.
        folder: made if it does not exist.
        weights: values, such as the EMA's, in place of the network's trainable parameters; by the same names.
    """
    save_adapter(network, folder, weights)
    if (code := code_of(network.family.name)) is not None:
        (folder / CODE).write_bytes(code.content)
        card = card.model_copy(update={"teacher": replace(card.teacher, code_sha256=code.sha256)})
    write_student_card(card, folder)


class FewStepPipeline:
    """Generates images from prompts in a few network evaluations; can also sample the teacher, for comparison.

    Args:
        network: a `PolicyNetwork`, or another module with its `policy`, `prepare`, `family` and `transformer`.
        card: the student's.
        device: where to generate.
        parts: how text encoder and autoencoder are loaded.
    """

    def __init__(
        self,
        network: Any,
        card: StudentCard,
        device: torch.device | str = "cpu",
        parts: PartsConfig = PartsConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self.card, self.device, self.parts = card, torch.device(device), parts
        self._schedules: dict[Sequence[int], StepSchedule] = {}  # of the teacher, by the shape of the latents
        self.styles: dict[str, Style] = {}
        """Name → style LoRA that calls can ask for."""
        self._interrupt, self.num_timesteps = False, 0  # of the last call, by the names that callbacks know
        self.network = network.to(self.device).eval().requires_grad_(False)
        if isinstance(network, PolicyNetwork):
            network.keep_folded()  # the weights don't change any more

    # Encoder, autoencoder and teacher are loaded when first used: a server may run them elsewhere, or not need them.

    @cached_property
    def text_encoder(self) -> ConditionEncoder:
        """The encoder of prompts (texts or classes)."""
        return load_encoder(
            self.card.text_encoder,
            max_tokens=self.card.max_tokens,
            device=self.device,
            precision=self.parts.text_encoder_precision,
            offload=self.parts.text_encoder_offload,
        )

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder that decodes latents."""
        return load_autoencoder(
            self.card.autoencoder,
            device=self.device,
            precision=self.parts.autoencoder_precision,
            tiling=self.parts.autoencoder_tiling,
        )

    @cached_property
    def teacher(self) -> GuidedTeacher:
        """The student's teacher, with the guidance with which it was imitated."""
        how = self.card.teacher_sampler
        # Without guidance no null condition is needed, so that the encoder is not loaded for it.
        null = None if how.guidance_scale == 1 else self.text_encoder.null().to(self.device)
        patch = self.network.family.patch(self.network.transformer)
        return GuidedTeacher(
            self.network, null, how.guidance_scale, how.guidance_interval, how.orthogonal, how.renorm, patch,
            frozen=True,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        teacher: str | None = None,
        device: torch.device | str = "cpu",
        tracking_uri: str | None = None,
        dtype: torch.dtype | None = None,
        quantization: str | None = None,
        parts: PartsConfig = PartsConfig(),  # noqa: B008 (frozen)
        torch_dtype: torch.dtype | None = None,
    ) -> FewStepPipeline:
        """Load a student and its teacher.

        Args:
            path: name or address of the student, as for `resolve_student`.
            teacher: the teacher's folder or hub id on this machine, if it differs from that in the student's card.
            device: where to generate.
            tracking_uri: address of MLflow, for students that it holds; by default `MLFLOW_TRACKING_URI`.
            dtype: of the network's weights, float32 (the default) or bfloat16. What is not a linear layer of its
                blocks, as well as adapters and policy head, stays in float32.
            quantization: of the network's weights, "int8" or "int4"; None for none.
            parts: how text encoder and autoencoder are loaded, such as their own precisions.
            torch_dtype: the former name of `dtype`, as in diffusers.

        Raises:
            UserError: there is no such student; its teacher is not found, or has other weights; the teacher's family is
                code in the student's folder that may not be run yet (see `family_code.py`); a precision that the device
                or the installed libraries can't do; or it is too large for the device's free memory.
        """
        folder = resolve_student(path, tracking_uri=tracking_uri).folder
        card = read_student_card(folder)
        # First, because loading the teacher needs its family.
        find_code(card.teacher.family, card.teacher.code_sha256, folder)
        named = (
            teacher or card.teacher.path,
            card.teacher.family,
            card.teacher_sampler.embedded_guidance_scale,
        )
        check_device(device)
        precision = precision_of(dtype if torch_dtype is None else torch_dtype, quantization)
        check_arithmetic(precision, device)
        # Without values, which `load_adapter` reads straight to where they stay.
        transformer, family, base = open_teacher(*named, card.teacher.loras)
        how = card.teacher_sampler
        if how.scheduler is None and base is not None:  # cards from before fewstep 0.2 do not hold it
            how = how.model_copy(update={"scheduler": scheduler_config(base)})
            card = card.model_copy(update={"teacher_sampler": how})
        with checked_meanwhile(named[0], card.teacher):
            network = load_adapter(transformer, family, folder, base, precision, device)
        return cls(network, card, device, parts)

    def load_lora_weights(self, source: str, adapter_name: str, *, tracking_uri: str | None = None) -> None:
        """Load a style LoRA that was trained on the teacher's base; calls ask for it by name, in `lora`.

        It acts on the student and on its teacher, which share that base.

        Args:
            source: a safetensors file (keys in the style of diffusers, peft or kohya), a folder with one, `s3://…`, a
                hub id, or an address in MLflow such as `models:/name@alias`.
            adapter_name: what calls name it.
            tracking_uri: address of MLflow, as for `from_pretrained`.

        Raises:
            UserError: there is no such file, or it holds no LoRA of this network that can be used (see `read_style`).
        """
        with tempfile.TemporaryDirectory(prefix="fewstep-lora-") as scratch:
            path = fetch_lora(source, Path(scratch), tracking_uri)
            style = read_style(self.network.family, self.network.transformer, path)
        self.styles[adapter_name] = self.network.take(style)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        num_inference_steps: int | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        temperature: float | Literal["auto"] | None = None,
        h: float | None = None,
        lora: Sequence[tuple[str, float]] = (),
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int | None = 1,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        max_sequence_length: int | None = None,
        output_type: OutputType = "pil",
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Generate images of one or several prompts.

        Args:
            prompt: one or several captions.
            image: the reference image of a student that edits, or a list of as many as it takes: PIL images, or arrays
                (H, W, 3) uint8. All prompts get the same. They are scaled to cover the size of the result, and cropped.
            num_inference_steps: network evaluations (nfe); as trained by default.
            seed: of the noise, one number (image i gets seed + i) or one per image. An image depends only on its own
                prompt and seed, not on the others of its batch.
            generator: source of the noise, one or one per image, in place of `seed`.
            temperature: mixture temperature, in (0, 1] or "auto"; as trained by default.
            h: how much noise is renewed between segments, from 0 (none, deterministic); as trained by default.
            lora: names of style LoRAs with their scales, see `load_lora_weights`; none by default.
            height, width: in pixels; by default as trained, and with a reference image at nearly its aspect ratio.
            num_images_per_prompt: images of each prompt, which follow each other in the result.
            latents: the noise itself, (images, C, h, w), in place of that of `seed` or `generator`.
            prompt_embeds: encoded captions, (B, L, D), in place of `prompt`.
            prompt_embeds_mask: (B, L), nonzero where a token is; by default everywhere.
            pooled_prompt_embeds: the whole captions' vectors, (B, P), of networks that take them.
            guidance_scale: input of guidance-distilled networks such as FLUX.1 dev; on other students, whose guidance
                is distilled into them, it has no effect, and a warning says so.
            true_cfg_scale, negative_prompt: of classifier-free guidance, for which the same holds.
            max_sequence_length: tokens that a caption may have, beside the student's own limit.
            output_type: what `images` holds: PIL images ("pil"), floats from 0 to 1 as an array (B, H, W, 3) ("np") or
                a tensor (B, 3, H, W) ("pt"), or latents (B, C, h, w) ("latent").
            on_step: called after each evaluation with its index, the state, and the predicted clean latents.
            callback_on_step_end: called after each evaluation with this pipeline, the evaluation's index, the share of
                evaluations that are left, and the tensors asked for by name; what it returns of them is gone on with.
                Where it sets the pipeline's `_interrupt`, no more evaluations follow.
            callback_on_step_end_tensor_inputs: names of these tensors: "latents", the state (B, C, h, w), and
                "prompt_embeds", the captions' states (B, L, D).
            return_dict: whether the result is a `FewStepOutput`, or else a tuple with the images.
            others: further arguments of diffusers' pipelines, see `check_others`.

        Returns:
            The images, in a `FewStepOutput` or a tuple.

        Raises:
            UserError: a size, number, prompt or tensor that the model can't take.
            TypeError: an argument that no pipeline has.
        """
        check_output_type(output_type)
        prompts = prompt_list(prompt, prompt_embeds, prompt_embeds_mask, pooled_prompt_embeds)
        ignored = check_others(others, prompts)
        # diffusers' pipelines take None for 1.
        per_prompt = (
            1
            if num_images_per_prompt is None
            else whole_number("num_images_per_prompt", num_images_per_prompt, 1)
        )
        references = reference_images(image, self.card.references)
        if references and height is None and width is None:
            height, width = self.size_like(references[0].height, references[0].width)
        shape = self.latent_shape(height, width)
        sampler = self.sampler_for(shape, num_inference_steps, temperature, h)
        self.style_mix(lora)  # refuses what it can't take before anything is done for it
        family, transformer = self.network.family, self.network.transformer
        guidance = network_guidance(
            guidance_scale,
            true_cfg_scale,
            negative_prompt,
            self.card,
            family.takes_guidance(transformer),
            ignored,
        )
        tensors = asked_tensors(callback_on_step_end_tensor_inputs, callback_on_step_end)
        given = (
            None
            if prompt_embeds is None
            else embedded(prompt_embeds, prompt_embeds_mask, pooled_prompt_embeds, family, transformer)
        )
        count = per_prompt * (len(prompts) if given is None else len(given))
        # The same generators then draw the noise that the sampler renews: an image is independent of its batch also
        # where h is not 0.
        generators = generators_for(count, seed, generator)
        if latents is not None:
            check_latents(latents, count, shape)
        if max_sequence_length is not None:
            self._check_length(prompts, whole_number("max_sequence_length", max_sequence_length, 1))

        conditioning = self.encode(prompts) if given is None else given.to(self.device)
        if references:
            conditioning = self.beside(conditioning, self.encode_images(self.fitted(references, shape)))
        conditioning = conditioning.map(lambda tensor: tensor.repeat_interleave(per_prompt, dim=0))
        noise = gaussian_noise((count, *shape), generators) if latents is None else latents.float()
        x = noise.to(self.device)  # (B, C, h, w)
        prepared = self.prepare(self.styled(conditioning, lora))
        self._interrupt, self.num_timesteps = False, sampler.nfe
        for index in range(sampler.nfe):
            x, clean = generate_step(
                partial(self.network.policy, conditioning=prepared, **guidance),
                x,
                sampler.next_step(index, count),
                sampler.time_shift,
                substeps=sampler.substeps,
                generator=generators,
            )
            if on_step is not None:  # without previews, x̂_0 is not computed
                on_step(index, x, clean())
            if callback_on_step_end is not None:
                now = {"latents": x}
                if isinstance(conditioning, TextConditioning):
                    now["prompt_embeds"] = conditioning.states
                now = {name: now[name] for name in tensors if name in now}
                left = 1 - (index + 1) / sampler.nfe
                now = changed_by(callback_on_step_end, self, index, left, now)
                x = now.get("latents", x)
                if "prompt_embeds" in now:
                    conditioning = replace(cast(Any, conditioning), states=now["prompt_embeds"])
                    prepared = self.prepare(self.styled(conditioning, lora))
            if self._interrupt:
                break
        images = x if output_type == "latent" else images_as(self.decode(x), output_type, self.device)
        return FewStepOutput(images) if return_dict else (images,)

    def sampler_for(
        self,
        shape: Shape,
        nfe: int | None = None,
        temperature: float | Literal["auto"] | None = None,
        h: float | None = None,
    ) -> SamplerConfig:
        """The sampler's settings for latents of shape (C, H, W): those given, and the others as trained.

        Raises:
            UserError: a value out of range.
        """
        # On which a dynamic shift depends
        tokens = self.network.family.tokens(self.network.transformer, shape[1], shape[2])
        return self.card.sampler.override(nfe, temperature, h).at_size(tokens)

    def _check_length(self, prompts: Sequence[str], limit: int) -> None:
        """Refuse captions of more than `limit` tokens: none is cut here.

        Raises:
            UserError: one has more.
        """
        encoder = self.text_encoder
        if isinstance(encoder, TextEncoder):
            for prompt, tokens in zip(prompts, encoder.token_counts(prompts), strict=True):
                if tokens > limit:
                    raise UserError(
                        f"the caption {prompt!r:.60} has {tokens} tokens, more than max_sequence_length={limit}, and "
                        "captions are not cut here: shorten it, or allow more."
                    )

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditions of the prompts, as one batch on the pipeline's device."""
        return self.text_encoder.conditioning(list(prompts)).to(self.device)

    def style_mix(self, lora: Sequence[tuple[str, float]]) -> StyleMix:
        """The style LoRAs of these names, with their scales.

        Raises:
            UserError: one of them is not loaded, or is named twice, or its scale is not finite.
        """
        if strange := [name for name, _ in lora if name not in self.styles]:
            known = ", ".join(self.styles) or "none"
            raise UserError(f"lora: there is no {strange[0]!r}: use one of those that are loaded ({known}).")
        names = [name for name, _ in lora]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"lora: {min(twice)!r} is named twice: name it once, with the sum of its scales.")
        if endless := [name for name, scale in lora if not math.isfinite(scale)]:
            raise UserError(f"lora: the scale of {endless[0]!r} is not finite: give a number such as 0.8.")
        return tuple((self.styles[name], float(scale)) for name, scale in lora)

    def styled(self, conditioning: Conditioning, lora: Sequence[tuple[str, float]]) -> Conditioning:
        """A conditioning whose samples all have these style LoRAs; as it is, as long as the pipeline has none.

        Args:
            conditioning: texts or classes.
            lora: names of styles, with their scales.

        Raises:
            UserError: as `style_mix`.
        """
        mix = self.style_mix(lora)
        return StyledConditioning(conditioning, (mix,) * len(conditioning)) if self.styles else conditioning

    def fitted(self, images: Sequence[Image], shape: Shape) -> np.ndarray:
        """Images of any size at the size of a latent of shape (C, h, w), (N, H', W', 3) uint8: scaled to cover it, and
        cropped."""
        height, width = self.autoencoder.image_size(*shape[1:])
        return np.stack([fit(image, Size(width, height)) for image in images])

    @torch.inference_mode()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """Images (N, H', W', 3) uint8 → latents (N, C, h, w) on the CPU; each is encoded by itself."""
        return encode_each(self.autoencoder, images)

    def beside(self, conditioning: Conditioning, references: Tensor) -> Conditioning:
        """Encoded prompts with the same reference images beside each of them.

        Args:
            conditioning: of B prompts.
            references: latents (N, C, h, w).
        """
        there = references.to(conditioning.device)
        images = tuple(latent.expand(len(conditioning), -1, -1, -1) for latent in there)
        return replace(cast(TextConditioning, conditioning), references=images)

    @torch.no_grad()
    def prepare(self, conditioning: Conditioning, *, by_teacher: bool = False) -> Conditioning:
        """What of conditions the student's evaluations, or the teacher's, all share; see `Family.prepare`.

        Args:
            conditioning: on the pipeline's device.
            by_teacher: whether for `sample_teacher_step`, or for `sample_step`.
        """
        if by_teacher:
            return self.teacher.prepare(conditioning)
        return self.network.prepare(conditioning, student=True)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (B, C, H, W) → images (B, H', W', 3) uint8."""
        return np.asarray(self.autoencoder.decode(latents))

    @torch.inference_mode()
    def sample(
        self,
        noise: Tensor,
        conditioning: Conditioning,
        sampler: SamplerConfig,
        *,
        generator: Generators = None,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Sample the student: noise → latents, (B, C, H, W) both, in `sampler.nfe` network evaluations.

        Args:
            noise: x at σ = 1.
            conditioning: of B samples, on the pipeline's device.
            sampler: as `sampler_for` gives it.
            generator: source of the noise that is renewed if `sampler.h` is not 0.
            on_step: called after each evaluation; see `generate`.
        """
        policy_at = partial(self.network.policy, conditioning=self.prepare(conditioning))
        return generate(policy_at, noise.to(self.device), sampler, generator=generator, on_step=on_step)

    @torch.inference_mode()
    def sample_step(
        self,
        x: Tensor,
        conditioning: Conditioning,
        step: NextStep,
        sampler: SamplerConfig,
        generator: Generators = None,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """One network evaluation of `sample`; each sample of the batch may be at another step, of another sampler.

        Args:
            x: states, (B, C, H, W).
            conditioning: of B samples, on the pipeline's device; better what `prepare` made of them once for all steps.
            step: the step of each sample. All their samplers must have the shift and substeps of `sampler`.
            sampler: has the shift and substeps.
            generator: as for `sample`.

        Returns:
            The next states, and a function that gives the predicted clean latents; see `generate_step`.
        """
        policy_at = partial(self.network.policy, conditioning=conditioning)
        shift, substeps = sampler.time_shift, sampler.substeps
        return generate_step(policy_at, x, step, shift, substeps=substeps, generator=generator)

    @torch.inference_mode()
    def sample_teacher(
        self, noise: Tensor, conditioning: Conditioning, steps: int, solver: Solver = "euler"
    ) -> Tensor:
        """Sample the teacher, by guided Euler steps or another solver: noise → latents, (B, C, H, W) both.

        Args:
            noise: x at σ = 1.
            conditioning: of B samples, on the pipeline's device.
            steps: evaluations of the velocity, of `teacher.passes` network passes each; of Euler, one a step.
            solver: see `fewstep.models.solvers`.
        """
        prepared = self.prepare(conditioning, by_teacher=True)
        velocity = partial(self.teacher.velocity, conditioning=prepared)
        return solve(solver, velocity, noise.to(self.device), steps, self._teacher_schedule(noise))

    @torch.inference_mode()
    def teacher_trajectory(
        self, noise: Tensor, conditioning: Conditioning, steps: int
    ) -> Iterator[tuple[float, Tensor]]:
        """σ and state (B, C, H, W) before the first and after each of the teacher's guided Euler steps.

        Args:
            noise, conditioning, steps: as for `sample_teacher`.
        """
        prepared = self.prepare(conditioning, by_teacher=True)
        x, schedule = noise.to(self.device), self._teacher_schedule(noise)
        sigmas = schedule.sigmas(steps).tolist()
        yield sigmas[0], x
        for index in range(steps):
            x = self.sample_teacher_step(
                x, prepared, torch.full((len(x),), index), torch.full((len(x),), steps)
            )
            yield sigmas[index + 1], x

    @torch.inference_mode()
    def sample_teacher_step(
        self, x: Tensor, conditioning: Conditioning, step: Tensor, steps: Tensor
    ) -> Tensor:
        """One step of `sample_teacher`; each sample of the batch may be at another step (see `euler_step`)."""
        velocity = partial(self.teacher.velocity, conditioning=conditioning)
        return euler_step(velocity, x, step, steps, self._teacher_schedule(x))

    def teacher_sigmas(self, shape: Shape, steps: int) -> Tensor:
        """σ before each of the teacher's steps and after the last, (steps + 1,), for latents of shape (C, H, W)."""
        return self._teacher_schedule(torch.empty(1, *shape, device="meta")).sigmas(steps)

    def _teacher_schedule(self, x: Tensor) -> StepSchedule:
        """The schedule of the teacher's own sampler for latents of the size of `x`."""
        how, shape = self.card.teacher_sampler, x.shape[1:]
        if shape not in self._schedules:
            family, transformer = self.network.family, self.network.transformer
            tokens = family.tokens(transformer, *shape[1:])
            # Which may be dynamic
            students = self.sampler_for((shape[0], shape[1], shape[2])).time_shift
            self._schedules[shape] = teacher_schedule(how.shift, how.scheduler, family, tokens, students)
        return self._schedules[shape]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that it was trained on."""
        _, height, width = self.card.latent_shape
        return self.autoencoder.image_size(height, width)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> Shape:
        """Shape (C, h, w) of the latent of an image of (height, width) pixels; by default, sides are as trained.

        Raises:
            UserError: a side is not a multiple of what autoencoder and network need, or larger than the network takes.
        """
        for name, side in (("height", height), ("width", width)):
            if side is not None and (isinstance(side, bool) or not isinstance(side, Integral)):
                raise UserError(f"{name} must be a whole number of pixels, got {side!r}.")
            if side is not None and side < 1:
                raise UserError(f"{name} must be a positive number of pixels, got {side}.")
        # Not by way of the size in pixels, so that the autoencoder is not loaded only for this.
        if height is None and width is None:
            return self.card.latent_shape
        trained_height, trained_width = self.size
        height, width = (
            trained_height if height is None else height,
            trained_width if width is None else width,
        )
        shape = self.autoencoder.latent_shape(height, width)
        multiples = self.network.family.multiples(self.network.transformer)
        # The autoencoder has its own multiple; latents also have to divide into the network's patches.
        if any(cells % multiple for cells, multiple in zip(shape[1:], multiples, strict=True)) or not all(
            shape
        ):
            rows, columns = self.autoencoder.image_size(*multiples)
            sides = (
                "both sides must be multiples of"
                if rows == columns
                else f"height must be a multiple of {rows}, width of"
            )
            raise UserError(f"an image of {width}x{height} pixels doesn't fit this model: {sides} {columns}.")
        most = self.network.family.largest_side(self.network.transformer)
        if most is not None and max(shape[1] // self.network.family.frames, shape[2]) > most:
            _, largest = self._largest(most)
            raise UserError(
                f"an image of {width}x{height} pixels doesn't fit this model: it has positions for sides of at most "
                f"{largest}."
            )
        return shape

    def size_like(self, height: int, width: int) -> tuple[int, int]:
        """The size in pixels of about as many as trained, at nearly the aspect ratio of an image of (height, width)."""
        most = math.prod(self.size)
        scale = max(1, math.ceil(math.sqrt(most / (height * width))))
        return self.nearest_size(height * scale, width * scale, most)

    def nearest_size(self, height: int, width: int, most_pixels: float) -> tuple[int, int]:
        """The size in pixels nearest to (height, width), at nearly its aspect ratio, that the model can generate.

        Args:
            height, width: that is asked for.
            most_pixels: height times width of the largest image that is allowed.
        """
        family, transformer = self.network.family, self.network.transformer
        rows, columns = self.autoencoder.image_size(*family.multiples(transformer))
        tallest = widest = math.inf
        if (most := family.largest_side(transformer)) is not None:
            tallest, widest = self._largest(most)
        scale = min(1.0, math.sqrt(most_pixels / (height * width)), tallest / height, widest / width)
        # Down where a limit is what decides, so that it is kept; elsewhere to the nearest.
        whole: Callable[[float], int] = round if scale == 1 else math.floor
        tall = max(1, whole(height * scale / rows)) * rows
        wide = max(1, whole(width * scale / columns)) * columns
        if tall * wide > most_pixels:  # a side is a single multiple, or was rounded up
            if tall > wide:
                tall = max(1, int(most_pixels / wide / rows)) * rows
            else:
                wide = max(1, int(most_pixels / tall / columns)) * columns
        return tall, wide

    def _largest(self, most: int) -> tuple[int, int]:
        """(height, width) in pixels of an image of so many latent cells on each side of a frame."""
        return self.autoencoder.image_size(self.network.family.frames * most, most)
