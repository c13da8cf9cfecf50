"""π-ID: on-policy imitation distillation of a flow teacher (METHOD.md section 4; arXiv 2510.14974)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.distill.result import LossResult, draw_noise, draw_times
from fewstep.flow import TEXT_TO_IMAGE_SHIFT, Segments, TimeShift
from fewstep.policies import SUBSTEPS, Policy, mean_velocity, rollout
from fewstep.policies.base import per_latent


@dataclass(frozen=True)
class ImitationSettings:
    """What π-ID trains for; the defaults are those of a text-to-image student with a guided teacher."""

    nfe: int = 4
    """Network evaluations of the student, one per segment."""
    more_nfes: tuple[int, ...] = ()
    """Further counts of evaluations that the same student learns."""
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
    def counts(self) -> tuple[int, ...]:
        """All counts of evaluations that the student learns."""
        return (self.nfe, *self.more_nfes)

    @property
    def segments(self) -> Segments:
        """The student's segments of raw time."""
        return Segments(self.nfe, self.final_step_scale)

    def at_step(self, step: int) -> ImitationSettings:
        """For one count alone, by turns over optimizer steps: all ranks walk through as many segments."""
        return replace(self, nfe=self.counts[step % len(self.counts)], more_nfes=())

    def draw_segments(self, raw_t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The segments that raw times (B,) fall in, for a count of evaluations drawn per sample.

        Returns:
            τ_src and the segment's size τ_src − τ_dst, (B,) float32 each.
        """
        if not self.more_nfes:
            return self.segments.containing(raw_t)
        found = [Segments(nfe, self.final_step_scale).containing(raw_t) for nfe in self.counts]
        drawn = torch.randint(len(found), (1, len(raw_t)), generator=generator, device=generator.device)
        drawn = drawn.to(raw_t.device)
        sources, sizes = (torch.stack(values).gather(0, drawn)[0] for values in zip(*found, strict=True))
        return sources, sizes


def teacher_ratio(step: int, mixing_steps: int) -> float:
    """Scheduled trajectory mixing: the teacher's share of the trajectories at optimizer step `step`, from 1 on.

    Falls linearly from 1 to 0 over `mixing_steps`; with 0 of them it is 0 throughout.
    """
    return max(0.0, 1 - (step - 1) / mixing_steps) if mixing_steps else 0.0


def imitation_loss(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    generator: torch.Generator,
    settings: ImitationSettings,
    ratio: float = 0.0,
) -> LossResult:
    """Data-dependent π-ID (Algorithm 2): one segment per sample, entered from noised data.

    The student's network is evaluated once, on the whole batch; the teacher once, without gradient (S times
    where its own steps are mixed in).

    Args:
        student: from x_src (B, C, H, W) and σ_src (B,) to a policy.
        teacher: from x (N·B, C, H, W) and σ (N·B,) to velocities, N being S, or 1 where `ratio` is not 0; sample b
            of state s is row s·B + b, so the conditioning is the batch's, repeated N times. Its σ lies where the
            generator draws, so that a guidance interval can be looked up without waiting for an accelerator.
        x_0: clean latents, (B, C, H, W).
        generator: source of every draw. On the CPU (whatever the device of `x_0`) it spares the accelerator
            a wait.
        settings: segments, window, scale.
        ratio: the teacher's share of the trajectories (see `teacher_ratio`).
    """
    raw_t = draw_times(len(x_0), generator)
    raw_src, segment_size = settings.draw_segments(raw_t, generator)
    sigma_src = settings.shift.warp(raw_src).to(x_0.device, non_blocking=True)
    x_src = torch.lerp(x_0, draw_noise(x_0, generator), sigma_src.view(-1, *[1] * (x_0.ndim - 1)))

    policy = student(x_src, sigma_src)
    per_sample = segment_errors(policy, teacher, x_src, raw_src, segment_size, generator, settings, ratio)
    per_sample = settings.loss_scale * per_sample
    return LossResult(per_sample.mean(), per_sample.detach(), raw_t)


def imitation_walk(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    generator: torch.Generator,
    settings: ImitationSettings,
    ratio: float = 0.0,
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
        settings: segments (of `nfe` alone), window, scale.
        ratio: the teacher's share of the trajectories within segments; from one to the next the student leads.
    """
    x, batch = noise, len(noise)
    for upper, lower in pairwise(settings.segments.boundaries.float()):
        raw_src, segment_size = upper.expand(batch), (upper - lower).expand(batch)
        policy = student(x, settings.shift.warp(raw_src).to(x.device, non_blocking=True))
        per_sample = segment_errors(policy, teacher, x, raw_src, segment_size, generator, settings, ratio)
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
    ratio: float = 0.0,
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
        ratio: share of the segments that the teacher's own steps take, in [0, 1]; the policy visits the rest.
    """
    explorer = policy.detach().with_dropout(settings.gm_dropout, generator)
    trajectory = (explorer, teacher, x_src, raw_src, segment_size, generator, settings)
    with torch.no_grad():
        visits = _follow_both(*trajectory, ratio) if ratio else _follow_policy(*trajectory)

    errors = [
        (mean_velocity(policy, x_a, raw_a, raw_a - window, settings.shift, settings.substeps) - target)
        .square()
        .flatten(1)
        .mean(1)
        for x_a, raw_a, window, target in visits
    ]
    return torch.stack(errors).mean(0)


class _Visit(NamedTuple):
    """A state at which the teacher was asked."""

    x: Tensor
    """(B, C, H, W)."""
    raw: Tensor
    """Its raw time, (B,)."""
    window: Tensor
    """Raw time over which the policy's mean velocity is to match, (B,)."""
    target: Tensor
    """The teacher's velocity, (B, C, H, W)."""


