"""Other objectives for the same students, to compare π-ID with: one harness, teacher, data and network.

All of them train the policy that the student's network predicts. With `student.policy: {type: dx, points: 1}` that is
one image per evaluation, as those methods were published.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.stream import Batch
from fewstep.distill import (
    BatchGenerators,
    LossResult,
    consistency_loss,
    critic_loss,
    matching_loss,
    meanflow_loss,
    regression_loss,
    regression_walk,
    student_images,
)
from fewstep.models.conditioning import Conditioning
from fewstep.models.heads import DXConfig
from fewstep.train.objectives.distillation import Distillation, adapted_teacher
from fewstep.train.objectives.interface import images_of
from fewstep.train.recipe import DistillRecipe

CRITIC = "critic."
"""What names of the fake score's parameters begin with."""


class RegressionDistillation(Distillation):
    """The teacher's own steps over a segment are learned as one; see `fewstep.distill.regression`."""

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """One loss of the micro-batch or, with `data_free`, one per segment."""
        config, sampler, teacher = self.recipe.regression, self._sampler_at(batch.shape), self._teacher(batch)
        if config.data_free:
            with self._walk(batch) as student:
                noise, one_nfe = self._noise(batch, generator), sampler.at_optimizer_step(step)
                yield from regression_walk(student, teacher, noise, one_nfe, config)
        else:
            yield regression_loss(self._student(batch), teacher, images_of(batch), generator, sampler, config)


class ConsistencyDistillation(Distillation):
    """All states of a trajectory lead to the same end of their segment; see `fewstep.distill.consistency`."""

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """One loss of the micro-batch."""
        yield consistency_loss(
            self._student(batch), self._teacher(batch), images_of(batch), generator,
            self._sampler_at(batch.shape), self.recipe.consistency, step,
        )  # fmt: skip


class MeanFlowDistillation(Distillation):
    """Mean velocities satisfy the MeanFlow identity; see `fewstep.distill.meanflow`."""

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """One loss of the micro-batch."""
        yield meanflow_loss(
            self._student(batch), self._teacher(batch), images_of(batch), generator,
            self._sampler_at(batch.shape), self.recipe.meanflow, step,
        )  # fmt: skip


class DistributionMatching(Distillation):
    """DMD2: a student, and a fake score that learns the velocity of its images; see `fewstep.distill.dmd2`.

    The fake score is a copy of the teacher with adapters (or weights) trained like the student's, so that the base is
    in memory twice.
    """

    def __init__(
        self, recipe: DistillRecipe, null: Conditioning, device: torch.device, sharded: bool = False
    ) -> None:
        super().__init__(recipe, null, device, sharded)
        # Opened again, as the student's network has its adapters by now.
        self.critic, self._critics_weights = adapted_teacher(
            recipe, DXConfig(points=1), recipe.train.seed + 1, None if sharded else device
        )

    def read_weights(self, device: torch.device) -> None:
        """As of the student, and the teacher's weights for the fake score to begin with."""
        super().read_weights(device)
        if self._critics_weights is not None:
            self.critic.fill(self._critics_weights, device)

    @property
    def models(self) -> list[Any]:
        """The student with its teacher, and the fake score."""
        return [self.model, self.critic]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights of the student and of the fake score, by name."""
        critic = {CRITIC + name: value for name, value in self.critic.trainable().items()}
        return super().parameters() | critic

    def losses(self, batch: Batch, generator: BatchGenerators, step: int) -> Iterator[LossResult]:
        """One loss of the micro-batch: the student's or the fake score's, as the step's number has it."""
        config, sampler = self.recipe.dmd2, self._sampler_at(batch.shape)

        def critic(x: Tensor, sigma: Tensor) -> Tensor:
            there = sigma.to(x.device, non_blocking=True)
            # The velocity of a policy of one point is the same everywhere on its own straight line.
            return self.critic.policy(x, there, batch.conditioning).velocity(x, there)

        noise, students = self._noise(batch, generator), config.trains_student(step)
        with torch.set_grad_enabled(students):
            images = student_images(self._student(batch), noise, generator, sampler, config, step)
        if students:
            yield matching_loss(images, self._teacher(batch), critic, generator, sampler, config)
        else:
            yield critic_loss(images, critic, generator, sampler, config)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the student's folder, without the fake score."""
        own = {name: value for name, value in weights.items() if not name.startswith(CRITIC)}
        super().export(folder, own)
