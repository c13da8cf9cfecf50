"""π-ID: on-policy imitation distillation of a flow teacher (METHOD.md section 4; arXiv 2510.14974)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config import Config
from fewstep.distill.result import BatchGenerators, LossResult, draw_noise, draw_times, sample_rms
from fewstep.draws import uniform
from fewstep.flow import SamplerConfig
from fewstep.policies import Policy, mean_velocity, rollout
from fewstep.policies.base import per_latent


class ImitationConfig(Config):
    """Settings of π-ID (METHOD.md section 4); the defaults suit a text-to-image student with a guided teacher.

    The student's segments are settings of `SamplerConfig`.
    """

    data_free: bool = False
    """Follow the student's own trajectories from noise (Algorithm 3; captions suffice) instead of starting segments
    from noised data (Algorithm 2). One sample of a batch then is one whole trajectory: nfe segments instead of one."""
    intermediate_states: int = Field(2, ge=1)
    """S, the number of visited states per segment at which the teacher's velocity is imitated."""
    window: int = Field(3, ge=0)
    """Micro window Δτ in substeps, over which the policy's velocity is averaged; below 2 the instantaneous velocity is
    used."""
    gm_dropout: float = Field(0.1, ge=0, lt=1)
    """GM dropout: probability of dropping a mixture component from the behaviour policy, which visits the states."""
    loss_scale: float = Field(30.0, gt=0)
    """Factor on the mean squared error."""
    mixing_steps: int = Field(0, ge=0)
    """Scheduled trajectory mixing, for guidance-distilled teachers: optimizer steps over which the share of a segment
    that the teacher's own steps take falls from all to none; 0 uses the student's rollouts alone from the start."""
    mixing_adds_window: bool = False
    """Scheduled trajectory mixing as in the published configurations: the teacher's steps share what the micro window
    leaves of the segment, and the policy's velocity is averaged over a step and the window after it."""
    explored_walk: bool = False
    """data_free as in the published configurations: the next segment starts where the behaviour policy, with dropout
    and after the teacher's steps, arrives, instead of where the student's own rollout does."""


def teacher_ratio(step: int, mixing_steps: int) -> float:
    """Scheduled trajectory mixing (METHOD.md section 4): the teacher's share of the trajectories.

    Args:
        step: optimizer step, from 1.
        mixing_steps: steps over which the share falls linearly from 1 to 0; with 0 it is always 0.
    """
    return max(0.0, 1 - (step - 1) / mixing_steps) if mixing_steps else 0.0


def imitation_loss(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: ImitationConfig,
    ratio: float = 0.0,
) -> LossResult:
    """Data-dependent π-ID (Algorithm 2): one segment per sample, which starts from noised data.

    The student's network is evaluated once, on the whole batch. The teacher's is evaluated once, on all visited states
    together, without gradient; S times where its own steps are mixed in.

    Args:
        student: from x_src (B, C, H, W) and σ_src (B,) to a policy.
        teacher: from x (N·B, C, H, W) and σ (N·B,) to velocities. N is S, or 1 where `ratio` is not 0; sample b
            of state s is row s·B + b, so its conditioning is the batch's, repeated N times. σ is on the generator's
            device, so that a guidance interval can be applied without waiting for an accelerator.
        x_0: clean latents, (B, C, H, W).
        generator: source of all random numbers. Better on the CPU, whatever the device of `x_0`: times and numbers of
            substeps are then known without waiting for an accelerator.
        sampler: the student's segments, with a shift that is a number.
        config: window, number of states, loss scale.
        ratio: the teacher's share of the trajectories (see `teacher_ratio`).
    """
    raw_t = draw_times(len(x_0), generator)
    # The network sees the source of the segment that τ falls in: with segments chosen by τ, a segment's share of the
    # training is its size.
    raw_src, segment_size = sampler.draw_segments(raw_t, generator)
    sigma_src = sampler.time_shift.warp(raw_src).to(x_0.device, non_blocking=True)
    # x_src = (1 − σ)·x_0 + σ·ε
    x_src = torch.lerp(x_0, draw_noise(x_0, generator), sigma_src.view(-1, *[1] * (x_0.ndim - 1)))

    policy = student(x_src, sigma_src)
    per_sample, last = segment_errors(
        policy, teacher, x_src, raw_src, segment_size, generator, sampler, config, ratio
    )
    per_sample = config.loss_scale * per_sample
    return LossResult(per_sample.mean(), per_sample.detach(), raw_t, sample_rms(last.x))


