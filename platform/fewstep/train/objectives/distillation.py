"""π-ID, the objective of students."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.schema import DatasetInfo
from fewstep.data.stream import Batch
from fewstep.distill import BatchGenerators, LossResult, imitation_loss, imitation_walk, teacher_ratio
from fewstep.flow import SamplerConfig, euler, gaussian_noise, generate
from fewstep.models.conditioning import Conditioning
from fewstep.models.cpu_operations import compute_faster
from fewstep.models.guided_teacher import GuidedTeacher
from fewstep.models.heads import PolicyConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.own_schedule import teacher_schedule
from fewstep.models.teacher import open_teacher, own_scheduler, read_card, reference_to
from fewstep.policies import Policy
from fewstep.student.adapter import fill_adapter
from fewstep.student.card import StudentCard
from fewstep.student.pipeline import save_student
from fewstep.student.resolve import resolve_student
from fewstep.train.objectives.interface import images_of
from fewstep.train.recipe import DistillRecipe


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
        self.model, self._weights = adapted_teacher(
            recipe, student.policy, recipe.train.seed, None if sharded else device
        )
        self.family, self.transformer = self.model.family, self.model.transformer
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

    @property
    def models(self) -> list[Any]:
        """The network alone."""
        return [self.model]

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
        if imitation.data_free:
            one_nfe = sampler.at_optimizer_step(step)
            with self._walk(batch) as student:
                yield from imitation_walk(
                    student,
                    self._teacher(batch),
                    self._noise(batch, generator),
                    generator,
                    one_nfe,
                    imitation,
                    ratio,
                )
        else:
            yield imitation_loss(
                self._student(batch),
                self._teacher(batch),
                images_of(batch),
                generator,
                sampler,
                imitation,
                ratio,
            )

    def _student(self, batch: Batch) -> Callable[[Tensor, Tensor], Policy]:
        """The student with the batch's conditions, from states and σ to policies."""
        return lambda x, sigma: self.model.policy(x, sigma, batch.conditioning)

    def _teacher(self, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided teacher with the batch's conditions, from states and σ to velocities, without gradient."""
        taught = self.teacher.prepare(batch.conditioning)
        # Losses evaluate several states of each sample at once, S of them after one another in the batch.
        return lambda x, sigma: self.teacher.velocity(x, sigma, taught.repeat(len(x) // len(batch)))

    @contextmanager
    def _walk(self, batch: Batch) -> Iterator[Callable[[Tensor, Tensor], Policy]]:
        """The student for several losses, each with a backward pass of its own, of which texts are prepared once."""
        seen, finish = self.model.prepare(batch.conditioning, student=True).cut()
        yield lambda x, sigma: self.model.policy(x, sigma, seen)
        finish()  # after the last loss's backward pass

    def _noise(self, batch: Batch, generator: BatchGenerators) -> Tensor:
        """Noise from which samplers begin, (B, C, H, W)."""
        return gaussian_noise((len(batch), *batch.shape), generator, batch.conditioning.device)

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

    def sample_teacher(self, noise: Tensor, conditioning: Conditioning, steps: int) -> Tensor:
        """Latents (B, C, H, W) of the teacher's own sampler in so many guided Euler steps, from noise of that shape."""
        tokens = self.family.tokens(self.transformer, *noise.shape[2:])
        students = self._sampler_at(noise.shape[1:]).time_shift
        schedule = teacher_schedule(
            **self._teachers_own(), family=self.family, tokens=tokens, otherwise=students
        )
        prepared = self.teacher.prepare(conditioning)
        return euler(lambda x, sigma: self.teacher.velocity(x, sigma, prepared), noise, steps, schedule)

    def _teachers_own(self) -> dict[str, Any]:
        """What the recipe leaves to the teacher's card: its shift, and its scheduler."""
        path, given = self.recipe.teacher.path, self.recipe.teacher
        card = read_card(path)
        return {
            "shift": given.shift or (card.shift if card else None),
            "scheduler": given.scheduler or own_scheduler(path),
        }

    def _sampler_at(self, shape: Sequence[int]) -> SamplerConfig:
        """The recipe's sampler for latents of shape (C, H, W)."""
        return self.recipe.sampler.at_size(self.family.tokens(self.transformer, shape[1], shape[2]))

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the student's folder: adapters, head and card."""
        recipe = self.recipe
        info = DatasetInfo.open(recipe.data.path)
        card = StudentCard(
            teacher=self.reference,
            text_encoder=info.encoding.text_encoder,
            autoencoder=info.encoding.autoencoder,
            latent_shape=next(iter(info.buckets("train"))),
            sampler=recipe.sampler,
            # The card holds all that generating needs, so what the recipe leaves to the teacher's is resolved now.
            teacher_sampler=recipe.teacher.sampler.model_copy(update=self._teachers_own()),
            references=info.encoding.references,
            max_tokens=info.encoding.max_tokens,
            recipe=recipe.model_dump(mode="json"),
        )
        save_student(self.model, card, folder, weights)


def adapted_teacher(
    recipe: DistillRecipe, policy: PolicyConfig, seed: int, device: torch.device | None
) -> tuple[PolicyNetwork, Path | None]:
    """The recipe's teacher with new adapters (or a copy, as it says) and a policy head.

    Args:
        recipe: says which teacher, and what is trained of it.
        policy: of the head.
        seed: of the adapters.
        device: where it goes; None for a model that FSDP shards, which may be too large for one device.

    Returns:
        The network, and the folder of its weights where they are yet to be read.
    """
    student, teacher = recipe.student, recipe.teacher
    transformer, family, weights = open_teacher(
        teacher.path, teacher.family, teacher.embedded_guidance_scale, teacher.loras
    )
    network = PolicyNetwork(transformer, family, policy, student.lora, seed, student.full)
    network.lower(recipe.train.precision)
    if recipe.train.compile is None:  # which computes products in its own way
        for part in network.transformers():
            compute_faster(family.trunk(part))
    if device is not None and weights is None:
        network.to(device)
    return network, weights
