"""π-ID: who is asked what, where, and who learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fewstep.distill import (
    ImitationConfig,
    flow_matching_loss,
    imitation_loss,
    imitation_walk,
    teacher_ratio,
)
from fewstep.distill.result import draw_times
from fewstep.flow import SamplerConfig, Segments, TimeShift
from fewstep.policies import GMFlowPolicy, mean_velocity, rollout


class Settings(NamedTuple):
    """What the losses take: the student's sampler, and what it is trained on."""

    sampler: SamplerConfig
    config: ImitationConfig

    @property
    def shift(self) -> TimeShift:
        return self.sampler.time_shift

    @property
    def segments(self) -> Segments:
        return self.sampler.segments


SETTINGS = Settings(SamplerConfig(nfe=2, final_step_scale=0.5, shift=3.2), ImitationConfig(loss_scale=1.0))


def changed(**values: Any) -> Settings:
    """SETTINGS with other values of some fields of either."""
    mine = {name: value for name, value in values.items() if name in SamplerConfig.model_fields}
    others = {name: value for name, value in values.items() if name not in mine}
    return Settings(
        SamplerConfig(**SETTINGS.sampler.model_dump() | mine),
        ImitationConfig(**SETTINGS.config.model_dump() | others),
    )


TARGET = torch.linspace(-1, 1, 2 * 2 * 3).view(1, 2, 2, 3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(batch: int = 6) -> Tensor:
    return torch.randn(batch, 2, 2, 3, generator=seeded(9))


def to_target(x: Tensor, sigma: Tensor) -> Tensor:
    """The teacher of a data set of one image."""
    return (x - TARGET) / sigma.view(-1, 1, 1, 1)


class Student:
    """Four components around the velocity that leads to `target`, which is what it learns."""

    def __init__(self, target: Tensor = TARGET, spread: float = 0.0) -> None:
        self.target = target.clone().requires_grad_()
        self.spread = spread * torch.tensor([-1.0, 1.0, -0.5, 0.5]).view(1, 4, 1, 1, 1)
        self.policies: list[GMFlowPolicy] = []

    def __call__(self, x_src: Tensor, sigma_src: Tensor) -> GMFlowPolicy:
        velocity = (x_src - self.target) / sigma_src.view(-1, 1, 1, 1)
        means = velocity.unsqueeze(1) + self.spread
        logstds = torch.full((len(x_src), 1, 1, 1, 1), -3.0)
        self.policies.append(
            GMFlowPolicy(means, logstds, torch.zeros_like(means[:, :, :1]), x_src, sigma_src)
        )
        return self.policies[-1]


class Teacher:
    """Records what it is asked."""

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor] = to_target) -> None:
        self.velocity = velocity
        self.asked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked.append((x, sigma))
        return self.velocity(x, sigma)


def certain(x_src: Tensor, sigma_src: Tensor) -> GMFlowPolicy:
    """The policy that is the one-image teacher: one component, no variance."""
    means = to_target(x_src, sigma_src).unsqueeze(1)
    logstds = torch.full((len(x_src), 1, 1, 1, 1), -12.0)
    return GMFlowPolicy(means, logstds, torch.zeros_like(means[:, :, :1]), x_src, sigma_src)


@pytest.mark.parametrize("window", [0, 3])
def test_a_policy_that_is_the_teacher_has_no_loss(window: int) -> None:
    result = imitation_loss(certain, to_target, data(), seeded(), *changed(window=window))
    assert result.loss.item() == pytest.approx(0.0, abs=1e-5)


def test_the_loss_is_the_scaled_mean_square_of_the_velocity_error() -> None:
    """A teacher that is 0.5 off everywhere."""

    def shifted(x: Tensor, sigma: Tensor) -> Tensor:
        return to_target(x, sigma) + 0.5

    result = imitation_loss(certain, shifted, data(), seeded(), *changed(loss_scale=30.0))
    torch.testing.assert_close(result.per_sample, torch.full((6,), 30 * 0.25), atol=2e-2, rtol=0)
    torch.testing.assert_close(result.loss, result.per_sample.mean())
    assert not result.per_sample.requires_grad


