"""The objectives that π-ID is compared with, on a teacher whose trajectories are known in closed form.

Its data are Gaussian, so that the end of every trajectory is known, and a student that knows it has nothing to learn.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.distill import (
    ConsistencyConfig,
    DMD2Config,
    LossResult,
    MeanFlowConfig,
    RegressionConfig,
    consistency_loss,
    critic_loss,
    matching_loss,
    meanflow_loss,
    regression_loss,
    regression_walk,
    student_images,
)
from fewstep.flow import SamplerConfig
from fewstep.policies import DXPolicy

MEAN, STD = torch.linspace(-1, 1, 12).view(1, 3, 2, 2), 0.5
SAMPLER = SamplerConfig(nfe=2, final_step_scale=0.5, shift=2.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(batch: int) -> Tensor:
    return MEAN + STD * torch.randn(batch, 3, 2, 2, generator=seeded(1))


def spread(sigma: Tensor, std: float = STD) -> Tensor:
    """Standard deviation of noised data."""
    return (((1 - sigma) * std) ** 2 + sigma**2).sqrt()


def teacher_of(mean: Tensor, std: float = STD) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity of data N(mean, std²): E[ε | x] − E[x_0 | x]."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        t = sigma.view(-1, 1, 1, 1)
        deviation = (x - (1 - t) * mean) / spread(t, std) ** 2
        return t * deviation - mean - (1 - t) * std**2 * deviation

    return velocity


TEACHER = teacher_of(MEAN)


def trajectory(x: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """Where the teacher's trajectory through x is at another σ: deviations scale with their spread."""
    sigma, to = sigma.view(-1, 1, 1, 1), to.view(-1, 1, 1, 1)
    return (1 - to) * MEAN + (x - (1 - sigma) * MEAN) * spread(to) / spread(sigma)


