"""A guidance interval saves the passes outside of it, and changes nothing else."""

from __future__ import annotations

import pytest
import torch

from fewstep.flow import guided_velocity
from fewstep.models.conditioning import TextConditioning
from fewstep.models.guided_teacher import GuidedTeacher


class CountedNetwork:
    """A velocity that depends on state, time and condition; remembers how many samples it was asked for."""

    def __init__(self) -> None:
        self.samples = 0

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditioning: TextConditioning) -> torch.Tensor:
        self.samples += len(x)
        return x * t.view(-1, 1, 1, 1) + conditioning.states.mean((1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize(("high", "inside"), [(1.0, 4), (0.6, 2), (0.05, 0)])
def test_samples_outside_of_the_interval_cost_one_pass(high: float, inside: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 2, 4, 4, generator=generator), torch.tensor([0.9, 0.2, 0.7, 0.5])
    states = torch.randn(4, 3, 5, generator=generator)
    conditioning = TextConditioning(states, torch.ones(4, 3, dtype=torch.bool))
    null = TextConditioning(torch.zeros(1, 2, 5), torch.ones(1, 2, dtype=torch.bool))
    network = CountedNetwork()
    velocity = GuidedTeacher(network, null, 3.0, (0.0, high)).velocity(x, t, conditioning)
    assert network.samples == 4 + inside

    positive = network.velocity(x, t, conditioning)
    negative = network.velocity(x, t, null.expand(4))
    scale = torch.where(t <= high, 3.0, 1.0)
    torch.testing.assert_close(velocity, guided_velocity(positive, negative, scale))


def test_orthogonal_guidance_leaves_the_predicted_image_as_large_as_it_was() -> None:
    """What it adds to the velocity has no part along x̂_0 (METHOD.md section 4)."""
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.8, 0.3])

    class Network:
        def velocity(self, x, t, conditioning):
            return torch.sin(3 * x) + conditioning.states.mean((1, 2))[:, None, None, None]

    null, text = (
        TextConditioning.collate([torch.full((2, 4), value)] * n) for value, n in ((0.0, 1), (0.7, 2))
    )
    plain = Network().velocity(x, t, text)
    added = GuidedTeacher(Network(), null, scale=4.0, orthogonal=1.0).velocity(x, t, text) - plain
    clean = x - t[:, None, None, None] * plain
    along = (added * clean).sum((1, 2, 3)) / (added.norm() * clean.norm())
    assert added.norm() > 0.1
    torch.testing.assert_close(along, torch.zeros(2), atol=1e-6, rtol=0)