def test_gradient_reaches_the_student_alone_and_points_at_the_teacher() -> None:
    student = Student(TARGET + 0.2)
    teacher_weight = torch.ones((), requires_grad=True)
    result = imitation_loss(
        student, lambda x, s: teacher_weight * to_target(x, s), data(), seeded(), *SETTINGS
    )
    result.loss.backward()
    assert teacher_weight.grad is None
    assert (student.target.grad > 0).all()


def test_one_student_and_one_teacher_evaluation() -> None:
    student, teacher = Student(spread=0.3), Teacher()
    imitation_loss(student, teacher, data(), seeded(), *changed(intermediate_states=3))
    assert len(student.policies) == len(teacher.asked) == 1
    x, sigma = teacher.asked[0]
    assert x.shape == (3 * 6, 2, 2, 3)
    assert sigma.shape == (3 * 6,)


def test_the_teacher_is_asked_at_states_the_policy_visits() -> None:
    student, teacher = Student(spread=0.5), Teacher()
    settings = changed(gm_dropout=0.0, intermediate_states=2)
    result = imitation_loss(student, teacher, data(), seeded(), *settings)
    policy, raw_src = student.policies[0], settings.segments.containing(result.raw_t)[0]
    x, sigma = (part.chunk(2) for part in teacher.asked[0])
    with torch.no_grad():
        raw_a, raw_b = (settings.shift.unwarp(s) for s in sigma)
        first, _ = rollout(policy, policy.x_src, raw_src, raw_a, settings.shift)
        second, _ = rollout(policy, first, raw_a, raw_b, settings.shift)
    torch.testing.assert_close(x[0], first, atol=1e-4, rtol=0)
    torch.testing.assert_close(x[1], second, atol=1e-4, rtol=0)


def test_dropout_changes_where_the_student_explores_not_what_it_learns_from() -> None:
    visited = []
    for dropout in (0.0, 0.9):
        student, teacher = Student(spread=0.5), Teacher()
        imitation_loss(student, teacher, data(), seeded(), *changed(gm_dropout=dropout))
        visited.append(teacher.asked[0])
        assert student.policies[0].logweights.isfinite().all()
    assert torch.equal(visited[0][1], visited[1][1])
    assert not torch.allclose(visited[0][0], visited[1][0], atol=1e-2)


@pytest.mark.parametrize("window", [0, 3, 26, 115])
def test_visited_times_are_ordered_and_leave_room_for_the_window(window: int) -> None:
    teacher, settings = Teacher(), changed(window=window, intermediate_states=4)
    result = imitation_loss(Student(spread=0.3), teacher, data(64), seeded(), *settings)
    raw_a = settings.shift.unwarp(teacher.asked[0][1]).view(4, 64)
    raw_src, size = settings.segments.containing(result.raw_t)
    assert (raw_a[1:] <= raw_a[:-1]).all()
    assert (raw_a <= raw_src + 1e-6).all()
    assert (raw_a >= raw_src - size + size.clamp(max=window / 128) - 1e-5).all()
    assert result.loss.isfinite()


def test_the_student_enters_at_the_source_of_the_segment_of_the_drawn_time() -> None:
    student = Student()
    x_0 = data(512)
    result = imitation_loss(student, to_target, x_0, seeded(), *SETTINGS)
    raw_src, _ = SETTINGS.segments.containing(result.raw_t)
    policy = student.policies[0]
    torch.testing.assert_close(policy.sigma_src, SETTINGS.shift.warp(raw_src))
    sigma = policy.sigma_src.view(-1, 1, 1, 1)
    noise = (policy.x_src - (1 - sigma) * x_0) / sigma
    assert noise.mean().item() == pytest.approx(0.0, abs=0.05)
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)