class Student:
    """One image per evaluation, that of the teacher's trajectory at the segment's end, and an error to learn away."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = torch.full((1, 3, 2, 2), error, requires_grad=True)

    def __call__(self, x: Tensor, sigma: Tensor) -> DXPolicy:
        raw = SAMPLER.time_shift.unwarp(sigma)
        # Of a state at a segment's end the next one, as a network would take it.
        raw_src, size = SAMPLER.segments.containing(raw.clamp(min=1e-4))
        end = SAMPLER.time_shift.warp(raw_src - size)
        velocity = (trajectory(x, sigma, end) - x) / (end - sigma).view(-1, 1, 1, 1)
        return DXPolicy((velocity + self.error)[:, None], x, sigma)


def loss(name: str, student: Student, batch: int = 256, **settings: object) -> LossResult:
    """The loss of an objective."""
    step = 1000
    if name == "regression":
        config = RegressionConfig(loss_scale=1, **settings)
        return regression_loss(student, TEACHER, data(batch), seeded(), SAMPLER, config)
    if name == "meanflow":
        # DX with one point has one velocity for all ends: only whole segments.
        config = MeanFlowConfig(whole_segments=1, power=0, **settings)
        return meanflow_loss(student, TEACHER, data(batch), seeded(), SAMPLER, config, step)
    config = ConsistencyConfig(continuous=name == "continuous", huber=0, tangent_offset=1, **settings)
    return consistency_loss(student, TEACHER, data(batch), seeded(), SAMPLER, config, step)


LOSSES = {
    # Objective → settings, and the largest loss of a student that is right: the teacher's steps are finite.
    "regression": ({"steps": 64}, 1e-3),
    "consistency": ({"step": 0.005}, 2e-2),
    "continuous": ({}, 1e-4),
    "meanflow": ({}, 1e-4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_is_right_has_nothing_to_learn(name: str) -> None:
    settings, largest = LOSSES[name]
    assert loss(name, Student(), **settings).loss.item() < largest
    assert (
        loss(name, Student(0.5), **settings).loss.item() > 10 * loss(name, Student(), **settings).loss.item()
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("error", [0.3, -0.3])
def test_gradients_lead_to_the_right_student(name: str, error: float) -> None:
    student = Student(error)
    loss(name, student, **LOSSES[name][0]).loss.backward()
    assert student.error.grad is not None
    assert (student.error.grad.sign() == torch.tensor(error).sign()).all()


def test_heun_s_steps_are_more_exact_than_euler_s() -> None:
    def error(solver: str) -> float:
        return loss("regression", Student(), steps=4, solver=solver).loss.item()

    assert error("heun") < error("euler") / 20


def test_a_regression_walk_begins_where_the_student_arrived() -> None:
    student, noise = Student(), torch.randn(64, 3, 2, 2, generator=seeded())
    config = RegressionConfig(steps=64, loss_scale=1)
    results = list(regression_walk(student, TEACHER, noise, SAMPLER, config))
    assert [float(result.raw_t[0]) for result in results] == pytest.approx([1.0, 1 / 3], abs=1e-6)
    assert all(result.loss.item() < 1e-3 for result in results)
    # The end is data: MEAN, and STD around it.
    assert results[-1].state_rms is not None
    expected = (MEAN.square().mean() + STD**2).sqrt().item()
    assert results[-1].state_rms.mean().item() == pytest.approx(expected, rel=0.05)


def test_meanflow_compares_over_shorter_intervals_too() -> None:
    # A policy of one point can't have the mean velocity of all of them: the loss shows it.
    config = MeanFlowConfig(whole_segments=0, power=0)
    short = meanflow_loss(Student(), TEACHER, data(256), seeded(), SAMPLER, config, 1000)
    assert short.loss.item() > 10 * loss("meanflow", Student()).loss.item()


def test_a_weight_of_power_one_bounds_a_sample_s_loss() -> None:
    config = MeanFlowConfig(power=1, offset=1e-3)
    assert meanflow_loss(Student(3.0), TEACHER, data(64), seeded(), SAMPLER, config, 1).per_sample.max() <= 1


def test_dmd2_takes_each_of_the_sampler_s_evaluations_in_turn() -> None:
    config, noise = DMD2Config(critic_steps=1), torch.randn(512, 3, 2, 2, generator=seeded())
    assert [step for step in range(1, 7) if config.trains_student(step)] == [2, 4, 6]
    first, last = (student_images(Student(), noise, seeded(), SAMPLER, config, step) for step in (4, 2))
    # At the segment's end in the middle, the policy's image is its straight line's end; at the last it is data.
    assert last.std(0).mean().item() == pytest.approx(STD, rel=0.1)
    assert not torch.equal(first, last)
    finishing = DMD2Config(critic_steps=1, last_segment=True)
    for step in (2, 4):
        assert torch.equal(student_images(Student(), noise, seeded(), SAMPLER, finishing, step), last)


def test_dmd2_leaves_a_student_alone_whose_images_are_the_teacher_s() -> None:
    images = data(64).requires_grad_()
    matching_loss(images, TEACHER, TEACHER, seeded(), SAMPLER, DMD2Config()).loss.backward()
    assert images.grad is not None
    assert not images.grad.any()


def test_dmd2_moves_images_towards_the_teacher_s() -> None:
    images = (data(256) + 0.5).requires_grad_()
    fake = teacher_of(MEAN + 0.5)  # what a fake score learns of them
    matching_loss(images, TEACHER, fake, seeded(), SAMPLER, DMD2Config()).loss.backward()
    assert images.grad is not None
    assert (images.grad.mean(0) > 0).all(), "a step against the gradient lowers their mean"


def test_the_fake_score_learns_the_student_s_images() -> None:
    images = data(4096) + 0.5
    right, wrong = (
        critic_loss(images, teacher_of(mean), seeded(), SAMPLER, DMD2Config()).loss.item()
        for mean in (MEAN + 0.5, MEAN)
    )
    assert right < wrong
    images.requires_grad_()
    result = critic_loss(images, TEACHER, seeded(), SAMPLER, DMD2Config())
    assert not result.loss.requires_grad, "the student does not learn by it"
