"""Folding adapters into narrow layers changes the work, and nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from fewstep.distill import PowerEMA
from fewstep.models.adapters import LoRAConfig
from fewstep.models.heads import GMFlowConfig
from fewstep.models.lora import FoldedLoRALinear
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family


def adapted(width: int, rank: int, dropout: float = 0.0) -> FoldedLoRALinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width))
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=["0"])
    config._register_custom_module({nn.Linear: FoldedLoRALinear})
    inject_adapter_in_model(config, model)
    nn.init.normal_(model[0].lora_B["default"].weight)
    return model[0]


def result_and_gradients(layer: nn.Module, forward, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    y = forward(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def test_a_folded_layer_is_pefts_own_with_its_gradients() -> None:
    layer, x = adapted(width=24, rank=8), torch.randn(5, 7, 24)
    folded = result_and_gradients(layer, layer, x)
    beside = result_and_gradients(layer, lambda x: Linear.forward(layer, x), x)
    assert len(folded) == 3
    for ours, theirs in zip(folded, beside, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_switched_off_adapter_is_the_base_to_the_bit() -> None:
    layer, x = adapted(width=24, rank=8), torch.randn(3, 24)
    layer._disable_adapters = True
    assert torch.equal(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize(
    ("width", "rank", "dropout", "folds"), [(24, 8, 0.0, True), (24, 2, 0.0, False), (24, 8, 0.5, False)]
)
def test_narrow_layers_without_dropout_are_folded(width: int, rank: int, dropout: float, folds: bool) -> None:
    assert adapted(width, rank, dropout)._folds() is folds


def test_weights_folded_once_give_the_very_same_output() -> None:
    from fewstep.models.lora import FOLDED
    from fewstep.models.teacher import load_teacher
    from fewstep.student import FewStepPipeline, resolve_student
    from fewstep.student.adapter import load_adapter

    transformer, family, _ = load_teacher("emoji", "qwen_image")
    network = load_adapter(transformer, family, resolve_student("emoji-student").folder).eval()
    pipe = FewStepPipeline.from_pretrained("emoji-student")
    assert any(name.endswith(f".{FOLDED}") for name, _ in pipe.network.named_buffers())
    assert pipe.network.state_dict().keys() == network.state_dict().keys()
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
    conditioning = pipe.encode(["red heart, noto style", "owl, fluent style"])
    for student in (True, False):
        with torch.no_grad():
            expected = network(x, t, conditioning, student=student)
            assert torch.equal(pipe.network(x, t, conditioning, student=student), expected)


def test_teacher_student_and_average_together_cost_little_more_than_one_base() -> None:
    """As narrow as Qwen-Image's adapters are for its width: rank 256 of 3,072, at an eighth of both."""
    family = get_family("qwen_image")
    transformer = family.build(
        {"in_channels": 64, "out_channels": 16, "num_layers": 8, "attention_head_dim": 128, "num_attention_heads": 3,
         "joint_attention_dim": 384}
    )  # fmt: skip
    base = sum(p.nbytes for p in transformer.parameters())
    network = PolicyNetwork(transformer, family, GMFlowConfig(components=8), LoRAConfig(rank=32))
    average = PowerEMA(network.trainable())
    held = {t.data_ptr(): t.nbytes for t in (*network.parameters(), *average.state_dict().values())}
    assert 1 < sum(held.values()) / base <= 1.15
