"""Sampling a student in few steps and a teacher in many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow import (
    NextStep,
    SamplerConfig,
    SamplerSchedule,
    TimeShift,
    auto_temperature,
    euler,
    euler_step,
    gaussian_noise,
    generate,
    generate_step,
)
from fewstep.policies import DXPolicy, GMFlowPolicy, rollout

SHIFT = TimeShift(3.2)
TARGET = torch.linspace(-1, 1, 2 * 3 * 3).view(1, 2, 3, 3)


def to_target(x: Tensor, sigma: Tensor) -> Tensor:
    """The teacher of a data set of one image: every velocity points at it."""
    return (x - TARGET) / sigma.view(-1, 1, 1, 1)


def student(x_src: Tensor, sigma_src: Tensor) -> GMFlowPolicy:
    """A K = 2 student that knows the target, and spreads its components around it."""
    velocity = to_target(x_src, sigma_src)
    means = torch.stack([velocity - 0.3, velocity + 0.3], 1)
    logstds = torch.full((len(x_src), 1, 1, 1, 1), -2.0)
    return GMFlowPolicy(means, logstds, torch.zeros_like(means[:, :, :1]), x_src, sigma_src)


def exact_student(x_src: Tensor, sigma_src: Tensor) -> DXPolicy:
    return DXPolicy(to_target(x_src, sigma_src).unsqueeze(1), x_src, sigma_src)


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("h", [0.0, 1.0, float("inf")])
@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_an_exact_student_lands_on_the_data(nfe: int, h: float) -> None:
    schedule = SamplerSchedule(nfe, SHIFT, final_step_scale=0.5, h=h)
    x = generate(exact_student, noise(), schedule, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(x, TARGET.expand(2, -1, -1, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("h", [0.0, 1.0, float("inf")])
def test_between_segments_the_noise_level_is_the_next_ones(h: float) -> None:
    """Seen by an exact student, x at σ_to is (1 − σ_to)·x_0 + σ_to·ε with ε of unit variance."""
    schedule, states = SamplerSchedule(4, SHIFT, 0.5, h), []
    x = torch.randn(64, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    generate(exact_student, x, schedule, generator=generator, on_step=lambda i, x, x_0: states.append(x))
    for sigma, state in zip(schedule.sigma_to[:-1], states, strict=False):
        eps = (state - (1 - sigma) * TARGET) / sigma
        assert eps.mean().item() == pytest.approx(0.0, abs=0.1)
        assert eps.std().item() == pytest.approx(1.0, abs=0.1)


def test_each_segment_starts_where_the_last_one_ended() -> None:
    for h in (0.0, 1.0, float("inf")):
        schedule = SamplerSchedule(8, SHIFT, 0.5, h)
        assert torch.equal(schedule.sigma_to[:-1], schedule.sigma_src[1:])
        assert (schedule.sigma_dst <= schedule.sigma_to + 1e-6).all()
        torch.testing.assert_close(SHIFT.warp(schedule.raw_dst), schedule.sigma_dst)
        torch.testing.assert_close(SHIFT.warp(schedule.raw_src), schedule.sigma_src)


def test_the_network_sees_the_schedules_sigmas_once_each() -> None:
    seen = []

    def recording(x_src: Tensor, sigma_src: Tensor) -> GMFlowPolicy:
        seen.append(sigma_src)
        return student(x_src, sigma_src)

    schedule = SamplerSchedule(4, SHIFT, 0.5)
    generate(recording, noise(), schedule)
    assert torch.equal(torch.stack(seen), schedule.sigma_src[:, None].expand(4, 2))


def test_a_sample_is_the_same_alone_and_in_a_batch() -> None:
    schedule = SamplerSchedule(4, SHIFT, 0.5, h=1.0)

    def request(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return generate(
            student, gaussian_noise((len(seeds), 2, 3, 3), generators), schedule, generator=generators
        )

    assert torch.equal(request([5, 6, 7])[1], request([6])[0])
    assert not torch.equal(request([5])[0], request([6])[0])


def test_without_renoise_no_randomness_is_used() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    generate(student, noise(), SamplerSchedule(4, SHIFT), generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_temperature_spares_the_last_step() -> None:
    one_step = SamplerSchedule(1, SHIFT)
    assert torch.equal(
        generate(student, noise(), one_step, temperature=0.3), generate(student, noise(), one_step)
    )
    two_steps, temperatures = SamplerSchedule(2, SHIFT), []

    def recording(x_src: Tensor, sigma_src: Tensor) -> GMFlowPolicy:
        policy = student(x_src, sigma_src)
        sharpen = policy.with_temperature
        policy.with_temperature = lambda t: (temperatures.append(t), sharpen(t))[1]
        return policy

    generate(recording, noise(), two_steps, temperature=0.3)
    assert [one.tolist() for one in temperatures] == [pytest.approx([0.3, 0.3]), [1.0, 1.0]]
    temperatures.clear()
    generate(recording, noise(), two_steps, temperature=0.3, final_temperature=0.5)
    assert [one[0].item() for one in temperatures] == [pytest.approx(0.3), 0.5]


def test_the_last_step_is_tempered_below_its_sigma_alone() -> None:
    x, schedule, below = noise(), SamplerSchedule(2, SHIFT, 0.5), 0.3
    [_, src], [_, dst] = (raw.float() for raw in (schedule.raw_src, schedule.raw_dst))
    assert below < schedule.sigma_src[1]
    between = SHIFT.unwarp(torch.tensor(below))
    middle, _ = generate_step(
        student, x, SamplerConfig(nfe=2, shift=3.2, final_step_scale=0.5).next_step(0, len(x)), SHIFT
    )
    policy = student(middle, schedule.sigma_src[1].expand(len(x)))
    plain, _ = rollout(policy, middle, src.expand(len(x)), between.expand(len(x)), SHIFT)
    tempered = policy.with_temperature(torch.full((len(x),), 0.5))
    expected, _ = rollout(tempered, plain, between.expand(len(x)), dst.expand(len(x)), SHIFT)
    drawn = generate(student, x, schedule, final_temperature=0.5, final_temperature_below=below)
    torch.testing.assert_close(drawn, expected)
    whole = generate(student, x, schedule, final_temperature=0.5)
    assert not torch.allclose(drawn, whole, atol=1e-3)
    above = generate(student, x, schedule, final_temperature=0.5, final_temperature_below=0.99)
    assert torch.equal(above, whole)


def test_a_batch_on_different_schedules_advances_each_sample_as_alone() -> None:
    x = noise(3)
    steps = [
        SamplerConfig(
            nfe=nfe,
            shift=3.2,
            final_step_scale=0.5,
            temperature=temperature,
            final_temperature=0.5,
            final_temperature_below=0.3,
        ).next_step(index)
        for nfe, index, temperature in ((3, 0, 0.3), (3, 2, 0.3), (8, 5, "auto"))
    ]
    together, clean = generate_step(student, x, NextStep.join(steps), SHIFT)
    for i, step in enumerate(steps):
        alone, alone_clean = generate_step(student, x[i : i + 1], step, SHIFT)
        torch.testing.assert_close(together[i : i + 1], alone)
        torch.testing.assert_close(clean()[i : i + 1], alone_clean())

    step, count = torch.tensor([0, 3, 6]), torch.tensor([7, 4, 20])
    together = euler_step(to_target, x, step, count, SHIFT)
    alone = [euler_step(to_target, x[i : i + 1], step[i : i + 1], int(count[i]), SHIFT) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_automatic_temperature_follows_the_steps() -> None:
    assert [auto_temperature(n) for n in (2, 4, 8, 11, 50)] == pytest.approx([0.1, 0.3, 0.7, 1.0, 1.0])
    four = SamplerSchedule(4, SHIFT)
    auto, explicit = (generate(student, noise(), four, temperature=t) for t in ("auto", 0.1 * 3))
    assert torch.equal(auto, explicit)
    generate(student, noise(), SamplerSchedule(1, SHIFT), temperature="auto")


def test_previews_approach_the_result() -> None:
    previews = []
    x = generate(
        student, noise(), SamplerSchedule(4, SHIFT), on_step=lambda i, x, x_0: previews.append((i, x_0))
    )
    assert [i for i, _ in previews] == [0, 1, 2, 3]
    torch.testing.assert_close(previews[-1][1], x, atol=1e-5, rtol=0)


def test_videos_are_sampled_too() -> None:
    def video_student(x_src: Tensor, sigma_src: Tensor) -> GMFlowPolicy:
        means = x_src.unsqueeze(1).repeat(1, 2, 1, 1, 1, 1)
        logstds = torch.full((len(x_src), *[1] * 5), -2.0)
        return GMFlowPolicy(means, logstds, torch.zeros_like(means[:, :, :1]), x_src, sigma_src)

    x = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    result = generate(video_student, x, SamplerSchedule(2, SHIFT, h=1.0), generator=torch.Generator())
    assert result.shape == x.shape
    assert result.isfinite().all()


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_follows_straight_lines_exactly(steps: int) -> None:
    x = euler(to_target, noise(), steps, SHIFT)
    torch.testing.assert_close(x, TARGET.expand(2, -1, -1, -1), atol=1e-5, rtol=0)


def test_euler_converges_on_a_curved_field() -> None:
    """dx/dσ = x has the solution x(0) = x(1)/e."""
    errors = [(euler(lambda x, _: x, noise(), n, SHIFT) - noise() / torch.e).norm() for n in (10, 20, 40)]
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


def test_euler_steps_are_uniform_in_raw_time() -> None:
    seen = []
    euler(lambda x, sigma: (seen.append(sigma), torch.zeros_like(x))[1], noise(), 4, SHIFT)
    expected = SHIFT.warp(torch.tensor([1.0, 0.75, 0.5, 0.25]))[:, None].expand(4, 2)
    torch.testing.assert_close(torch.stack(seen), expected)


def test_overrides_are_numbers_of_any_library() -> None:
    assert SamplerConfig().override(temperature=np.float32(0.5)).temperature == 0.5
    for wrong in (0, 1.5, float("nan"), "hot", [0.5]):
        with pytest.raises(UserError, match="temperature"):
            SamplerConfig().override(temperature=wrong)
    with pytest.raises(ValidationError, match="shift"):
        SamplerConfig(shift=float("inf"))
