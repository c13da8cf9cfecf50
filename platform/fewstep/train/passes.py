"""Network passes of an objective's optimizer step: what its compute is counted by, and objectives are matched by."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from fewstep.train.recipe import DistillRecipe


@dataclass(frozen=True)
class StepPasses:
    """Network passes per sample and optimizer step, the mean over a run."""

    student: float
    """Of the student, with gradient: forward and backward."""
    student_forward: float
    """Of the student, without gradient."""
    teacher: float
    """Of the teacher; a guided query takes two."""
    critic: float = 0.0
    """Of the fake score, with gradient."""
    critic_forward: float = 0.0
    """Of the fake score, without gradient."""
    teacher_at_once: int = 1
    """Those of the teacher that are one larger batch."""

    @property
    def with_gradient(self) -> float:
        """Of all trained networks."""
        return self.student + self.critic

    @property
    def forward(self) -> float:
        """Of all trained networks, without gradient."""
        return self.student_forward + self.critic_forward


def passes_of(recipe: DistillRecipe) -> StepPasses:
    """The passes that a recipe's objective takes.

    A guidance interval is left out of account: outside of it the teacher takes one pass, and not two.
    """
    nfe, query = statistics.fmean(recipe.sampler.nfes), recipe.teacher.passes
    # Without data a step walks all segments of the student.
    segments = nfe if recipe.data_free else 1.0
    match recipe.objective:
        case "imitation":
            at_once = recipe.imitation.intermediate_states * query
            return StepPasses(segments, 0, segments * at_once, teacher_at_once=at_once)
        case "regression":
            queries = recipe.regression.steps * (2 if recipe.regression.solver == "heun" else 1)
            return StepPasses(segments, 0, segments * queries * query, teacher_at_once=query)
        case "consistency":
            forward = 2 if recipe.consistency.continuous else 1
            return StepPasses(1, forward, query, teacher_at_once=query)
        case "meanflow":
            return StepPasses(1, 2, query, teacher_at_once=query)
        case "dmd2":
            # Evaluations of the student before the one whose image is matched
            before = nfe - 1 if recipe.dmd2.last_segment else (nfe - 1) / 2
            share = 1 / (recipe.dmd2.critic_steps + 1)  # of the steps, the student's own
            return StepPasses(
                student=share,
                student_forward=share * before + (1 - share) * (before + 1),
                teacher=share * query,
                critic=1 - share,
                critic_forward=share,
                teacher_at_once=query,
            )
