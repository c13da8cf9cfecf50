"""Which optimizer moves what, and that a checkpoint holds all that it needs to go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from fewstep.errors import UserError
from fewstep.models import ModuleFamily
from fewstep.train.checkpoint import load_tensors, optimizer_tensors
from fewstep.train.optimizers import build_optimizers
from fewstep.train.recipe import OptimizerConfig
from fewstep.train.validation import _check_optimizer


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))])
        self.blocks[0][0].bias.requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0](x))

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def optimizers_of(network: Network, **settings: object) -> list[torch.optim.Optimizer]:
    section = OptimizerConfig(**settings)
    return build_optimizers(network.trainable().values(), network.blocks, section)


def train(network: Network, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        network(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_every_trained_parameter_has_one_optimizer_and_the_blocks_matrices_are_muons(kind: str) -> None:
    network = Network()
    optimizers = optimizers_of(network, type=kind, lr=2e-3, muon_lr=0.01, weight_decay=0.1)
    names = {id(p): name for name, p in network.named_parameters()}
    owned = [
        (type(optimizer), names[id(p)], group["peak_lr"], group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    muon = {(name, lr, decay) for owner, name, lr, decay in owned if owner is torch.optim.Muon}
    inner = {("blocks.0.0.weight", 0.01, 0.1), ("blocks.0.2.weight", 0.01, 0.1)}
    assert muon == (inner if kind == "muon" else set())
    adam = {(name, lr, decay) for owner, name, lr, decay in owned if owner is torch.optim.AdamW}
    assert adam >= {("head.weight", 2e-3, 0.1), ("head.bias", 2e-3, 0.0), ("blocks.0.2.bias", 2e-3, 0.0)}
    assert sorted(name for _, name, *_ in owned) == sorted(network.trainable())


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(kind: str, tmp_path: Path) -> None:
    def everything(network: Network, optimizers: list[torch.optim.Optimizer]) -> dict[str, object]:
        return {"model": network.trainable(), "slots": optimizer_tensors(optimizers, network.trainable())}

    first = Network()
    optimizers = optimizers_of(first, type=kind)
    train(first, optimizers, range(3))
    dcp.save(everything(first, optimizers), checkpoint_id=str(tmp_path / "c"))
    train(first, optimizers, range(3, 6))

    second = Network()
    optimizers = optimizers_of(second, type=kind)
    load_tensors(everything(second, optimizers), tmp_path / "c")
    train(second, optimizers, range(3, 6))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_muon_is_refused_where_no_block_has_a_matrix_for_it() -> None:
    family = ModuleFamily("plain", Network, projection="head", channels=3, width=6)
    _check_optimizer(OptimizerConfig(type="adam"), Network(), family)
    with pytest.raises(
        UserError, match=r"optimizer.type: .* plain network .* set optimizer.type=adam"
    ) as caught:
        _check_optimizer(OptimizerConfig(type="muon"), Network(), family)
    assert "\n" not in str(caught.value)
