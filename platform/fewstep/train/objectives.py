"""What a training run optimises: π-ID of a student, or a teacher's velocity. One interface for the loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.data.stream import Batch
from fewstep.distill import (
    ImitationSettings,
    LossResult,
    flow_matching_loss,
    imitation_loss,
    imitation_walk,
    teacher_ratio,
)
from fewstep.flow import SamplerSchedule, TimeShift, euler, gaussian_noise, generate, guided_velocity
from fewstep.models.conditioning import TextConditioning
from fewstep.models.dual_stream import start_from_dual_stream
from fewstep.models.family import Family
from fewstep.models.network import GuidedTeacher, PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import load_teacher, open_teacher, read_card, reference_to, told_guidance
from fewstep.policies import Policy
from fewstep.train.recipe import DistillRecipe, TeacherRecipe


class Objective(Protocol):
    """A model to shard and train, its loss, and how it samples."""

    model: nn.Module
    """What FSDP shards and gathers; all calls go through its `forward`. It names its `transformers()`."""
    family: Family
    transformer: nn.Module

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by name."""
        ...

    def losses(self, batch: Batch, generator: torch.Generator, step: int) -> Iterator[LossResult]:
        """The losses of one micro-batch, each to be differentiated before the next is asked for.

        All draws come from `generator`; what is scheduled follows from `step`, the optimizer step from 1 on.
        """
        ...

    def sample(self, noise: Tensor, conditioning: TextConditioning) -> Tensor:
        """Latents (B, C, H, W) for sample grids."""
        ...

    def read_weights(self, device: torch.device) -> None:
        """Give the sharded model the values that it was built without, if it was; all ranks together."""
        ...

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the trained model, with `weights` (name → full tensor) for its parameters."""
        ...


class Distillation:
    """π-ID of a student on its own teacher's base.

    Args:
        recipe: what to train.
        null: token states (1, L, D) of the empty caption, for guidance.
        device: where the model lives.
        sharded: whether FSDP will shard the model. It then is built without weights, which `read_weights` gives each
            rank its part of: no rank ever holds a whole copy.
    """

    def __init__(
        self, recipe: DistillRecipe, null: TextConditioning, device: torch.device, sharded: bool = False
    ) -> None:
        self.recipe, imitation = recipe, recipe.imitation
        student, teacher = recipe.student, recipe.teacher
        named = teacher.path, teacher.family, teacher.embedded_guidance
        self._weights: Path | None = None
        if sharded:
            transformer, self.family, self._weights = open_teacher(*named)
            self.reference = reference_to(teacher.path, teacher.family)
        else:
            transformer, self.family, self.reference = load_teacher(*named)
        self.model = PolicyNetwork(
            transformer, self.family, student.policy, student.lora, recipe.train.seed, student.full
        )
        if not sharded:
            self.model.to(device)  # FSDP moves block after block; the whole may not fit
        self.transformer = self.model.transformer
        self.teacher = GuidedTeacher(
            self.model,
            null.to(device),
            teacher.guidance,
            teacher.guidance_interval,
            teacher.orthogonal,
        )
        self.settings = ImitationSettings(
            nfe=imitation.nfe,
            more_nfes=imitation.more_nfes,
            final_step_scale=imitation.final_step_scale,
            shift=TimeShift(imitation.shift),
            intermediate_states=imitation.intermediate_states,
            window=imitation.window / imitation.substeps,
            gm_dropout=imitation.dropout,
            loss_scale=imitation.loss_scale,
            substeps=imitation.substeps,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.model.trainable()

    def read_weights(self, device: torch.device) -> None:
        if self._weights is not None:
            self.model.fill(self._weights, device)
        if (start := self.recipe.student.start) is not None:
            from fewstep.export.adapter import fill_adapter
            from fewstep.export.pipeline import student_folder

            fill_adapter(self.model, student_folder(start, self.recipe.tracking.uri))

    def losses(self, batch: Batch, generator: torch.Generator, step: int) -> Iterator[LossResult]:
        ratio = teacher_ratio(step, self.recipe.imitation.mixing_steps)

        def student(x: Tensor, sigma: Tensor) -> Policy:
            return self.model.policy(x, sigma, batch.conditioning)

        def teacher(x: Tensor, sigma: Tensor) -> Tensor:
            return self.teacher.velocity(x, sigma, batch.conditioning.repeat(len(x) // len(batch)))

        if self.recipe.imitation.data_free:
            device = batch.conditioning.states.device
            noise = gaussian_noise((len(batch), *batch.shape), generator, device)
            yield from imitation_walk(student, teacher, noise, generator, self.settings.at_step(step), ratio)
        else:
            yield imitation_loss(student, teacher, batch.latent, generator, self.settings, ratio)

    def sample(self, noise: Tensor, conditioning: TextConditioning) -> Tensor:
        schedule = SamplerSchedule(self.settings.nfe, self.settings.shift, self.settings.final_step_scale)
        return generate(
            lambda x, sigma: self.model.policy(x, sigma, conditioning),
            noise,
            schedule,
            temperature=self.recipe.imitation.temperature,
            final_temperature=self.recipe.imitation.final_temperature,
            final_temperature_below=self.recipe.imitation.final_temperature_below,
            substeps=self.settings.substeps,
        )

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        from fewstep.data.schema import DatasetInfo
        from fewstep.export.pipeline import StudentCard, save_student

        recipe, imitation, teacher = self.recipe, self.recipe.imitation, read_card(self.recipe.teacher.path)
        info = DatasetInfo.open(recipe.data.path)
        card = StudentCard(
            teacher=self.reference,
            text_encoder=info.encoding.text_encoder,
            autoencoder=info.encoding.autoencoder,
            latent_shape=next(iter(info.buckets("train"))),
            nfe=imitation.nfe,
            more_nfes=imitation.more_nfes,
            shift=imitation.shift,
            final_step_scale=imitation.final_step_scale,
            substeps=imitation.substeps,
            temperature=imitation.temperature,
            final_temperature=imitation.final_temperature,
            final_temperature_below=imitation.final_temperature_below,
            guidance=recipe.teacher.guidance,
            embedded_guidance=recipe.teacher.embedded_guidance,
            teacher_shift=recipe.teacher.shift or (teacher.shift if teacher else None),
            guidance_interval=recipe.teacher.guidance_interval,
            orthogonal=recipe.teacher.orthogonal,
            max_tokens=info.encoding.max_tokens,
            recipe=recipe.model_dump(mode="json"),
        )
        save_student(self.model, card, folder, weights)


class FlowMatching:
    """Flow matching of a teacher, with captions dropped for classifier-free guidance. Arguments as above."""

    def __init__(self, recipe: TeacherRecipe, null: TextConditioning, device: torch.device) -> None:
        network = recipe.network
        if network.start is None:
            self.family = get_family(network.family)
            with torch.random.fork_rng():
                torch.manual_seed(recipe.train.seed)
                self.transformer = self.family.build(network.config)
        else:
            self.transformer, self.family, _ = load_teacher(network.start, network.family)
        self.transformer.to(device).train()
        self.dead = self.family.unused_parameters(self.transformer)
        for name in self.dead:
            self.transformer.get_parameter(name).requires_grad_(False)
        self.model = _VelocityNetwork(self.transformer, self.family)
        self.recipe, self.null = recipe, null.to(device)
        self.shift = TimeShift(recipe.flow_matching.shift)
        self.teacher = GuidedTeacher(self.model, self.null, recipe.flow_matching.guidance)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def read_weights(self, device: torch.device) -> None:
        """Nothing: its networks are small enough to be built whole on every rank."""

    def losses(self, batch: Batch, generator: torch.Generator, step: int) -> Iterator[LossResult]:
        draw = torch.rand(len(batch), generator=generator, device=generator.device)
        keep = (draw >= self.recipe.flow_matching.condition_dropout).to(batch.latent.device)
        conditioning = batch.conditioning.where(keep, self.null)
        yield flow_matching_loss(
            lambda x, t: self.model.velocity(x, t, conditioning), batch.latent, generator, self.shift
        )

    def sample(self, noise: Tensor, conditioning: TextConditioning) -> Tensor:
        return euler(
            lambda x, sigma: self.teacher.velocity(x, sigma, conditioning), noise, steps=32, shift=self.shift
        )

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        from fewstep.data.schema import DatasetInfo
        from fewstep.models.teacher import TeacherCard, save_teacher

        info = DatasetInfo.open(self.recipe.data.path)
        card = TeacherCard(
            family=self.family.name,
            text_encoder=info.encoding.text_encoder,
            autoencoder=info.encoding.autoencoder,
            latent_shape=next(iter(info.buckets("train"))),
            shift=self.recipe.flow_matching.shift,
            guidance=self.recipe.flow_matching.guidance,
        )
        trained = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        # What never reaches the output was never trained: zeros say so, and compress well.
        dead = {name: torch.zeros(self.transformer.get_parameter(name).shape) for name in self.dead}
        save_teacher(self.transformer, card, folder, dead | trained)


class GuidanceDistillation(FlowMatching):
    """A network that takes the guidance scale as an input learns another teacher's guided velocity.

    So FLUX.1 dev was made from a network that is guided by a second pass. Arguments as above.
    """

    def __init__(self, recipe: TeacherRecipe, null: TextConditioning, device: torch.device) -> None:
        super().__init__(recipe, null, device)
        told = told_guidance(
            self.family, self.transformer, recipe.flow_matching.guidance, recipe.network.family
        )
        self.family = self.model.family = told
        # Of the sample grids: one pass, told the scale.
        self.teacher = GuidedTeacher(self.model, None, scale=1)
        settings = recipe.guidance_distillation
        transformer, family, _ = load_teacher(settings.teacher, settings.family)
        self.imitated = _VelocityNetwork(transformer.to(device).eval().requires_grad_(False), family)
        if settings.from_teacher:
            start_from_dual_stream(self.transformer, transformer, null.states.square().mean().sqrt().item())

    def losses(self, batch: Batch, generator: torch.Generator, step: int) -> Iterator[LossResult]:
        least, most = self.recipe.guidance_distillation.scales
        draw = torch.rand(len(batch), generator=generator, device=generator.device).to(batch.latent.device)
        scale = torch.lerp(torch.full_like(draw, least), torch.full_like(draw, most), draw)
        both = batch.conditioning.cat(self.null.expand(len(batch)))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            positive, negative = self.imitated.velocity(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return guided_velocity(positive, negative, scale)

        yield flow_matching_loss(
            lambda x, t: self.model(x, t, batch.conditioning, scale),
            batch.latent,
            generator,
            self.shift,
            guided,
        )


class _VelocityNetwork(nn.Module):
    """A transformer as a velocity field on latents: the smallest thing FSDP and guidance can call."""

    def __init__(self, transformer: nn.Module, family: Family) -> None:
        super().__init__()
        self.transformer, self.family = transformer, family
        self.channels = family.latent_channels(transformer)

    def transformers(self) -> list[nn.Module]:
        return [self.transformer]

    def forward(self, x: Tensor, t: Tensor, conditioning: Any, guidance: Tensor | None = None) -> Tensor:
        family = self.family if guidance is None else replace(self.family, embedded_guidance=guidance)
        tokens = family.denoise(self.transformer, x, t, conditioning)
        return self.family.unpack(tokens.float(), self.channels, x.shape[-2], x.shape[-1])[:, 0]

    def velocity(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """(B, C, H, W) velocity; with gradients where they are enabled."""
        return self(x, t, conditioning)


def build_objective(
    recipe: DistillRecipe | TeacherRecipe,
    null: TextConditioning,
    device: torch.device,
    sharded: bool = False,
) -> Objective:
    """The objective that a recipe describes. Arguments as for `Distillation`."""
    if isinstance(recipe, DistillRecipe):
        return Distillation(recipe, null, device, sharded)
    kind = FlowMatching if recipe.guidance_distillation.teacher is None else GuidanceDistillation
    return kind(recipe, null, device)
