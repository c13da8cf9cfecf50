"""Sample grids of a run, and its best student by them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.config import Shape
from fewstep.encoders import load_autoencoder
from fewstep.flow import gaussian_noise
from fewstep.models.conditioning import Conditioning
from fewstep.storage import Storage
from fewstep.train import checkpoint as ckpt
from fewstep.train.learner import Learner
from fewstep.train.objectives import Distillation
from fewstep.train.parallel import drop_gathered
from fewstep.train.preview import REFERENCE_STEPS, BestStudent
from fewstep.train.recipe import DistillRecipe
from fewstep.train.watch import HealthWatch, keep_best


@dataclass(frozen=True)
class SamplePlan:
    """What a run's sample grids show."""

    conditioning: Conditioning
    """The conditions, one per image."""
    shape: Shape
    """(C, H, W) of the latents."""
    autoencoder: str
    """Name of the autoencoder that decodes them."""
    real: Tensor | None = None
    """Latents (B, C, H, W) of the conditions' own pictures; None in datasets of prompts alone."""


class SampleGrids:
    """The sample grids of a run: made every so many steps, watched, and measured where the recipe asks for it.

    By all ranks if the model is sharded, as each holds a part of it; otherwise by rank 0.

    Args:
        learner: has the model, and samples it.
        watch: judges the grids, and knows the best student.
        plan: what the grids show; None for no grids.
    """

    def __init__(self, learner: Learner, watch: HealthWatch, plan: SamplePlan | None) -> None:
        self._learner, self._watch, self._plan = learner, watch, plan
        recipe = learner.recipe
        self._every = recipe.evaluation.every if isinstance(recipe, DistillRecipe) else 0
        self._samples = learner.sharded or learner.rank == 0
        if plan is None:
            return
        if not watch.compares() and plan.real is not None and learner.rank == 0:
            watch.known_pictures(self._decoded(plan.real))
        if self._every and self._samples:
            teacher = teacher_sample(learner, plan)
            if learner.rank == 0:
                watch.compare_with(self._decoded(teacher))

    def after(self, step: int, settle: Callable[[], None]) -> None:
        """Make the grid of a step, if it is one for a grid.

        Args:
            step: optimizer steps done.
            settle: `Checkpoints.settle`.

        Raises:
            Diverged: the grid shows that the run turns to noise.
        """
        plan, settings = self._plan, self._learner.recipe.train
        if plan is None:
            return
        last = step == settings.steps
        show = bool(settings.sample_every) and step % settings.sample_every == 0 and not last
        measure = bool(self._every) and (step % self._every == 0 or last)
        if not (show or measure):
            return
        before = self._watch.best
        if self._samples:
            latents = sample(self._learner, plan)
            self._watch.look(step, latents, plan.autoencoder, show=show, measure=measure, last=last)
        # The last step's student is exported with the last checkpoint.
        if self._watch.agree_on_look() and not last:
            settle()  # so that the storage has all checkpoints that may refer to an earlier best student
            weights = self._learner.averaged()
            if self._learner.rank == 0:
                self._keep(weights, before)

    def _keep(self, weights: dict[str, Tensor], before: BestStudent | None) -> None:
        """Put the student into the run's storage as its best."""
        import ray.train

        assert self._watch.best is not None, "it has just been found"
        place = ray.train.get_context().get_storage()
        run = Storage(place.experiment_fs_path, place.storage_filesystem, place.experiment_fs_path)
        states = [one.state.best for one in ckpt.saved_checkpoints(run) if one.state is not None]
        others = [before, *map(BestStudent.of, states)]
        with tempfile.TemporaryDirectory(prefix="fewstep-best-") as folder:
            self._learner.objective.export(Path(folder), weights)
            keep_best(run, Path(folder), self._watch.best, {one.folder for one in others if one is not None})

    def _decoded(self, latents: Tensor) -> np.ndarray:
        assert self._plan is not None, "only runs with grids have pictures to compare them with"
        return load_autoencoder(self._plan.autoencoder).decode(latents).numpy()


@torch.no_grad()
def sample(learner: Learner, plan: SamplePlan) -> Tensor:
    """Latents (B, C, H, W) of the plan's conditions, with the EMA's weights, from noise that is the same in every call.

    Args:
        learner: has the model, and samples it.
        plan: conditions and shape.
    """
    objective = learner.objective
    objective.model.eval()
    with learner.ema.swapped():
        drop_gathered(objective.model)  # FSDP may still hold the weights from before the swap
        latents = _in_parts(learner, plan, objective.sample)
    drop_gathered(objective.model)
    objective.model.train()
    return latents


@torch.no_grad()
def teacher_sample(learner: Learner, plan: SamplePlan) -> Tensor:
    """The teacher's latents (B, C, H, W) of the same conditions and noise, by many guided steps."""
    objective = learner.objective
    assert isinstance(objective, Distillation), "only students are measured against a teacher"
    objective.model.eval()
    latents = _in_parts(learner, plan, lambda x, c: objective.sample_teacher(x, c, REFERENCE_STEPS))
    drop_gathered(objective.model)
    objective.model.train()
    return latents


def _in_parts(
    learner: Learner, plan: SamplePlan, sampler: Callable[[Tensor, Conditioning], Tensor]
) -> Tensor:
    """Sample all of the plan's conditions, with no more memory than training takes."""
    generator = torch.Generator().manual_seed(learner.recipe.train.seed)
    noise = gaussian_noise((len(plan.conditioning), *plan.shape), generator)
    parts = []
    for first in range(0, len(noise), learner.share.largest):
        part = slice(first, first + learner.share.largest)
        conditioning = plan.conditioning[part].to(learner.device)
        parts.append(sampler(noise[part].to(learner.device), conditioning).cpu())
    return torch.cat(parts)
