"""The documented family for a network of diffusers that is not built in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.models.adapters import LoRAConfig
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Family
from fewstep.models.family_code import use_module
from fewstep.models.heads import DXConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family

FILE = Path(__file__).parents[2] / "jobs" / "examples" / "aura_flow_family.py"
CONFIG = {
    "sample_size": 8,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pos_embed_max_size": 64,
}
X, T = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
TEXT = TextConditioning.collate(list(torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))))


@pytest.fixture(scope="module")
def family() -> Family:
    use_module(str(FILE))
    return get_family("aura_flow")


def test_the_teacher_is_diffusers_network_and_the_student_begins_as_it(family: Family) -> None:
    torch.manual_seed(0)
    transformer = family.build(CONFIG)
    with torch.no_grad():
        wanted = transformer(X, encoder_hidden_states=TEXT.states, timestep=T, return_dict=False)[0]
    network = PolicyNetwork(transformer, family, DXConfig(points=2), LoRAConfig(rank=2))
    torch.testing.assert_close(network.velocity(X, T, TEXT), wanted)
    policy = network.policy(X, T, TEXT)
    torch.testing.assert_close(policy.velocity(X, T), wanted, atol=1e-5, rtol=1e-4)
    policy.velocity(X, T).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.trainable().values())


def test_parameters_named_unused_get_no_gradient_and_all_others_do(family: Family) -> None:
    transformer = family.build(CONFIG)
    family.denoise(transformer, X, T, TEXT).square().sum().backward()
    without = {n for n, p in transformer.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set(family.unused_parameters(transformer))


def test_it_is_as_short_as_promised() -> None:
    """The documentation promises under 40 lines of code."""
    lines = [line for line in FILE.read_text().splitlines() if line.strip()]
    assert len(lines) < 45
