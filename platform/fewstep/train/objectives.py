"""Objectives, what a training run optimises: π-ID of a student, or the velocity of a teacher; with one interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.data.schema import DatasetInfo
from fewstep.data.stream import Batch
from fewstep.distill import (
    BatchGenerators,
    LossResult,
    flow_matching_loss,
    imitation_loss,
    imitation_walk,
    teacher_ratio,
)
from fewstep.draws import uniform
from fewstep.flow import SamplerConfig, TimeShift, euler, gaussian_noise, generate, guided_velocity
from fewstep.models.conditioning import Conditioning, TextConditioning
from fewstep.models.cpu_operations import compute_faster
from fewstep.models.dual_stream import start_from_dual_stream
from fewstep.models.family import Family, Transformer
from fewstep.models.guided_teacher import GuidedTeacher
from fewstep.models.network import PolicyNetwork
from fewstep.models.precision import compute_in_bfloat16
from fewstep.models.registry import get_family
from fewstep.models.teacher import (
    TeacherCard,
    load_teacher,
    open_teacher,
    own_scheduler,
    read_card,
    reference_to,
    save_teacher,
    told_guidance,
)
from fewstep.policies import Policy
from fewstep.student.adapter import fill_adapter
from fewstep.student.card import StudentCard
from fewstep.student.pipeline import save_student
from fewstep.student.resolve import resolve_student
from fewstep.train.recipe import DistillRecipe, TeacherRecipe


class Objective(Protocol):
    """Interface of objectives: a model to shard and train, its losses, and how it samples."""

    model: Any
    """The nn.Module that FSDP shards and gathers; all calls go through its `forward`. It has `transformers()`."""
    family: Family
    """Family of the network that is trained."""
    transformer: Transformer
    """The network that is trained."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer trains, by name."""
        ...

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """The losses of one micro-batch; call backward on each before taking the next.

        Args:
            batch: the micro-batch, on the model's device.
            generator: source of all random numbers.
            step: optimizer step, from 1, for what changes over the training.
        """
        ...

    def sample(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Latents (B, C, H, W) of B conditions for sample grids, from noise of that shape."""
        ...

    def read_weights(self, device: torch.device) -> None:
        """Fill a model that was built without values, after `shard`; every rank has to call it at the same time."""
        ...

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the trained model to a folder, with `weights` (name → whole tensor) for its parameters."""
        ...


class Distillation:
    """π-ID of a student that shares its teacher's base (METHOD.md section 4).

    Args:
        recipe: what to train.
        null: the null condition (B = 1) of guidance.
        device: of the model.
        sharded: whether FSDP will shard the model, so that `read_weights` reads each rank's part and no rank ever
            holds the whole.
    """

    def __init__(
        self, recipe: DistillRecipe, null: Conditioning, device: torch.device, sharded: bool = False
    ) -> None:
        self.recipe = recipe
        student, teacher = recipe.student, recipe.teacher
        self.reference = reference_to(teacher.path, teacher.family, teacher.loras)
        transformer, self.family, self._weights = open_teacher(
            teacher.path, teacher.family, teacher.embedded_guidance_scale, teacher.loras
        )
        self.model = PolicyNetwork(
            transformer, self.family, student.policy, student.lora, recipe.train.seed, student.full
        )
        self.model.lower(recipe.train.precision)
        if recipe.train.compile is None:  # which computes products in its own way
            for network in self.model.transformers():
                compute_faster(self.family.trunk(network))
        if not sharded and self._weights is None:
            # A sharded model may be too large for one device: FSDP moves its parts.
            self.model.to(device)
        self.transformer = self.model.transformer
        self.teacher = GuidedTeacher(
            self.model,
            null.to(device),
            teacher.guidance_scale,
            teacher.guidance_interval,
            teacher.orthogonal,
            teacher.renorm,
            self.family.patch(self.transformer),
            frozen=True,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """The student's own weights, by name."""
        return self.model.trainable()

    def read_weights(self, device: torch.device) -> None:
        """Fill a network that was built without weights, and give a student that continues another one its weights."""
        if self._weights is not None:
            self.model.fill(self._weights, device)
        if (start := self.recipe.student.start) is not None:
            fill_adapter(self.model, resolve_student(start, tracking_uri=self.recipe.tracking.uri).folder)

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """π-ID of one micro-batch: one loss or, with `data_free`, one per segment."""
        imitation, sampler = self.recipe.imitation, self._sampler_at(batch.shape)
        ratio = teacher_ratio(step, imitation.mixing_steps)
        seen, taught = batch.conditioning, self.teacher.prepare(batch.conditioning)
        if imitation.data_free:
            # Once for all segments, although each has a backward pass of its own.
            seen, finish = self.model.prepare(seen, student=True).cut()

        def student(x: Tensor, sigma: Tensor) -> Policy:
            return self.model.policy(x, sigma, seen)

        def teacher(x: Tensor, sigma: Tensor) -> Tensor:
            # The loss evaluates several states of each sample at once, S of them after one another in the batch.
            return self.teacher.velocity(x, sigma, taught.repeat(len(x) // len(batch)))

        if imitation.data_free:
            noise = gaussian_noise((len(batch), *batch.shape), generator, batch.conditioning.device)
            one_nfe = sampler.at_optimizer_step(step)
            yield from imitation_walk(student, teacher, noise, generator, one_nfe, imitation, ratio)
            finish()  # after the last segment's backward pass
        else:
            yield imitation_loss(student, teacher, _images(batch), generator, sampler, imitation, ratio)

    def sample(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """Latents (B, C, H, W) of the student's own sampler, from noise of that shape."""
        sampler = self._sampler_at(noise.shape[1:])
        generator = torch.Generator().manual_seed(
            self.recipe.train.seed
        )  # of what the sampler renews, if h > 0
        # With the weights that the model has now: the loop swaps those of the EMA in before.
        prepared = self.model.prepare(conditioning, student=True)
        policy_at = partial(self.model.policy, conditioning=prepared)
        return generate(policy_at, noise, sampler, generator=generator)

    def _sampler_at(self, shape: Sequence[int]) -> SamplerConfig:
        """The recipe's sampler for latents of shape (C, H, W)."""
        return self.recipe.sampler.at_size(self.family.tokens(self.transformer, shape[1], shape[2]))

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the student's folder: adapters, head and card."""
        recipe, teacher = self.recipe, read_card(self.recipe.teacher.path)
        info = DatasetInfo.open(recipe.data.path)
        # The card holds all that generating needs, so what the recipe leaves to the teacher's card is resolved now.
        own = {
            "shift": recipe.teacher.shift or (teacher.shift if teacher else None),
            "scheduler": recipe.teacher.scheduler or own_scheduler(recipe.teacher.path),
        }
        card = StudentCard(
            teacher=self.reference,
            text_encoder=info.encoding.text_encoder,
            autoencoder=info.encoding.autoencoder,
            latent_shape=next(iter(info.buckets("train"))),
            sampler=recipe.sampler,
            teacher_sampler=recipe.teacher.sampler.model_copy(update=own),
            max_tokens=info.encoding.max_tokens,
            recipe=recipe.model_dump(mode="json"),
        )
        save_student(self.model, card, folder, weights)


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

    def parameters(self) -> dict[str, nn.Parameter]:
        """All weights that affect the output, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def read_weights(self, device: torch.device) -> None:
        """Nothing: teachers are small enough here to be built whole on every rank."""

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """One flow-matching loss of the micro-batch, with some of its conditions replaced by the null condition."""
        latent = _images(batch)
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
        latent = _images(batch)
        draw = uniform((len(batch),), generator, latent.device)
        # Uniform in [least, most], one per sample
        scale = torch.lerp(torch.full_like(draw, least), torch.full_like(draw, most), draw)
        both = batch.conditioning.cat(self.null.expand(len(batch)))

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


def _images(batch: Batch) -> Tensor:
    """The batch's latents. Validation has refused datasets without images for objectives that need them."""
    assert batch.latent is not None
    return batch.latent


def build_objective(
    recipe: DistillRecipe | TeacherRecipe,
    null: Conditioning,
    device: torch.device,
    sharded: bool = False,
) -> Objective:
    """The objective of a recipe; arguments as for `Distillation`."""
    if isinstance(recipe, DistillRecipe):
        return Distillation(recipe, null, device, sharded)
    kind = FlowMatching if recipe.guidance_distillation.teacher is None else GuidanceDistillation
    return kind(recipe, null, device)
