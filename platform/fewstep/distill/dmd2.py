"""Distribution matching distillation (DMD2, Yin et al., arXiv 2405.14867), without its adversarial loss.

A second network, the fake score, learns the velocity of the student's images. Where it and the teacher differ at a
noised image of the student's, their difference is the direction in which that image becomes more likely to the teacher.
The fake score has to follow the student, so that it takes several optimizer steps for each of the student's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config import Config
from fewstep.distill.result import BatchGenerators, LossResult, draw_noise, draw_times, sample_rms
from fewstep.distill.starts import change, displacement
from fewstep.flow import SamplerConfig, generate_step
from fewstep.policies import Policy
from fewstep.policies.base import per_latent


class DMD2Config(Config):
    """Settings of distribution matching distillation. The student's segments are settings of `SamplerConfig`."""

    critic_steps: int = Field(5, ge=0)
    """Optimizer steps of the fake score for each of the student's."""
    least_t: float = Field(0.02, ge=0, lt=1)
    """Raw time from which images are noised."""
    most_t: float = Field(0.98, gt=0, le=1)
    """Raw time up to which images are noised."""
    last_segment: bool = False
    """Match the image that the whole sampler ends with alone, and not what each evaluation takes for it: for a short
    finish of a student that another objective has made."""
    loss_scale: float = Field(1.0, gt=0)
    """Factor on the student's loss."""

    def trains_student(self, step: int) -> bool:
        """Whether an optimizer step (from 1) is the student's, and not the fake score's."""
        return step % (self.critic_steps + 1) == 0


def student_images(
    student: Callable[[Tensor, Tensor], Policy],
    noise: Tensor,
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: DMD2Config,
    step: int,
) -> Tensor:
    """x̂_0 of one of the sampler's evaluations, (B, C, H, W), with gradient to that evaluation alone.

    States before it are the student's own, as when it samples. All samples take the same evaluation, which changes
    with the optimizer step, so that no rank waits for another.

    Args:
        student: from x_src (B, C, H, W) and σ_src (B,) to a policy.
        noise: x at σ = 1.
        generator: of what the sampler renews.
        sampler: segments, and how much noise is renewed between them.
        config: which evaluations are matched.
        step: optimizer step, from 1.
    """
    turn = step // (config.critic_steps + 1)
    chosen = sampler.nfe - 1 if config.last_segment else turn % sampler.nfe
    x = noise
    with torch.no_grad():
        for index in range(chosen):
            now = sampler.next_step(index, len(x))
            x, _ = generate_step(
                student, x, now, sampler.time_shift, substeps=sampler.substeps, generator=generator
            )
    now = sampler.next_step(chosen, len(x))
    policy = student(x, now.sigma_src.to(x.device, non_blocking=True))
    size = change(sampler, now.raw_src, now.raw_dst, x)
    arrived = x + size * displacement(policy, x, now.raw_src, now.raw_dst, sampler)
    sigma = sampler.time_shift.warp(now.raw_dst).to(x.device, non_blocking=True)
    if not float(now.raw_dst.max()):
        return arrived
    # What the policy takes for the image where its segment ends
    return arrived - per_latent(sigma, x) * policy.velocity(arrived, sigma)


def matching_loss(
    images: Tensor,
    teacher: Callable[[Tensor, Tensor], Tensor],
    critic: Callable[[Tensor, Tensor], Tensor],
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: DMD2Config,
) -> LossResult:
    """The student's loss, whose gradient at its images is the difference of the two networks' images (eq. 1 to 3).

    Args:
        images: (B, C, H, W), with gradient to the student.
        teacher, critic: from noised images and σ to velocities, (B, C, H, W).
        generator: source of noise and times.
        sampler: the student's shift, which noises alike.
        config: range of the times.
    """
    with torch.no_grad():
        noised = _noised(images, generator, sampler, config)
        real, fake = (noised.clean(network(noised.x, noised.times).float()) for network in (teacher, critic))
        # Differences of all times count alike: divided by how far the teacher is from the image.
        scale = (images - real).abs().flatten(1).mean(1).clamp(min=1e-4)
        direction = (fake - real) / per_latent(scale, images)
        target = images - direction
    per_sample = config.loss_scale * 0.5 * (images - target).square().flatten(1).mean(1)
    return LossResult(per_sample.mean(), per_sample.detach(), noised.raw, sample_rms(images))


def critic_loss(
    images: Tensor,
    critic: Callable[[Tensor, Tensor], Tensor],
    generator: BatchGenerators,
    sampler: SamplerConfig,
    config: DMD2Config,
) -> LossResult:
    """The fake score's loss: flow matching on the student's images; arguments as for `matching_loss`."""
    images = images.detach()
    noised = _noised(images, generator, sampler, config)
    error = critic(noised.x, noised.times).float() - (noised.noise - images)
    per_sample = error.square().flatten(1).mean(1)
    return LossResult(per_sample.mean(), per_sample.detach(), noised.raw, sample_rms(images))


class _Noised(NamedTuple):
    """Noised images."""

    x: Tensor
    """(B, C, H, W)."""
    noise: Tensor
    """(B, C, H, W)."""
    raw: Tensor
    """Their raw times, (B,)."""
    times: Tensor
    """Their σ, (B,), on the generator's device."""

    def clean(self, velocity: Tensor) -> Tensor:
        """x̂_0 of a velocity at them."""
        return self.x - per_latent(self.times.to(self.x.device, non_blocking=True), self.x) * velocity


def _noised(
    images: Tensor, generator: BatchGenerators, sampler: SamplerConfig, config: DMD2Config
) -> _Noised:
    raw = config.least_t + draw_times(len(images), generator) * (config.most_t - config.least_t)
    times, noise = sampler.time_shift.warp(raw), draw_noise(images, generator)
    sigma = per_latent(times.to(images.device, non_blocking=True), images)
    return _Noised(images.lerp(noise, sigma), noise, raw, times)
