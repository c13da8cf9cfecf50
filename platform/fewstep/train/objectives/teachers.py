"""Objectives of teachers: flow matching, and guidance distillation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.schema import DatasetInfo
from fewstep.data.stream import Batch
from fewstep.distill import BatchGenerators, LossResult, flow_matching_loss
from fewstep.draws import uniform
from fewstep.flow import TimeShift, euler, guided_velocity
from fewstep.models.conditioning import Conditioning, TextConditioning
from fewstep.models.dual_stream import start_from_dual_stream
from fewstep.models.family import Family, Transformer
from fewstep.models.guided_teacher import GuidedTeacher
from fewstep.models.precision import compute_in_bfloat16
from fewstep.models.registry import get_family
from fewstep.models.teacher import TeacherCard, load_teacher, save_teacher, told_guidance
from fewstep.train.objectives.interface import images_of
from fewstep.train.recipe import TeacherRecipe


class FlowMatching:
    """Flow matching of a teacher; some conditions are replaced by the null condition, for classifier-free guidance.

    Args:
        recipe: what to train.
        null: the null condition (B = 1).
        device: of the model.
    """

    def __init__(self, recipe: TeacherRecipe, null: Conditioning, device: torch.device) -> None:
        network = recipe.network
        if network.start is None:
            self.family = get_family(network.family)
            # Networks draw their initial weights from torch's global generator: seeded here, and then left as it was.
            with torch.random.fork_rng():
                torch.manual_seed(recipe.train.seed)
                self.transformer = self.family.build(network.config)
        else:
            self.transformer, self.family, _ = load_teacher(network.start, network.family)
        self.transformer.to(device).train()
        # Frozen, as they never get a gradient.
        self.dead = self.family.unused_parameters(self.transformer)
        for name in self.dead:
            self.transformer.get_parameter(name).requires_grad_(False)
        self.model = _VelocityNetwork(self.transformer, self.family)
        if recipe.train.precision == "bfloat16":
            compute_in_bfloat16(self.family.trunk(self.transformer))
        self.recipe, self.null = recipe, null.to(device)
        self.shift = TimeShift(recipe.flow_matching.shift)
        self.teacher = GuidedTeacher(self.model, self.null, recipe.flow_matching.guidance_scale)

    @property
    def models(self) -> list[Any]:
        """The network alone."""
        return [self.model]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All weights that affect the output, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def read_weights(self, device: torch.device) -> None:
        """Nothing: teachers are small enough here to be built whole on every rank."""

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """One flow-matching loss of the micro-batch, with some of its conditions replaced by the null condition."""
        latent = images_of(batch)
        draw = uniform((len(batch),), generator, latent.device)
        keep = draw >= self.recipe.flow_matching.condition_dropout
        conditioning = batch.conditioning.where(keep, self.null)
        yield flow_matching_loss(
            lambda x, t: self.model.velocity(x, t, conditioning), latent, generator, self.shift
        )

    def sample(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Latents (B, C, H, W) of 32 guided Euler steps, from noise of that shape."""
        prepared = self.teacher.prepare(conditioning)
        return euler(lambda x, sigma: self.teacher.velocity(x, sigma, prepared), noise, 32, self.shift)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the teacher's folder: weights and card."""
        info = DatasetInfo.open(self.recipe.data.path)
        card = TeacherCard(
            family=self.family.name,
            text_encoder=info.encoding.text_encoder,
            autoencoder=info.encoding.autoencoder,
            latent_shape=next(iter(info.buckets("train"))),
            shift=self.recipe.flow_matching.shift,
            guidance_scale=self.recipe.flow_matching.guidance_scale,
        )
        trained = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        # Parameters that do not affect the output were never trained: they are written as zeros, which compress well.
        dead = {name: torch.zeros(self.transformer.get_parameter(name).shape) for name in self.dead}
        save_teacher(self.transformer, card, folder, dead | trained)


class GuidanceDistillation(FlowMatching):
    """Guidance distillation: a network that takes the guidance scale as an input learns a teacher's guided velocity.

    FLUX.1 dev was made in this way: it gives in one pass what takes its teacher two.

    Args:
        recipe: what to train, and which teacher to imitate.
        null: the null condition (B = 1) of the teacher's guidance.
        device: of both networks.
    """

    def __init__(self, recipe: TeacherRecipe, null: Conditioning, device: torch.device) -> None:
        super().__init__(recipe, null, device)
        told = told_guidance(
            self.family, self.transformer, recipe.flow_matching.guidance_scale, recipe.network.family
        )
        self.family = self.model.family = told
        # For sample grids: the guidance scale is an input, so one pass without classifier-free guidance.
        self.teacher = GuidedTeacher(self.model, None, scale=1)
        settings = recipe.guidance_distillation
        assert settings.teacher is not None, "`build_objective` takes this class where there is one"
        transformer, family, _ = load_teacher(settings.teacher, settings.family)
        self.imitated = _VelocityNetwork(transformer.to(device).eval().requires_grad_(False), family)
        if settings.from_teacher:
            assert isinstance(null, TextConditioning), "both of the classes that can start so take text"
            start_from_dual_stream(self.transformer, transformer, null.states.square().mean().sqrt().item())

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """One loss: the network's velocity for a random guidance scale against the teacher's, guided by that scale."""
        # Conditions are not dropped: without a second pass, there is no guidance that would need the null condition.
        least, most = self.recipe.guidance_distillation.scales
        latent = images_of(batch)
        draw = uniform((len(batch),), generator, latent.device)
        # Uniform in [least, most], one per sample
        scale = torch.lerp(torch.full_like(draw, least), torch.full_like(draw, most), draw)
        both = batch.conditioning.cat(batch.conditioning.unconditional(self.null))

        def guided(x: Tensor, t: Tensor) -> Tensor:
            # Both passes of the teacher as one batch
            positive, negative = self.imitated.velocity(x.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return guided_velocity(positive, negative, scale)

        yield flow_matching_loss(
            lambda x, t: self.model(x, t, batch.conditioning, scale),
            latent,
            generator,
            self.shift,
            guided,
        )


class _VelocityNetwork(nn.Module):
    """A transformer with its family, as a module from latents to velocities that FSDP and `GuidedTeacher` can call."""

    def __init__(self, transformer: Transformer, family: Family) -> None:
        super().__init__()
        self.transformer, self.family = transformer, family
        self.channels = family.latent_channels(transformer)

    def transformers(self) -> list[Transformer]:
        return [self.transformer]

    def forward(
        self, x: Tensor, t: Tensor, conditioning: Any, guidance_scale: Tensor | None = None
    ) -> Tensor:
        tokens = self.family.denoise(self.transformer, x, t, conditioning, guidance_scale)
        return self.family.velocity(tokens, self.channels, *x.shape[-2:])

    def prepare(self, conditioning: Any) -> Any:
        """What of a conditioning depends on neither states nor times; see `Family.prepare`."""
        return self.family.prepare(self.transformer, conditioning)

    def velocity(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """The velocity, (B, C, H, W), with gradient if autograd is enabled."""
        return self(x, t, conditioning)