def _follow_policy(
    explorer: Policy,
    teacher: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    raw_src: Tensor,
    segment_size: Tensor,
    generator: torch.Generator,
    settings: ImitationSettings,
) -> list[_Visit]:
    """S states of the policy's own rollout; the teacher is asked at all of them at once."""
    window = segment_size.clamp(max=settings.window)
    visited = raw_src - (segment_size - window) * _sorted_uniform(
        settings.intermediate_states, raw_src, generator
    )
    states, raw = [], raw_src
    for raw_a in visited:
        x, _ = rollout(explorer, x, raw, raw_a, settings.shift, settings.substeps)
        raw = raw_a
        states.append(x)
    sigmas = settings.shift.warp(visited).flatten()
    targets = teacher(torch.cat(states), sigmas).float().chunk(len(states))
    return [_Visit(*visit) for visit in zip(states, visited, [window] * len(states), targets, strict=True)]


def _follow_both(
    explorer: Policy,
    teacher: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    raw_src: Tensor,
    segment_size: Tensor,
    generator: torch.Generator,
    settings: ImitationSettings,
    ratio: float,
) -> list[_Visit]:
    """Scheduled trajectory mixing (METHOD.md section 4): policy rollouts and S teacher steps by turns.

    The teacher's steps take `ratio` of the segment, cut at random; where each begins is drawn as the policy's visits
    are, in what they leave of the segment. A step is one Euler step of the teacher's velocity, which is the target
    of the policy's mean velocity over that same step. At ratio 1 the states are the teacher's own, at ratio 0 (steps
    of no length, with the micro window to compare over) those of `_follow_policy`.
    """
    count, window = settings.intermediate_states, segment_size.clamp(max=settings.window)
    rolled = (1 - ratio) * (segment_size - window) * _sorted_uniform(count, raw_src, generator)
    cuts = _sorted_uniform(count - 1, raw_src, generator)
    ends = ratio * segment_size * torch.cat([cuts, torch.ones_like(raw_src)[None]])
    steps = torch.cat([ends[:1], ends.diff(dim=0)])
    begins = raw_src - (rolled + ends - steps)

    visits, raw = [], raw_src
    for begin, step in zip(begins, steps, strict=True):
        x, _ = rollout(explorer, x, raw, begin, settings.shift, settings.substeps)
        raw = begin - step
        sigma, after = settings.shift.warp(begin), settings.shift.warp(raw)
        target = teacher(x, sigma).float()
        visits.append(_Visit(x, begin, torch.maximum(step, (1 - ratio) * window), target))
        x = torch.addcmul(x, per_latent((after - sigma).to(x.device, non_blocking=True), x), target)
    return visits


def _sorted_uniform(count: int, raw_src: Tensor, generator: torch.Generator) -> Tensor:
    """`count` draws from U(0, 1) per sample in rising order, the order of a rollout; (count, B)."""
    draw = torch.rand(count, len(raw_src), generator=generator, device=generator.device)
    return draw.sort(0).values.to(raw_src.device)
