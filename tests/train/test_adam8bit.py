"""Adam with averages of 8 bits: as good as Adam, a quarter of its memory, and the same for any number of workers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fewstep.errors import UserError
from fewstep.models import ModuleFamily
from fewstep.models.sharded import whole
from fewstep.train.checkpoint import load_tensors, optimizer_tensors
from fewstep.train.optimizers import build_optimizers, state_bytes
from fewstep.train.recipe import OptimizerConfig
from fewstep.train.validation import _check_optimizer

SHAPES = {
    "square": (64, 128), "adapter": (256, 16), "uneven": (50, 96), "wide": (2, 4096), "kernel": (40, 20, 3, 3),
    "narrow": (2048, 3), "small": (16, 16), "vector": (8192,),
}  # fmt: skip
EIGHT_BITS = {"square", "adapter", "uneven", "wide"}
"""Those whose averages are integers: the others are small, or have no 16 numbers in a row with one scale."""

SETTINGS = OptimizerConfig(type="adam8bit", lr=1e-3, weight_decay=0.01)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(shape, generator=generator)))

    def forward(self, step: int) -> Tensor:
        """A loss whose gradients have sizes from 0.01 to 1, and other signs at each step."""
        generator, total = torch.Generator().manual_seed(step), torch.zeros(())
        for name, parameter in self.named_parameters():
            size = 10 ** (-2 * torch.rand(SHAPES[name], generator=generator))
            target = size * torch.randn(SHAPES[name], generator=generator)
            total = total + (parameter * target).sum()
        return total


def optimizer_of(network: Network, config: OptimizerConfig = SETTINGS) -> torch.optim.Optimizer:
    [optimizer] = build_optimizers(network.parameters(), [], config)
    return optimizer


def train(network: Network, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        network(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(network: Network, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    parameters = dict(network.named_parameters())
    return {"model": parameters, "slots": optimizer_tensors([optimizer], parameters)}


def test_ten_steps_are_adams_within_two_hundredths() -> None:
    start, adam, ours = Network(), Network(), Network()
    train(adam, optimizer_of(adam, SETTINGS.model_copy(update={"type": "adam"})), range(10))
    train(ours, optimizer_of(ours), range(10))
    for name, parameter in ours.named_parameters():
        moved = adam.get_parameter(name) - start.get_parameter(name)
        error = (parameter - adam.get_parameter(name)).norm() / moved.norm()
        assert error < (0.03 if name in EIGHT_BITS else 1e-5), name
        assert error > 1e-4 or name not in EIGHT_BITS, f"{name}: averages are not of 8 bits"


@settings(deadline=None, max_examples=30)
@given(st.floats(-8, 0), st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e-3]), min_size=2, max_size=6))
def test_no_weight_moves_farther_than_adam_moves_one(size: float, later: list[float]) -> None:
    """A gradient that is small beside others of its block, and then vanishes, is no reason for a leap."""
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = optimizer_of_one(weight)
    small = torch.arange(64) % 2 == 1
    bound = 1e-3 * (1 - 0.9) / (1 - 0.95) ** 0.5 + 1e-3  # lr · (1 − β₁)/√(1 − β₂), Adam's own, and rounding
    for factor in (1.0, *later):
        before = weight.detach().clone()
        weight.grad = torch.where(small, factor * 10**size, torch.ones(64, 64))
        optimizer.step()
        assert (weight - before).abs().max() < 3 * bound


def optimizer_of_one(weight: nn.Parameter) -> torch.optim.Optimizer:
    [optimizer] = build_optimizers([weight], [], OptimizerConfig(type="adam8bit", lr=1e-3))
    return optimizer


@pytest.mark.parametrize("kind", ["adam", "adam8bit", "muon"])
def test_the_bytes_that_plans_count_are_those_of_the_state(kind: str) -> None:
    network, config = Network(), SETTINGS.model_copy(update={"type": kind})
    optimizers = build_optimizers(network.parameters(), [network], config)
    slots = optimizer_tensors(optimizers, dict(network.named_parameters()))
    held = sum(slot.nbytes for state in slots.values() for name, slot in state.items() if name != "step")
    assert state_bytes(network.parameters(), [network], config) == held


def test_averages_of_weights_as_they_are_trained_take_a_quarter() -> None:
    weights = [
        nn.Parameter(torch.empty(3072, 256, device="meta")),
        nn.Parameter(torch.empty(256, 3072, device="meta")),
    ]
    share = state_bytes(weights, [], SETTINGS) / state_bytes(weights, [], OptimizerConfig())
    assert 0.25 < share < 0.26


def test_large_tensors_are_updated_part_by_part_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    once, parts = Network(), Network()
    train(once, optimizer_of(once), range(3))
    monkeypatch.setattr("fewstep.train.adam8bit.AT_A_TIME", 1024)
    train(parts, optimizer_of(parts), range(3))
    for name, parameter in once.named_parameters():
        assert torch.equal(parts.get_parameter(name), parameter), name


def test_weights_that_lie_otherwise_in_memory_are_updated_alike() -> None:
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    straight, turned = nn.Parameter(values.clone()), nn.Parameter(values.t().contiguous().t())
    assert not turned.is_contiguous()
    for weight in (straight, turned):
        optimizer = optimizer_of_one(weight)
        for step in range(3):
            weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.equal(straight, turned)


def test_without_torchao_a_run_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    family = ModuleFamily("plain", nn.Module, projection="head", channels=3, width=6)
    _check_optimizer(OptimizerConfig(), nn.Module(), family)
    with pytest.raises(
        UserError, match=r"adam8bit needs torchao: pip install 'fewstep\[quantization\]'"
    ) as told:
        _check_optimizer(SETTINGS, nn.Module(), family)
    assert "\n" not in str(told.value)


def resumed_among(rank: int, ranks: int, folder: str) -> None:
    """One rank's work: train unless there is a checkpoint, and go on from it; keeps the states at steps 3 and 6."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/of-{ranks}", rank=rank, world_size=ranks)
    torch.set_flush_denormal(True)  # as workers do
    mesh, states = init_device_mesh("cpu", (ranks,)), []
    checkpoint = Path(folder, "checkpoint")
    if not checkpoint.exists():
        network = fully_shard(Network(), mesh=mesh)
        optimizer = optimizer_of(network)
        train(network, optimizer, range(3))
        group = dist.new_group(backend="gloo")
        saved = dcp.async_save(
            tensors(network, optimizer), checkpoint_id=str(checkpoint), process_group=group
        )
        states.append(everything(network, optimizer))
        train(network, optimizer, range(3, 6))  # while it is being written
        states.append(everything(network, optimizer))
        saved.result()
    resumed = fully_shard(Network(), mesh=mesh)
    optimizer = optimizer_of(resumed)
    load_tensors(tensors(resumed, optimizer), checkpoint)
    states.append(everything(resumed, optimizer))
    train(resumed, optimizer, range(3, 6))
    states.append(everything(resumed, optimizer))
    if rank == 0:
        torch.save(states, f"{folder}/states-{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


def everything(network: Network, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = tensors(network, optimizer)
    flat = {f"model.{name}": value for name, value in state["model"].items()}
    flat |= {
        f"{name}.{slot}": value for name, slots in state["slots"].items() for slot, value in slots.items()
    }
    return {name: whole(value).clone() for name, value in flat.items()}


@pytest.mark.slow
def test_a_checkpoint_is_the_same_bits_for_any_number_of_workers(tmp_path: Path) -> None:
    """Written by two workers; read by two, by three (which share rows unequally, one with none of some), and by one."""

    def ranks(count: int) -> list[dict[str, Tensor]]:
        mp.spawn(resumed_among, (count, str(tmp_path)), nprocs=count)
        return torch.load(tmp_path / f"states-{count}.pt", weights_only=True)

    saved, uninterrupted, again, resumed = ranks(2)
    assert {
        name.removesuffix(".exp_avg_codes") for name in saved if name.endswith("_avg_codes")
    } == EIGHT_BITS
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items()), "bit for bit"
    among_three, _ = ranks(3)
    alone = Network()
    optimizer = optimizer_of(alone)
    load_tensors(tensors(alone, optimizer), tmp_path / "checkpoint")
    for loaded in (again, among_three, everything(alone, optimizer)):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