def test_a_student_of_several_counts_enters_at_the_segments_of_each() -> None:
    several, entered = changed(nfe=2, more_nfes=(4, 8)), set()
    for seed in range(8):
        raw = torch.rand(64, generator=seeded(seed)).clamp(min=1e-3)
        sources, sizes = several.sampler.draw_segments(raw, seeded(100 + seed))
        assert ((sources >= raw - 1e-6) & (raw >= sources - sizes - 1e-6)).all(), (
            "its own time is in the segment"
        )
        entered |= {(round(float(s), 4), round(float(z), 4)) for s, z in zip(sources, sizes, strict=True)}
    alone = [Segments(nfe, SETTINGS.sampler.final_step_scale).boundaries for nfe in (2, 4, 8)]
    assert entered == {
        (round(float(b[i]), 4), round(float(b[i] - b[i + 1]), 4)) for b in alone for i in range(len(b) - 1)
    }


def test_a_student_of_several_counts_walks_each_by_turns() -> None:
    several = changed(nfe=2, more_nfes=(4, 8))
    walked = []
    for step in range(1, 7):
        one = several.sampler.at_optimizer_step(step)
        losses = list(imitation_walk(Student(), Teacher(), data(), seeded(step), one, several.config))
        walked.append(len(losses))
    assert sorted(walked) == [2, 2, 4, 4, 8, 8]
    assert walked[:3] == walked[3:]


def test_one_seed_one_result() -> None:
    settings = changed(gm_dropout=0.5)
    runs = [
        imitation_loss(Student(spread=0.5), lambda x, s: x, data(), seeded(seed), *settings)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0].per_sample, runs[1].per_sample)
    assert torch.equal(runs[0].raw_t, runs[1].raw_t)
    assert not torch.equal(runs[0].per_sample, runs[2].per_sample)


def test_a_walk_enters_every_segment_where_the_students_own_rollout_ends() -> None:
    student = Student(TARGET + 0.3, spread=0.5)
    settings = changed(nfe=4, gm_dropout=0.5)
    results = list(imitation_walk(student, Teacher(), data(), seeded(), *settings))
    ends = settings.segments.boundaries.float()
    torch.testing.assert_close(torch.stack([result.raw_t[0] for result in results]), ends[:-1])

    x = data()
    for policy, upper, lower in zip(student.policies, ends[:-1], ends[1:], strict=True):
        torch.testing.assert_close(policy.x_src, x)
        torch.testing.assert_close(policy.sigma_src, settings.shift.warp(upper).expand(6))
        with torch.no_grad():
            x, _ = rollout(policy.detach(), x, upper.expand(6), lower.expand(6), settings.shift)


def test_a_walk_weighs_each_segment_by_its_size() -> None:
    settings = changed(nfe=4, loss_scale=30.0)
    results = list(imitation_walk(certain, lambda x, s: to_target(x, s) + 0.5, data(), seeded(), *settings))
    sizes = -settings.segments.boundaries.diff()
    for result, size in zip(results, sizes, strict=True):
        torch.testing.assert_close(result.per_sample, torch.full((6,), 30 * 0.25), atol=2e-2, rtol=0)
        assert result.loss.item() == pytest.approx(size.item() * result.per_sample.mean().item())
    assert sum(result.loss.item() for result in results) == pytest.approx(30 * 0.25, abs=2e-2)


def test_a_walk_needs_one_segments_graph_at_a_time() -> None:
    student = Student(TARGET + 0.2)
    for result in imitation_walk(student, to_target, data(), seeded(), *SETTINGS):
        student.target.grad = None
        result.loss.backward()
        assert (student.target.grad > 0).all()
    assert not any(policy.x_src.requires_grad for policy in student.policies)


