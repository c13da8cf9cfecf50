"""Classifier-free guidance."""

from __future__ import annotations

import torch

from fewstep.flow import GuidanceInterval, guided_velocity, renormalised

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


U, V = torch.randn(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(1)).unbind()


def packed(u: torch.Tensor) -> torch.Tensor:
    """(1, C, H, W) → tokens (tokens, C·4) of 2×2 patches."""
    return torch.nn.functional.unfold(u, 2, stride=2)[0].mT


def test_every_token_gets_the_norm_of_the_conditional_one() -> None:
    guided = guided_velocity(U, V, 4.0)
    scaled = renormalised(guided, U, "token", patch=2)
    torch.testing.assert_close(packed(scaled).norm(dim=1), packed(U).norm(dim=1))
    # Only lengths change.
    cosine = torch.nn.functional.cosine_similarity(packed(scaled), packed(guided))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_a_cap_leaves_smaller_tokens_as_they_are() -> None:
    guided = torch.cat([3 * U[..., :2], 0.5 * U[..., 2:]], dim=-1)
    scaled = renormalised(guided, U, "token_cap", patch=2)
    torch.testing.assert_close(scaled[..., :2], U[..., :2])
    assert torch.equal(scaled[..., 2:], guided[..., 2:])


def test_a_samples_norm_is_capped_as_a_whole() -> None:
    guided = torch.cat([3 * U, 0.5 * U])
    scaled = renormalised(guided, torch.cat([U, U]), "sample_cap")
    torch.testing.assert_close(scaled, torch.cat([U, 0.5 * U]))


def test_no_guidance_is_not_renormalised_and_zeros_stay_zeros() -> None:
    for how in ("none", "token", "token_cap", "sample_cap"):
        assert torch.equal(renormalised(U, U, how, patch=2), U)
        zero = torch.zeros_like(U)
        assert torch.equal(renormalised(zero, zero, how, patch=2), zero)
