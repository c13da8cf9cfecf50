"""Classifier-free guidance."""

from __future__ import annotations

import torch

from fewstep.flow import GuidanceInterval, guided_velocity

POS, NEG, X_0 = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0)).unbind(1)[:3]


def test_scale_one_is_the_conditional_velocity() -> None:
    assert torch.equal(guided_velocity(POS, NEG, 1.0), POS)
    assert torch.equal(guided_velocity(POS, NEG, 1.0, orthogonal=1.0), POS)


def test_scale_extrapolates_from_the_unconditional_velocity() -> None:
    torch.testing.assert_close(guided_velocity(POS, NEG, 3.0), NEG + 3 * (POS - NEG))


def test_scale_may_differ_per_sample() -> None:
    guided = guided_velocity(POS, NEG, torch.tensor([1.0, 2.0, 4.0]))
    for b, scale in enumerate((1.0, 2.0, 4.0)):
        torch.testing.assert_close(guided[b], guided_velocity(POS, NEG, scale)[b])


def test_orthogonal_guidance_adds_nothing_along_the_direction() -> None:
    added = guided_velocity(POS, NEG, 4.0, orthogonal=1.0, parallel_to=X_0) - POS
    along = (added * X_0).flatten(1).sum(1)
    torch.testing.assert_close(along, torch.zeros(3), atol=1e-4, rtol=0)
    assert added.abs().max() > 0.1


def test_orthogonal_guidance_is_gradual() -> None:
    none, half, full = (guided_velocity(POS, NEG, 4.0, o, X_0) for o in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + full) / 2)


def test_guidance_is_off_outside_its_interval() -> None:
    interval = GuidanceInterval(2.7, 0.1, 0.6)
    scales = interval.at(torch.tensor([0.05, 0.1, 0.3, 0.6, 0.61, 1.0]))
    torch.testing.assert_close(scales, torch.tensor([1.0, 2.7, 2.7, 2.7, 1.0, 1.0]))
