"""π-ID without a network: free policy parameters learn a teacher's whole trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewstep.distill import ImitationConfig, segment_errors
from fewstep.flow import SamplerConfig
from fewstep.policies import GMFlowPolicy, rollout

Velocity = Callable[[Tensor, Tensor], Tensor]

MODES, MODE_STD, LOCATIONS, SUBSTEPS, STEPS = 8, 0.1, 48, 32, 500
ONE = torch.ones(1)
SAMPLER = SamplerConfig(nfe=1, final_step_scale=1.0, shift=1.0, substeps=SUBSTEPS)
CONFIG = ImitationConfig(intermediate_states=4, window=0, gm_dropout=0.0, loss_scale=1.0)


def mixture_teacher(modes: Tensor) -> Velocity:
    """The exact velocity of data drawn from narrow Gaussians at `modes`, (M, 2)."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        state, s = x.movedim(1, -1).unsqueeze(-2), sigma.view(-1, 1, 1, 1, 1)  # (B, H, W, 1, 2)
        alpha = 1 - s
        variance = (alpha * MODE_STD).square() + s.square()
        offset = state - alpha * modes
        weights = (-offset.square().sum(-1, keepdim=True) / (2 * variance)).softmax(-2)
        x_0 = (weights * (modes + alpha * MODE_STD**2 / variance * offset)).sum(-2)
        return (x - x_0.movedim(-1, 1)) / sigma.view(-1, 1, 1, 1)

    return velocity


def teacher_trajectory(teacher: Velocity, noise: Tensor) -> list[Tensor]:
    states = [noise]
    for sigma, after in pairwise(torch.linspace(1, 0, SUBSTEPS + 1)):
        states.append(states[-1] + (after - sigma) * teacher(states[-1], sigma.view(1)))
    return states


def trajectory_error(policy: GMFlowPolicy, trajectory: list[Tensor]) -> float:
    """Distance to the teacher's state: root mean square over the substeps, mean over the trajectories."""
    x, raw, errors = trajectory[0], ONE, []
    for i, expected in enumerate(trajectory[1:], 1):
        raw_to = ONE * (1 - i / SUBSTEPS)
        x, _ = rollout(policy, x, raw, raw_to, SAMPLER.time_shift, SUBSTEPS)
        raw = raw_to
        errors.append((x - expected).square().sum(1))
    return torch.stack(errors).mean(0).sqrt().mean().item()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more threads, and lose a lot on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def learned_errors(one_thread: None) -> dict[int, float]:
    """The trajectory error after π-ID for K components, one policy over all of time from fixed noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(MODES, 2, generator=generator))
    teacher = mixture_teacher(directions * (0.5 + torch.rand(MODES, 1, generator=generator)))
    noise = torch.randn(1, 2, 1, LOCATIONS, generator=generator)
    trajectory = teacher_trajectory(teacher, noise)

    def learn(components: int) -> float:
        generator.manual_seed(1)
        start = torch.randn(1, components, 2, 1, LOCATIONS, generator=generator)
        means = (teacher(noise, ONE).unsqueeze(1) + 0.7 * start).requires_grad_()
        logstds = torch.full((1, 1, 1, 1, 1), -1.0, requires_grad=True)
        logweights = torch.zeros(1, components, 1, 1, LOCATIONS, requires_grad=True)
        optimizer = torch.optim.Adam([means, logstds, logweights], lr=0.05, betas=(0.9, 0.95))
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
        for _ in range(STEPS):
            policy = GMFlowPolicy(means, logstds, logweights, noise, ONE)
            loss = segment_errors(policy, teacher, noise, ONE, ONE, generator, SAMPLER, CONFIG)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        with torch.no_grad():
            return trajectory_error(policy.detach(), trajectory)

    return {components: learn(components) for components in (1, 4, 32)}


def test_a_mixture_of_32_reproduces_the_teachers_whole_trajectories(learned_errors: dict[int, float]) -> None:
    assert learned_errors[32] < 0.006


def test_more_components_follow_the_teacher_more_closely(learned_errors: dict[int, float]) -> None:
    assert learned_errors[32] < 0.8 * learned_errors[4]
    assert learned_errors[4] < 0.2 * learned_errors[1]
