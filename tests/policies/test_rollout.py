"""Rollouts, mean velocities and the policies' own promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.flow import TimeShift
from fewstep.policies import DXPolicy, GMFlowPolicy, mean_velocity, rollout
from fewstep.policies.base import KeptTables
from fewstep.policies.rollout import substep_count

SHIFT = TimeShift(3.2)
RAW_SRC = torch.tensor([1.0, 0.5, 0.25])


def gm_policy(
    seed: int = 0, components: int = 4, shape: tuple[int, ...] = (2, 3, 5), logstd: float = -1.5
) -> GMFlowPolicy:
    """A random policy at three source times; `shape` is (C, H, W) or (C, T, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    batch, (channels, *space) = len(RAW_SRC), shape
    return GMFlowPolicy(
        torch.randn(batch, components, channels, *space, generator=generator),
        torch.full((batch, 1, 1, *[1] * len(space)), logstd),
        torch.randn(batch, components, 1, *space, generator=generator).log_softmax(1),
        torch.randn(batch, *shape, generator=generator),
        SHIFT.warp(RAW_SRC),
    )


def dx_policy(mode: str = "grid", points: int = 4, segment_size: float = 0.25) -> DXPolicy:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(3, points, 2, 3, 5, generator=generator)
    x_src = torch.randn(3, 2, 3, 5, generator=generator)
    return DXPolicy(output, x_src, SHIFT.warp(RAW_SRC), segment_size, SHIFT, mode)


def clean(policy: GMFlowPolicy | DXPolicy, x: Tensor, sigma: Tensor) -> Tensor:
    """x̂_0 of a policy."""
    return x - sigma.view(-1, 1, 1, 1) * policy.velocity(x, sigma)


@given(st.integers(0, 10**6), st.floats(0.0, 0.9))
@settings(max_examples=20, deadline=None)
def test_velocity_is_the_published_formula(seed: int, remaining: float) -> None:
    """In float64, against METHOD.md section 3 written out without rearrangement."""
    policy = gm_policy(seed)
    x = torch.randn(policy.x_src.shape, generator=torch.Generator().manual_seed(seed + 1))
    sigma = SHIFT.warp(RAW_SRC * (0.05 + remaining))

    s = sigma.double().view(-1, 1, 1, 1)
    s_src = policy.sigma_src.double().view(-1, 1, 1, 1)
    x_src, x_t = policy.x_src.double(), x.double()
    mu = x_src[:, None] - s_src[:, None] * policy.means.double()
    v = ((2 * policy.logstds.double()).exp() * s_src[:, None] ** 2)[:, 0]
    zeta = ((1 - s) / s) ** 2 - ((1 - s_src) / s_src) ** 2
    nu = (1 - s) * x_t / s**2 - (1 - s_src) * x_src / s_src**2
    dots = (mu * (nu - 0.5 * zeta * mu.transpose(0, 1)).transpose(0, 1)).sum(2, keepdim=True)
    weights = (policy.logweights.double() + dots / (v * zeta + 1)[:, None]).softmax(1)
    x_0 = (weights * ((v * nu)[:, None] + mu) / (v * zeta + 1)[:, None]).sum(1)

    torch.testing.assert_close(policy.velocity(x, sigma).double(), (x_t - x_0) / s, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("components", [1, 8])
def test_at_the_source_the_velocity_is_the_weighted_mean(components: int) -> None:
    policy = gm_policy(components=components)
    expected = (policy.logweights.exp() * policy.means).sum(1)
    torch.testing.assert_close(policy.velocity(policy.x_src, policy.sigma_src), expected)


def test_one_certain_component_goes_straight_to_its_mean() -> None:
    policy = gm_policy(components=1, logstd=-8.0)
    x, sigma = rollout(policy, policy.x_src, RAW_SRC, torch.zeros(3), SHIFT)
    expected = policy.x_src - policy.sigma_src.view(-1, 1, 1, 1) * policy.means[:, 0]
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(sigma, torch.zeros(3), atol=1e-6, rtol=0)


@given(st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_components_have_no_order(order: list[int]) -> None:
    policy = gm_policy()
    permuted = GMFlowPolicy(
        policy.means[:, order], policy.logstds, policy.logweights[:, order], policy.x_src, policy.sigma_src
    )
    x, sigma = policy.x_src * 0.7, policy.sigma_src * 0.6
    torch.testing.assert_close(permuted.velocity(x, sigma), policy.velocity(x, sigma), atol=1e-5, rtol=1e-5)


def test_a_component_split_in_two_is_the_same_mixture() -> None:
    policy = gm_policy()
    split = GMFlowPolicy(
        policy.means.repeat_interleave(2, 1),
        policy.logstds,
        policy.logweights.repeat_interleave(2, 1),  # unnormalised on purpose
        policy.x_src,
        policy.sigma_src,
    )
    x, sigma = policy.x_src * 0.7, policy.sigma_src * 0.6
    torch.testing.assert_close(split.velocity(x, sigma), policy.velocity(x, sigma), atol=1e-5, rtol=1e-5)


def test_latent_locations_are_independent() -> None:
    policy = gm_policy()
    part = GMFlowPolicy(
        policy.means[..., 2:4],
        policy.logstds,
        policy.logweights[..., 2:4],
        policy.x_src[..., 2:4],
        policy.sigma_src,
    )
    whole, _ = rollout(policy, policy.x_src, RAW_SRC, RAW_SRC / 2, SHIFT)
    alone, _ = rollout(part, part.x_src, RAW_SRC, RAW_SRC / 2, SHIFT)
    torch.testing.assert_close(alone, whole[..., 2:4], atol=1e-5, rtol=0)


def test_video_latents_are_images_side_by_side() -> None:
    policy = gm_policy(shape=(2, 3, 4, 5))
    flat = GMFlowPolicy(
        policy.means.flatten(3, 4),
        policy.logstds.flatten(3, 4),
        policy.logweights.flatten(3, 4),
        policy.x_src.flatten(2, 3),
        policy.sigma_src,
    )
    video, _ = rollout(policy, policy.x_src, RAW_SRC, RAW_SRC / 2, SHIFT)
    image, _ = rollout(flat, flat.x_src, RAW_SRC, RAW_SRC / 2, SHIFT)
    assert video.shape == (3, 2, 3, 4, 5)
    torch.testing.assert_close(video.flatten(2, 3), image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", [gm_policy(), dx_policy(), dx_policy("polynomial")])
def test_sigma_is_per_sample_or_broadcastable(policy: GMFlowPolicy | DXPolicy) -> None:
    x, sigma = policy.x_src * 0.7, policy.sigma_src * 0.8
    expected = policy.velocity(x, sigma)
    assert torch.equal(policy.velocity(x, sigma.view(-1, 1, 1, 1)), expected)
    per_location = sigma.view(-1, 1, 1, 1).expand(-1, 1, 3, 5)
    torch.testing.assert_close(policy.velocity(x, per_location), expected)
    common = policy.velocity(x, torch.tensor(0.2))
    torch.testing.assert_close(common, policy.velocity(x, torch.full((3,), 0.2)))


@pytest.mark.parametrize(
    ("raw_from", "raw_to", "count"),
    [
        (1.0, 0.0, 128),
        (0.8, 0.8 - 3 / 128, 3),
        (0.5, 0.5, 1),
        (0.5, 0.499, 1),
        (1.0, 0.9, 13),
        (0.3, 0.1, 26),
    ],
)
def test_substeps_are_counted_in_raw_time(raw_from: float, raw_to: float, count: int) -> None:
    assert substep_count(np.float32([raw_from]), np.float32([raw_to])) == [count]


@given(st.floats(0.05, 1.0), st.integers(1, 100))
@settings(max_examples=50, deadline=None)
def test_float_rounding_adds_no_substep(raw_from: float, steps: int) -> None:
    start = np.float32([max(raw_from, steps / 128)])
    assert substep_count(start, start - np.float32(steps / 128)) == [steps]


@pytest.mark.parametrize("policy", [gm_policy(), dx_policy(segment_size=1.0)])
def test_a_sample_alone_and_in_a_batch_is_the_same_bit_for_bit(policy: GMFlowPolicy | DXPolicy) -> None:
    raw_to = torch.tensor([0.1, 0.45, 0.25])  # 116, 7 and 1 substeps
    together, sigma = rollout(policy, policy.x_src, RAW_SRC, raw_to, SHIFT)
    for b in range(3):
        x_src, sigma_src = policy.x_src[b : b + 1], policy.sigma_src[b : b + 1]
        if isinstance(policy, GMFlowPolicy):
            head = (policy.means, policy.logstds, policy.logweights)
            one = GMFlowPolicy(*(part[b : b + 1] for part in head), x_src, sigma_src)
        else:
            one = DXPolicy(policy.output[b : b + 1], x_src, sigma_src, 1.0, SHIFT)
        alone, sigma_alone = rollout(one, x_src, RAW_SRC[b : b + 1], raw_to[b : b + 1], SHIFT)
        assert torch.equal(alone[0], together[b])
        assert torch.equal(sigma_alone[0], sigma[b])


@pytest.mark.parametrize("policy", [gm_policy(), dx_policy("grid"), dx_policy("polynomial")])
def test_what_is_known_of_earlier_times_changes_no_rollout(policy: GMFlowPolicy | DXPolicy) -> None:
    ends = [rollout(policy, policy.x_src, RAW_SRC, RAW_SRC * share, SHIFT) for share in (0.5, 0.25)]
    expected = [(x.clone(), sigma.clone()) for x, sigma in ends]
    for x, sigma in ends:
        x.zero_(), sigma.zero_()  # what was returned is the caller's own
    for share, (x, sigma) in zip((0.5, 0.25), expected, strict=True):
        again = rollout(policy, policy.x_src, RAW_SRC, RAW_SRC * share, SHIFT)
        assert torch.equal(again[0], x)
        assert torch.equal(again[1], sigma)
    assert not torch.equal(expected[0][0], expected[1][0])


def test_a_shift_that_can_be_no_key_is_taken_as_any_other() -> None:
    class Unhashable(TimeShift):
        __hash__ = None

    ends = [
        rollout(gm_policy(), gm_policy().x_src, RAW_SRC, RAW_SRC / 2, shift)[0]
        for shift in (SHIFT, Unhashable(3.2))
    ]
    assert torch.equal(*ends)


def test_only_so_many_tables_are_kept() -> None:
    tables: KeptTables[int] = KeptTables()
    for key in range(3 * KeptTables.MOST):
        tables.keep(key, key)
        assert tables.get(key) == key
    assert sum(tables.get(key) is not None for key in range(3 * KeptTables.MOST)) <= KeptTables.MOST


def test_legs_that_share_their_substeps_are_one_rollout() -> None:
    policy, middle, end = gm_policy(), RAW_SRC - 16 / 128, RAW_SRC - 32 / 128
    whole, _ = rollout(policy, policy.x_src, RAW_SRC, end, SHIFT)
    first, _ = rollout(policy, policy.x_src, RAW_SRC, middle, SHIFT)
    second, _ = rollout(policy, first, middle, end, SHIFT)
    torch.testing.assert_close(second, whole, atol=2e-5, rtol=0)


def test_more_substeps_converge() -> None:
    policy = gm_policy()
    ends = [rollout(policy, policy.x_src, RAW_SRC, RAW_SRC / 2, SHIFT, n)[0] for n in (16, 64, 512)]
    assert (ends[1] - ends[2]).norm() < 0.5 * (ends[0] - ends[2]).norm()


@pytest.mark.parametrize("policy", [gm_policy(), dx_policy()])
@pytest.mark.parametrize("substeps_in_window", [0.0, 0.4, 1.0])
def test_short_windows_have_the_instantaneous_velocity(
    policy: GMFlowPolicy | DXPolicy, substeps_in_window: float
) -> None:
    mean = mean_velocity(policy, policy.x_src, RAW_SRC, RAW_SRC - substeps_in_window / 128, SHIFT)
    torch.testing.assert_close(mean, policy.velocity(policy.x_src, policy.sigma_src))


def test_mean_velocity_is_displacement_over_the_change_of_sigma() -> None:
    policy, raw_to = gm_policy(), RAW_SRC - torch.tensor([3.0, 8.0, 20.0]) / 128
    x, sigma = rollout(policy, policy.x_src, RAW_SRC, raw_to, SHIFT)
    expected = (x - policy.x_src) / (sigma - policy.sigma_src).view(-1, 1, 1, 1)
    mean = mean_velocity(policy, policy.x_src, RAW_SRC, raw_to, SHIFT)
    torch.testing.assert_close(mean, expected, atol=1e-4, rtol=0)


def test_windows_of_a_batch_may_differ() -> None:
    policy, raw_to = gm_policy(), RAW_SRC - torch.tensor([0.0, 1.0, 6.0]) / 128
    mean = mean_velocity(policy, policy.x_src, RAW_SRC, raw_to, SHIFT)
    instantaneous = policy.velocity(policy.x_src, policy.sigma_src)
    torch.testing.assert_close(mean[:2], instantaneous[:2])
    assert (mean[2] - instantaneous[2]).abs().max() > 1e-3


def test_gradients_of_the_mean_velocity_match_finite_differences() -> None:
    policy = gm_policy(components=3, shape=(2, 1, 2))
    head = [p.double().requires_grad_() for p in (policy.means, policy.logstds, policy.logweights)]
    raw, x_src, sigma_src = RAW_SRC.double(), policy.x_src.double(), policy.sigma_src.double()

    def mean(means: Tensor, logstds: Tensor, logweights: Tensor) -> Tensor:
        built = GMFlowPolicy(means, logstds, logweights, x_src, sigma_src)
        return mean_velocity(built, x_src * 0.9, raw * 0.8, raw * 0.8 - 3 / 128, SHIFT)

    assert torch.autograd.gradcheck(mean, head, atol=1e-5)


def test_gradients_stay_finite_down_to_the_data() -> None:
    policy = gm_policy()
    head = [p.clone().requires_grad_() for p in (policy.means, policy.logstds, policy.logweights)]
    built = GMFlowPolicy(*head, policy.x_src, policy.sigma_src)
    raw_a = torch.tensor([3.0, 5.0, 2.0]) / 128
    mean_velocity(built, policy.x_src, raw_a, torch.zeros(3), SHIFT).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in head)


def test_detach_cuts_the_head_off() -> None:
    policy = gm_policy()
    means = policy.means.requires_grad_()
    built = GMFlowPolicy(means, policy.logstds, policy.logweights, policy.x_src, policy.sigma_src)
    x, sigma = policy.x_src * 0.9, policy.sigma_src * 0.9
    assert built.velocity(x, sigma).requires_grad
    assert not built.detach().velocity(x, sigma).requires_grad
    assert torch.equal(built.detach().velocity(x, sigma), built.velocity(x, sigma))


def test_temperature_one_is_the_policy_itself() -> None:
    policy = gm_policy()
    x, sigma = policy.x_src * 0.9, policy.sigma_src * 0.7
    sharpened = policy.with_temperature(1.0).velocity(x, sigma)
    torch.testing.assert_close(sharpened, policy.velocity(x, sigma), atol=1e-5, rtol=1e-5)


def test_temperature_sharpens_weights_and_variance() -> None:
    policy = gm_policy()
    sharp = policy.with_temperature(0.25)
    expected = policy.logweights.exp() ** 4 / (policy.logweights.exp() ** 4).sum(1, keepdim=True)
    torch.testing.assert_close(sharp.logweights.exp(), expected)
    torch.testing.assert_close((2 * sharp.logstds).exp(), 0.25 * (2 * policy.logstds).exp())


def test_dropout_drops_whole_components_and_renormalises() -> None:
    policy, generator = gm_policy(components=16), torch.Generator().manual_seed(0)
    weights = policy.with_dropout(0.5, generator).logweights.exp()
    alive = (weights > 0).flatten(2)
    assert (alive.all(2) | ~alive.any(2)).all(), "a component is dropped at all locations or at none"
    assert 0 < alive.float().mean() < 1
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_keeps_at_least_one_component(p: float) -> None:
    policy, generator = gm_policy(), torch.Generator().manual_seed(0)
    alive = (policy.with_dropout(p, generator).logweights[:, :, 0, 0, 0] > -torch.inf).sum(1)
    assert alive.tolist() == [4 if p == 0 else 1] * 3


def test_dropout_rate_is_p_and_the_draw_is_the_generators() -> None:
    policy = gm_policy(components=2000, shape=(1, 1, 1))
    masks = [
        policy.with_dropout(0.1, torch.Generator().manual_seed(seed)).logweights == -torch.inf
        for seed in (0, 0, 1)
    ]
    assert masks[0].float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_dropped_component_has_no_influence() -> None:
    policy = gm_policy()
    dropped = policy.with_dropout(1.0, torch.Generator().manual_seed(0))
    survivor = dropped.logweights[:, :, 0, 0, 0].argmax(1)
    rows = torch.arange(3)
    alone = GMFlowPolicy(
        policy.means[rows, survivor].unsqueeze(1),
        policy.logstds,
        torch.zeros_like(policy.logweights[:, :1]),
        policy.x_src,
        policy.sigma_src,
    )
    x, sigma = policy.x_src * 0.9, policy.sigma_src * 0.7
    torch.testing.assert_close(dropped.velocity(x, sigma), alone.velocity(x, sigma), atol=1e-5, rtol=1e-5)


def test_dx_grid_passes_through_its_points_and_holds_the_last() -> None:
    policy = dx_policy(points=4, segment_size=0.2)
    points = policy.x_src[:, None] - policy.sigma_src.view(-1, 1, 1, 1, 1) * policy.output
    for raw_to, expected in [
        (RAW_SRC, points[:, 3]),
        (RAW_SRC - 0.1, (points[:, 1] + points[:, 2]) / 2),
        (RAW_SRC - 0.2, points[:, 0]),
        (RAW_SRC - 0.24, points[:, 0]),
    ]:
        x_0 = clean(policy, policy.x_src, SHIFT.warp(raw_to))
        torch.testing.assert_close(x_0, expected, atol=1e-4, rtol=0)


def test_dx_segment_stops_at_the_data() -> None:
    policy = dx_policy(points=2, segment_size=0.5)  # the third sample has 0.25 of raw time left
    points = policy.x_src[:, None] - policy.sigma_src.view(-1, 1, 1, 1, 1) * policy.output
    x_0 = clean(policy, policy.x_src, SHIFT.warp(torch.tensor([0.75, 0.25, 0.125])))
    torch.testing.assert_close(x_0, points.mean(1), atol=1e-4, rtol=0)


def test_dx_polynomial_is_a_power_series_in_elapsed_raw_time() -> None:
    policy = dx_policy("polynomial", points=3)
    terms = policy.x_src[:, None] - policy.sigma_src.view(-1, 1, 1, 1, 1) * policy.output
    x_0 = clean(policy, policy.x_src, SHIFT.warp(RAW_SRC - 0.125))
    expected = terms[:, 0] + terms[:, 1] / 8 + terms[:, 2] / 64
    torch.testing.assert_close(x_0, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
def test_dx_learns_through_its_output_alone(mode: str) -> None:
    policy = dx_policy(mode)
    output = policy.output.clone().requires_grad_()
    built = DXPolicy(output, policy.x_src, policy.sigma_src, 0.25, SHIFT, mode)
    mean_velocity(built, policy.x_src, RAW_SRC, RAW_SRC - 0.1, SHIFT).square().mean().backward()
    assert output.grad.isfinite().all()
    assert output.grad.any()
    assert built.with_temperature(0.3) is built
    assert built.with_dropout(0.5) is built
    assert not built.detach().output.requires_grad
