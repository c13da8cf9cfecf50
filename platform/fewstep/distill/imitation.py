"""π-ID: on-policy imitation distillation of a flow teacher (METHOD.md section 4; arXiv 2510.14974)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.distill.result import LossResult, draw_noise, draw_times
from fewstep.flow import TEXT_TO_IMAGE_SHIFT, Segments, TimeShift
from fewstep.policies import SUBSTEPS, Policy, mean_velocity, rollout


@dataclass(frozen=True)
class ImitationSettings:
    """What π-ID trains for; the defaults are those of a text-to-image student with a guided teacher."""

    nfe: int = 4
    """Network evaluations of the student, one per segment."""
    final_step_scale: float = 0.5
    """Size of the segment nearest to the data, relative to the others."""
    shift: TimeShift = TEXT_TO_IMAGE_SHIFT
    """From raw time to σ."""
    intermediate_states: int = 2
    """S, the visited states per segment at which the teacher is asked."""
    window: float = 3 / SUBSTEPS
    """Δτ, raw time over which the policy's velocity is averaged; 0 takes it at the state itself."""
    gm_dropout: float = 0.1
    """Probability of dropping a mixture component from the policy that explores."""
    loss_scale: float = 30.0
    """Factor of the mean squared error."""
    substeps: int = SUBSTEPS
    """Substeps of rollouts per unit of raw time."""

    @property
    def segments(self) -> Segments:
        """The student's segments of raw time."""
        return Segments(self.nfe, self.final_step_scale)


def imitation_loss(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    generator: torch.Generator,
    settings: ImitationSettings,
) -> LossResult:
    """Data-dependent π-ID (Algorithm 2): one segment per sample, entered from noised data.

    The student's network is evaluated once, on the whole batch; the teacher once, without gradient.

    Args:
        student: from x_src (B, C, H, W) and σ_src (B,) to a policy.
        teacher: from x (S·B, C, H, W) and σ (S·B,) to velocities; sample b of state s is row s·B + b, so
            the conditioning is the batch's, repeated S times.
        x_0: clean latents, (B, C, H, W).
        generator: source of every draw. On the CPU (whatever the device of `x_0`) it spares the accelerator
            a wait.
        settings: segments, window, scale.
    """
    raw_t = draw_times(len(x_0), generator)
    raw_src, segment_size = settings.segments.containing(raw_t)
    sigma_src = settings.shift.warp(raw_src).to(x_0.device)
    x_src = torch.lerp(x_0, draw_noise(x_0, generator), sigma_src.view(-1, *[1] * (x_0.ndim - 1)))

    policy = student(x_src, sigma_src)
    per_sample = segment_errors(policy, teacher, x_src, raw_src, segment_size, generator, settings)
    per_sample = settings.loss_scale * per_sample
    return LossResult(per_sample.mean(), per_sample.detach(), raw_t)


def imitation_walk(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    generator: torch.Generator,
    settings: ImitationSettings,
) -> Iterator[LossResult]:
    """Data-free π-ID (Algorithm 3): the student walks from noise to data on its own rollouts.

    Yields one loss per segment, from noise to data, weighted by the segment's size so that they sum to the
    loss over all of raw time; each is to be differentiated before the next is asked for, so that one
    segment's graph is in memory at a time. States come from the student's own trajectory, as in sampling,
    instead of from noised data: no data is needed, and the student learns where it will be asked.

    Args:
        student: as in `imitation_loss`.
        teacher: as in `imitation_loss`.
        noise: x at τ = 1, (B, C, H, W).
        generator: source of dropout and visited times.
        settings: segments, window, scale.
    """
    x, batch = noise, len(noise)
    for upper, lower in pairwise(settings.segments.boundaries.float()):
        raw_src, segment_size = upper.expand(batch), (upper - lower).expand(batch)
        policy = student(x, settings.shift.warp(raw_src).to(x.device))
        per_sample = segment_errors(policy, teacher, x, raw_src, segment_size, generator, settings)
        per_sample = settings.loss_scale * per_sample
        with torch.no_grad():
            x, _ = rollout(
                policy.detach(), x, raw_src, lower.expand(batch), settings.shift, settings.substeps
            )
        yield LossResult(float(upper - lower) * per_sample.mean(), per_sample.detach(), raw_src)


def segment_errors(
    policy: Policy,
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_src: Tensor,
    raw_src: Tensor,
    segment_size: Tensor,
    generator: torch.Generator,
    settings: ImitationSettings,
) -> Tensor:
    """Mean squared error between policy and teacher at states that the policy itself visits, (B,).

    Args:
        policy: the student's, at the segments' sources.
        teacher: as in `imitation_loss`.
        x_src: states at the sources, (B, C, H, W).
        raw_src: raw times of the sources, (B,).
        segment_size: raw time from each source to its segment's end, (B,).
        generator: source of the dropout and of the visited times.
        settings: window, number of states, dropout.
    """
    explorer = policy.detach().with_dropout(settings.gm_dropout, generator)
    window = segment_size.clamp(max=settings.window)
    visited = _visited_times(raw_src, segment_size - window, settings.intermediate_states, generator)
    with torch.no_grad():
        states = _visit(explorer, x_src, raw_src, visited, settings)
        sigmas = settings.shift.warp(visited).flatten().to(x_src.device)
        targets = teacher(torch.cat(states), sigmas).float().chunk(len(states))

    errors = [
        (mean_velocity(policy, x_a, raw_a, raw_a - window, settings.shift, settings.substeps) - target)
        .square()
        .flatten(1)
        .mean(1)
        for x_a, raw_a, target in zip(states, visited, targets, strict=True)
    ]
    return torch.stack(errors).mean(0)


def _visited_times(raw_src: Tensor, room: Tensor, states: int, generator: torch.Generator) -> Tensor:
    """S raw times uniform in [τ_src − room, τ_src], in the order of a rollout, (S, B)."""
    draw = torch.rand(states, len(raw_src), generator=generator, device=generator.device)
    return raw_src - room * draw.sort(0).values.to(raw_src.device)


def _visit(
    policy: Policy, x: Tensor, raw: Tensor, visited: Tensor, settings: ImitationSettings
) -> list[Tensor]:
    """The policy's states at the visited times, S of (B, C, H, W)."""
    states = []
    for raw_a in visited:
        x, _ = rollout(policy, x, raw, raw_a, settings.shift, settings.substeps)
        raw = raw_a
        states.append(x)
    return states