def imitation_walk(
    student: Callable[[Tensor, Tensor], Policy],
    teacher: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: ImitationConfig,
    ratio: float = 0.0,
) -> Iterator[LossResult]:
    """Data-free π-ID (Algorithm 3): the student follows its own rollouts from noise to data.

    Yields one loss per segment, from noise to data, weighted by the segment's size so that they sum to the loss over
    all of raw time. Call backward on each before taking the next, so that the graph of only one segment is in memory.
    States come from the student's own trajectory, as in sampling, instead of from noised data: no data is needed,
    and the student is trained on the states that it will meet.

    Args:
        student: as in `imitation_loss`.
        teacher: as in `imitation_loss`.
        noise: x at τ = 1, (B, C, H, W).
        generator: source of dropout and visited times.
        sampler: the student's segments, for one number of evaluations (no `more_nfes`), with a shift that is a number.
        config: window, number of states, loss scale.
        ratio: the teacher's share of the trajectories within segments; the next segment starts where the student's
            own rollout ends (but see `explored_walk`).
    """
    x, batch, shift = noise, len(noise), sampler.time_shift
    for upper, lower in pairwise(sampler.segments.boundaries.float()):
        raw_src, segment_size = upper.expand(batch), (upper - lower).expand(batch)
        policy = student(x, shift.warp(raw_src).to(x.device, non_blocking=True))
        per_sample, explored = segment_errors(
            policy, teacher, x, raw_src, segment_size, generator, sampler, config, ratio
        )
        per_sample = config.loss_scale * per_sample
        # The next segment's start is an input to it, as data would be: no gradient flows back into this segment.
        # Without dropout, because this is the trajectory that sampling takes.
        own = _Explored(policy.detach(), x, raw_src)
        walker = explored if config.explored_walk else own
        with torch.no_grad():
            x, _ = rollout(walker.policy, walker.x, walker.raw, lower.expand(batch), shift, sampler.substeps)
        weighted = float(upper - lower) * per_sample.mean()
        yield LossResult(weighted, per_sample.detach(), raw_src, sample_rms(x))


def segment_errors(
    policy: Policy,
    teacher: Callable[[Tensor, Tensor], Tensor],
    x_src: Tensor,
    raw_src: Tensor,
    segment_size: Tensor,
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: ImitationConfig,
    ratio: float = 0.0,
) -> tuple[Tensor, _Explored]:
    """Mean squared error between policy and teacher at states that the policy itself visits.

    Args:
        policy: the student's, at the segments' sources.
        teacher: as in `imitation_loss`.
        x_src: states at the sources, (B, C, H, W).
        raw_src: raw times of the sources, (B,).
        segment_size: raw time from each source to its segment's end, (B,).
        generator: source of the dropout and of the visited times.
        sampler: shift and substeps of the student.
        config: window, number of states, dropout.
        ratio: share of each segment that the teacher's own steps take, in [0, 1]; the policy's rollouts take the rest.

    Returns:
        The errors, (B,), and the last visited state.
    """
    # The behaviour policy visits the states. It has no gradient: the student is to lower its loss by imitating better,
    # not by visiting states that are easier. Dropout makes it visit states that the whole mixture would rarely reach.
    behaviour = policy.detach().with_dropout(config.gm_dropout, generator)
    trajectory = (behaviour, teacher, x_src, raw_src, segment_size, generator, sampler, config)
    with torch.no_grad():  # rollouts and teacher; the policy's own velocity below is all that has a gradient
        visits, last = _follow_both(*trajectory, ratio) if ratio else _follow_policy(*trajectory)

    shift, substeps = sampler.time_shift, sampler.substeps
    # The whole policy against the target, without the dropout of the behaviour policy that visited the state.
    errors = [
        (mean_velocity(policy, x_a, raw_a, raw_a - window, shift, substeps) - target)
        .square()
        .flatten(1)
        .mean(1)
        for x_a, raw_a, window, target in visits
    ]
    return torch.stack(errors).mean(0), last


class _Explored(NamedTuple):
    """Where a trajectory has arrived."""

    policy: Policy
    """The policy that it follows."""
    x: Tensor
    """(B, C, H, W)."""
    raw: Tensor
    """Its raw time, (B,)."""


class _Visit(NamedTuple):
    """A state at which the teacher's velocity was computed, for the policy to imitate."""

    x: Tensor
    """(B, C, H, W)."""
    raw: Tensor
    """Its raw time, (B,)."""
    window: Tensor
    """Raw time from there on over which the policy's mean velocity is compared, (B,)."""
    target: Tensor
    """The teacher's velocity, (B, C, H, W)."""