def test_the_teachers_share_falls_linearly_to_nothing() -> None:
    assert [teacher_ratio(step, 4) for step in range(1, 7)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert teacher_ratio(1, 0) == 0.0


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    """A closed-form teacher whose Euler steps show: its velocity changes along its own path."""
    return to_target(x, sigma) + x.sin() + sigma.view(-1, 1, 1, 1)


def mixed(ratio: float, *, states: int = 4, spread: float = 0.5) -> tuple[Student, Teacher, Tensor]:
    """One loss at that ratio: the student, what the teacher was asked, and the raw times that were drawn."""
    student, teacher = Student(spread=spread), Teacher(curved)
    settings = changed(intermediate_states=states, gm_dropout=0.0)
    result = imitation_loss(student, teacher, data(), seeded(), *settings, ratio)
    assert result.loss.isfinite()
    return student, teacher, result.raw_t


def test_at_ratio_1_the_states_are_the_teachers_own_euler_trajectory() -> None:
    student, teacher, raw_t = mixed(1.0)
    policy = student.policies[0]
    assert len(teacher.asked) == 4
    x, sigma = policy.x_src, policy.sigma_src
    torch.testing.assert_close(teacher.asked[0][1], sigma)
    for x_a, sigma_a in teacher.asked:
        x = x + (sigma_a - sigma).view(-1, 1, 1, 1) * curved(x, sigma)
        torch.testing.assert_close(x_a, x, atol=1e-4, rtol=1e-4)
        sigma = sigma_a
    raw_src, size = SETTINGS.segments.containing(raw_t)
    last = SETTINGS.shift.unwarp(teacher.asked[-1][1])
    assert (last > raw_src - size).all()


def test_a_vanishing_ratio_is_plain_imitation() -> None:
    _, plain, _ = mixed(0.0)
    _, vanishing, _ = mixed(1e-7)
    assert (len(plain.asked), len(vanishing.asked)) == (1, 4), "at ratio 0 the teacher is asked once for all"
    for part in (0, 1):
        torch.testing.assert_close(
            torch.cat([asked[part] for asked in vanishing.asked]), plain.asked[0][part], atol=1e-4, rtol=0
        )


def test_between_teacher_and_policy_both_lead() -> None:
    """Each state is reached from the one before by a teacher's step and then the policy's rollout."""
    student, teacher, raw_t = mixed(0.5, states=2)
    policy = student.policies[0]
    raw_src, size = SETTINGS.segments.containing(raw_t)
    (x_a, sigma_a), (x_b, sigma_b) = teacher.asked
    raw_a, raw_b = SETTINGS.shift.unwarp(sigma_a), SETTINGS.shift.unwarp(sigma_b)
    with torch.no_grad():
        first, _ = rollout(policy, policy.x_src, raw_src, raw_a, SETTINGS.shift)
    torch.testing.assert_close(x_a, first, atol=1e-4, rtol=0)
    with torch.no_grad():
        by_policy, _ = rollout(policy, x_a, raw_a, raw_b, SETTINGS.shift)
    by_teacher = x_a + (sigma_b - sigma_a).view(-1, 1, 1, 1) * curved(x_a, sigma_a)
    for alone in (by_policy, by_teacher):
        assert ((x_b - alone).flatten(1).abs().amax(1) > 1e-3).any()
    assert (raw_b >= raw_src - size).all()


def test_the_policys_mean_velocity_over_a_teachers_step_meets_its_velocity() -> None:
    """One step at ratio 1 is the whole segment."""
    student, settings = Student(spread=0.5), changed(intermediate_states=1)
    result = imitation_loss(student, curved, data(), seeded(), *settings, 1.0)
    policy, (raw_src, size) = student.policies[0], settings.segments.containing(result.raw_t)
    mean = mean_velocity(policy, policy.x_src, raw_src, raw_src - size, settings.shift)
    target = curved(policy.x_src, policy.sigma_src)
    torch.testing.assert_close(
        result.per_sample, (mean - target).square().flatten(1).mean(1), rtol=1e-4, atol=1e-5
    )
    result.loss.backward()
    assert student.target.grad.any()


def test_as_published_a_teachers_step_leaves_room_for_the_window_after_it() -> None:
    """One step at ratio 1 is the segment without the window; the policy is compared over both together."""
    student, settings = Student(spread=0.5), changed(intermediate_states=1, window=3, mixing_adds_window=True)
    teacher = Teacher()
    result = imitation_loss(student, teacher, data(), seeded(), *settings, 1.0)
    policy, (raw_src, size) = student.policies[0], settings.segments.containing(result.raw_t)
    mean = mean_velocity(policy, policy.x_src, raw_src, raw_src - size, settings.shift)
    target = to_target(policy.x_src, policy.sigma_src)
    torch.testing.assert_close(
        result.per_sample, (mean - target).square().flatten(1).mean(1), rtol=1e-3, atol=1e-4
    )
    # With further steps, all of them end a window before the segment does.
    student, settings = Student(spread=0.5), changed(intermediate_states=4, window=6, mixing_adds_window=True)
    teacher = Teacher()
    result = imitation_loss(student, teacher, data(), seeded(), *settings, 1.0)
    raw_src, size = settings.segments.containing(result.raw_t)
    last = settings.shift.unwarp(teacher.asked[-1][1])
    assert (last >= raw_src - size + 6 / 128 - 1e-4).all()


def test_as_published_a_walk_goes_on_where_the_exploring_policy_arrives() -> None:
    ends = changed(nfe=4).segments.boundaries.float()
    starts = {}
    for explored in (False, True):
        student = Student(TARGET + 0.3, spread=0.5)
        settings = changed(nfe=4, gm_dropout=0.5, explored_walk=explored)
        list(imitation_walk(student, Teacher(), data(), seeded(), *settings))
        starts[explored] = [policy.x_src for policy in student.policies]
        sources = torch.stack([policy.sigma_src[0] for policy in student.policies])
        torch.testing.assert_close(sources, settings.shift.warp(ends[:-1]))
    assert torch.equal(starts[True][0], starts[False][0])
    assert not torch.equal(starts[True][1], starts[False][1])
    # Without dropout, and without steps of the teacher's, the exploring policy is the student's own.
    alike = []
    for explored in (False, True):
        student = Student(TARGET + 0.3, spread=0.5)
        settings = changed(nfe=4, gm_dropout=0.0, explored_walk=explored)
        list(imitation_walk(student, Teacher(), data(), seeded(), *settings))
        alike.append(torch.stack([policy.x_src for policy in student.policies]))
    torch.testing.assert_close(*alike, atol=1e-3, rtol=1e-3)


def test_mixed_trajectories_are_a_function_of_the_seed() -> None:
    runs = [mixed(0.5)[1].asked for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_drawn_times_are_uniform_and_spread_over_the_batch() -> None:
    generator = seeded()
    draws = torch.stack([draw_times(8, generator) for _ in range(2000)])
    assert (draws > 0).all()
    assert (draws <= 1).all()
    assert (draws.sort(1).values * 8).ceil().sub(1).eq(torch.arange(8)).float().mean() > 0.999
    for sample in draws.unbind(1):
        histogram = torch.histc(sample, 5, 0, 1) / 2000
        torch.testing.assert_close(histogram, torch.full((5,), 0.2), atol=0.04, rtol=0)


def test_flow_matching_regresses_noise_minus_data() -> None:
    seen = {}

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.update(x_t=x_t, t=t)
        return torch.zeros_like(x_t)

    x_0, shift = data(), TimeShift(2.0)
    result = flow_matching_loss(network, x_0, seeded(), shift)
    torch.testing.assert_close(seen["t"], shift.warp(result.raw_t))
    t = seen["t"].view(-1, 1, 1, 1)
    u = (seen["x_t"] - x_0) / t  # x_t = x_0 + t·(ε − x_0)
    torch.testing.assert_close(result.per_sample, u.square().flatten(1).mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.loss, result.per_sample.mean())


def test_flow_matching_is_least_for_the_conditional_mean() -> None:
    """With one data point the best network is known, and its loss is zero."""
    x_0 = TARGET.expand(32, -1, -1, -1)
    best = flow_matching_loss(to_target, x_0, seeded())
    worse = flow_matching_loss(lambda x, t: to_target(x, t) + 0.1, x_0, seeded())
    assert best.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert worse.loss.item() == pytest.approx(0.01, abs=1e-4)
