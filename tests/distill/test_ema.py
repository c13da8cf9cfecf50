"""The average of the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.distill import PowerEMA
from fewstep.plan.meter import DispatchMeter


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.sampled_from([0.0, 7.0, 16.0]))
def test_average_is_the_power_weighted_mean_of_all_updates(values: list[float], gamma: float) -> None:
    """Closed form: update t of n weighs (t/n)^(γ+1) − ((t−1)/n)^(γ+1)."""
    weight = torch.zeros(1)
    ema = PowerEMA({"w": weight}, gamma)
    for step, value in enumerate(values, 1):
        weight.fill_(value)
        ema.update(step)
    n = len(values)
    shares = [(t / n) ** (gamma + 1) - ((t - 1) / n) ** (gamma + 1) for t in range(1, n + 1)]
    expected = sum(share * value for share, value in zip(shares, values, strict=True))
    assert sum(shares) == pytest.approx(1.0)
    assert ema.state_dict()["w"].item() == pytest.approx(expected, abs=1e-4)


def test_swapped_exchanges_and_gives_back_bit_for_bit() -> None:
    module = torch.nn.Linear(3, 2)
    ema = PowerEMA(dict(module.named_parameters()))
    with torch.no_grad():
        module.weight.add_(1)
    live, average = module.weight.clone(), ema.state_dict()["weight"].clone()
    parameter = module.weight
    with ema.swapped():
        assert module.weight is parameter
        assert torch.equal(module.weight, average)
    assert torch.equal(module.weight, live)
    assert torch.equal(ema.state_dict()["weight"], average)


def test_weights_come_back_when_sampling_fails() -> None:
    weight = torch.zeros(2)
    ema = PowerEMA({"w": weight})
    weight.fill_(1)

    def sample() -> None:
        with ema.swapped():
            raise RuntimeError("sampling failed")

    with pytest.raises(RuntimeError, match="sampling failed"):
        sample()
    assert weight.tolist() == [1, 1]


def test_low_precision_weights_have_a_float32_average() -> None:
    weight = torch.ones(4, dtype=torch.bfloat16)
    ema = PowerEMA({"w": weight})
    ema.update(1)
    weight.fill_(1.0078125)  # the next bfloat16
    ema.update(1000)
    assert ema.state_dict()["w"].dtype == torch.float32
    assert 1 < ema.state_dict()["w"][0].item() < 1.0078125
    with ema.swapped():
        assert weight.dtype == torch.bfloat16
    assert weight[0].item() == 1.0078125


def test_a_resumed_average_continues_bit_for_bit() -> None:
    def train(ema: PowerEMA, weight: torch.Tensor, steps: range) -> None:
        for step in steps:
            weight.add_(torch.sin(torch.tensor(float(step))))
            ema.update(step)

    weight = torch.randn(5, generator=torch.Generator().manual_seed(0))
    other = weight.clone()
    whole = PowerEMA({"w": weight})
    train(whole, weight, range(1, 11))

    first = PowerEMA({"w": other})
    train(first, other, range(1, 6))
    second = PowerEMA({"w": other})
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    train(second, other, range(6, 11))
    assert torch.equal(second.state_dict()["w"], whole.state_dict()["w"])


def test_sharded_weights_have_sharded_averages() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)])
        ema = PowerEMA({"w": weight})
        for step in (1, 2):
            weight.add_(1)
            ema.update(step)
        average = ema.state_dict()["w"]
        assert isinstance(average, DTensor)
        value = average.to_local().clone()
        torch.testing.assert_close(value, torch.full((4, 2), 2 - 0.5**8))
        with ema.swapped():
            assert torch.equal(weight.to_local(), value)
        assert torch.equal(weight.to_local(), torch.full((4, 2), 2.0))
        assert torch.equal(ema.state_dict()["w"].to_local(), value)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gpu_offloading_changes_no_bit(dtype: torch.dtype) -> None:
    def values(offload: bool) -> list[torch.Tensor]:
        weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in {"a": (5, 3), "b": (7,)}.items()}
        ema, seen = PowerEMA(weights, 7.0, offload), []
        generator = torch.Generator().manual_seed(0)
        for step in range(1, 6):
            for weight in weights.values():
                weight.add_(torch.randn(weight.shape, generator=generator))
            ema.update(step)
            with ema.swapped():
                seen += [weight.clone() for weight in weights.values()]
            seen += [average.clone() for average in ema.state_dict().values()]
        ema.load_state_dict({name: value + 1 for name, value in ema.state_dict().items()})
        ema.update(6)
        return seen + [value.clone() for value in (*weights.values(), *ema.state_dict().values())]

    for offloaded, kept in zip(values(True), values(False), strict=True):
        assert torch.equal(offloaded, kept)


@pytest.mark.parametrize("offload", [False, True])
def test_float32_weights_are_never_copied_all_together(offload: bool) -> None:
    weights = {str(index): torch.zeros(1000) for index in range(10)}
    ema = PowerEMA(weights, offload=offload)
    with DispatchMeter([*weights.values(), *ema.state_dict().values()]) as meter:
        ema.update(2)
        assert meter.peak == 0
        with ema.swapped():
            assert meter.now <= 4000
    assert meter.peak <= 2 * 4000, "one at a time, and the one before it"


def test_before_it_begins_the_average_is_the_weights() -> None:
    weight = torch.zeros(1)
    ema, plain = PowerEMA({"w": weight}, begin=4), PowerEMA({"w": weight})
    for step in range(1, 6):
        weight.fill_(step)
        ema.update(step)
        plain.update(step)
        if step < 4:
            assert ema.state_dict()["w"].item() == step
    # From then on with the decay of the whole run's step.
    wanted = 3.0
    for step in (4, 5):
        wanted += (1 - (1 - 1 / step) ** 8) * (step - wanted)
    assert ema.state_dict()["w"].item() == pytest.approx(wanted)
    assert plain.state_dict()["w"].item() != pytest.approx(wanted)