def _follow_policy(
    behaviour: Policy,
    teacher: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    raw_src: Tensor,
    segment_size: Tensor,
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: ImitationConfig,
) -> tuple[list[_Visit], _Explored]:
    """S states of the policy's own rollout, with the teacher's velocity at each; see `segment_errors`."""
    shift = sampler.time_shift
    # A segment shorter than the window has it shortened: then the policy is compared over the whole segment.
    # Times are drawn from the segment less the window, so that the window never extends beyond the segment's end.
    window = segment_size.clamp(max=config.window / sampler.substeps)
    # (S, B), falling: the first visited state is the one nearest to the source.
    visited = raw_src - (segment_size - window) * _sorted_uniform(
        config.intermediate_states, raw_src, generator
    )
    states, raw = [], raw_src
    for raw_a in visited:
        # From one visited state to the next, so that no part of the segment is integrated twice.
        x, _ = rollout(behaviour, x, raw, raw_a, shift, sampler.substeps)
        raw = raw_a
        states.append(x)
    sigmas = shift.warp(visited).flatten()  # (S, B) → (S·B,), state by state as `cat` below
    # One call for all S states: the teacher's evaluations take most of a step's time, and large batches are cheaper.
    targets = teacher(torch.cat(states), sigmas).float().chunk(len(states))
    visits = [_Visit(*visit) for visit in zip(states, visited, [window] * len(states), targets, strict=True)]
    return visits, _Explored(behaviour, x, raw)


def _follow_both(
    behaviour: Policy,
    teacher: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    raw_src: Tensor,
    segment_size: Tensor,
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: ImitationConfig,
    ratio: float,
) -> tuple[list[_Visit], _Explored]:
    """Scheduled trajectory mixing (METHOD.md section 4): policy rollouts and S teacher steps alternate.

    The teacher's steps together take `ratio` of the segment and have random lengths. The ends of the rollouts before
    them are drawn as in `_follow_policy`, from what the steps leave of the segment. A teacher's step is one Euler step
    of its velocity, and that velocity is the target of the policy's mean velocity over the same step. At ratio 1 all
    states are the teacher's own. At ratio 0, steps have no length, velocities are compared over the micro window, and
    states are those of `_follow_policy`.
    """
    shift = sampler.time_shift
    count, window = config.intermediate_states, segment_size.clamp(max=config.window / sampler.substeps)
    # (S, B) each: raw time that rollouts have covered before each step, and ends of the teacher's steps if joined
    rolled = (1 - ratio) * (segment_size - window) * _sorted_uniform(count, raw_src, generator)
    # S − 1 cuts, and the end of the last step
    cuts = _sorted_uniform(count - 1, raw_src, generator)
    shared = segment_size - window if config.mixing_adds_window else segment_size
    ends = ratio * shared * torch.cat([cuts, torch.ones_like(raw_src)[None]])
    # Lengths of the steps, and the raw times at which they begin: after the rollouts and the steps before them
    steps = torch.cat([ends[:1], ends.diff(dim=0)])
    begins = raw_src - (rolled + ends - steps)

    visits, raw = [], raw_src
    for begin, step in zip(begins, steps, strict=True):
        x, _ = rollout(behaviour, x, raw, begin, shift, sampler.substeps)
        raw = begin - step
        sigma, after = shift.warp(begin), shift.warp(raw)  # at the step's start and end, (B,)
        # One call per state: each depends on the teacher's step before it.
        target = teacher(x, sigma).float()
        # As the teacher's steps shorten, the micro window takes over: at ratio 0 it is all there is to compare over.
        span = step + window if config.mixing_adds_window else torch.maximum(step, (1 - ratio) * window)
        visits.append(_Visit(x, begin, span, target))
        # The Euler step moves the state itself: the next rollout of the behaviour policy starts at its end.
        x = torch.addcmul(x, per_latent((after - sigma).to(x.device, non_blocking=True), x), target)
    return visits, _Explored(behaviour, x, raw)


def _sorted_uniform(count: int, raw_src: Tensor, generator: BatchGenerators) -> Tensor:
    """`count` numbers from U(0, 1) per sample, in rising order, in which a rollout visits them; (count, B)."""
    return uniform((len(raw_src), count), generator, raw_src.device).sort(1).values.T
