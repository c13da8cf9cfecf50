"""Students of whom all weights are trained: their teacher stands beside them, untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models import network as networks
from fewstep.models.conditioning import ClassConditioning, Conditioning, TextConditioning
from fewstep.models.heads import DXConfig, GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.student.adapter import WEIGHTS, load_adapter, save_adapter
from fewstep.train.recipe import DistillRecipe, load_recipe

CONFIGS = {
    "dit": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "num_layers": 2, "sample_size": 8,
        "patch_size": 2, "num_embeds_ada_norm": 5,
    },
    "qwen_image": {
        "patch_size": 2, "in_channels": 12, "out_channels": 3, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 1, "axes_dims_rope": [8, 4, 4],
    },
}  # fmt: skip
X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
CONDITIONING: dict[str, Conditioning] = {
    "dit": ClassConditioning(torch.tensor([1, 4])),
    "qwen_image": TextConditioning(torch.tensor([[[1.0]], [[4.0]]]), torch.ones(2, 1, dtype=torch.bool)),
}


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def base(family: str) -> nn.Module:
    torch.manual_seed(0)
    transformer = get_family(family).build(CONFIGS[family])
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return transformer


def student(family: str, policy: GMFlowConfig | DXConfig) -> PolicyNetwork:
    return PolicyNetwork(base(family), get_family(family), policy, lora=None, full=True)


def velocity(network: PolicyNetwork) -> Tensor:
    return network.policy(X, T, CONDITIONING[network.family.name]).velocity(X, T)


def test_it_begins_as_its_teacher_and_leaves_it_as_it_was(family: str) -> None:
    network = student(family, DXConfig(points=2))
    before = network.velocity(X, T, CONDITIONING[network.family.name])
    with torch.no_grad():
        torch.testing.assert_close(velocity(network), before, atol=1e-5, rtol=0)
        for parameter in network.trainable().values():
            parameter.mul_(1.5)
        assert (velocity(network) - before).abs().max() > 1e-2
    assert torch.equal(network.velocity(X, T, CONDITIONING[network.family.name]), before)


def test_every_weight_that_reaches_the_output_is_trained(family: str) -> None:
    network, kind = student(family, DXConfig(points=2)), get_family(family)
    velocity(network).square().mean().backward()
    trained = network.trainable()
    assert {name for name, p in trained.items() if p.grad is None or not p.grad.any()} == set()
    of_base = {
        name for name, _ in base(family).named_parameters() if not name.startswith(("norm_out", "proj_out"))
    }
    names = {name.removeprefix("transformer.") for name in trained}
    assert of_base - names == set(kind.unused_parameters(network.transformer))
    assert all(p.grad is None for p in network.teacher.parameters())


def test_a_saved_student_comes_back_whole(family: str, tmp_path: Path) -> None:
    network = student(family, GMFlowConfig(components=3, logstd_width=8))
    with torch.no_grad():
        for parameter in network.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        save_adapter(network, tmp_path)
        again = load_adapter(base(family), get_family(family), tmp_path)
        assert torch.equal(velocity(again), velocity(network))
        assert torch.equal(
            again.velocity(X, T, CONDITIONING[network.family.name]),
            network.velocity(X, T, CONDITIONING[network.family.name]),
        )


def test_a_student_that_lacks_some_weights_is_refused(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_adapter(student(family, DXConfig(points=2)), tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    lost = next(name for name in state if "transformer_blocks.1" in name)
    save_file({name: state[name] for name in state if name != lost}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=rf"{lost} \(missing\)"):
        load_adapter(base(family), get_family(family), tmp_path)


def test_all_weights_or_adapters_but_not_both() -> None:
    with pytest.raises(UserError, match=r"set student.lora=null") as caught:
        load_recipe(DistillRecipe, None, ["student.full=true"])
    assert "\n" not in str(caught.value)
    assert load_recipe(DistillRecipe, None, ["student.full=true", "student.lora=null"]).student.full


def test_a_cpu_computes_a_large_batch_of_the_teacher_in_parts(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = student(family, DXConfig(points=2))
    conditioning = CONDITIONING[family].repeat(4)
    x, t = X.repeat(4, 1, 1, 1), T.repeat(4)
    whole = network.velocity(x, t, conditioning)
    seen: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(networks, "PART_TOKENS", 3 * 16)  # a latent of 8 by 8 has 16 tokens
    torch.testing.assert_close(network.velocity(x, t, conditioning), whole)
    assert seen == [3, 3, 2]
    monkeypatch.setattr(networks, "PART_TOKENS", 1)  # less than one sample has
    torch.testing.assert_close(network.velocity(x, t, conditioning), whole)
    assert seen[3:] == [1] * 8
