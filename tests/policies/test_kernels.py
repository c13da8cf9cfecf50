"""Fused rollouts are the reference, only faster."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.benchmarks.measure import peak_memory
from fewstep.flow import TimeShift
from fewstep.policies import DXPolicy, GMFlowPolicy, kernels, mean_velocity, rollout
from fewstep.policies.kernels import window
from fewstep.policies.rollout import (
    _window,
    mean_velocity_reference,
    rollout_reference,
    substep_sigmas,
)

CLOSE = 1e-4


@st.composite
def gm_cases(
    draw: st.DrawFn, largest: int = 7, most_components: int = 40
) -> tuple[GMFlowPolicy, Tensor, Tensor, TimeShift]:
    """A policy, raw times of its source and of the rollout's end, and a shift; all sizes, all extremes."""
    batch, components, channels = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, most_components)),
        draw(st.integers(1, 17)),
    )
    space = draw(st.lists(st.integers(1, largest), min_size=2, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shift = TimeShift(draw(st.sampled_from([0.5, 1.0, 3.2])))
    raw_src = 0.05 + 0.95 * torch.rand(batch, generator=generator)
    raw_to = raw_src * draw(st.floats(0.3, 1.0)) * torch.rand(batch, generator=generator) ** 0.2

    logweights = draw(st.sampled_from([0.0, 1.0, 30.0])) * torch.randn(
        batch, components, 1, *space, generator=generator
    )
    if components > 1 and draw(st.booleans()):
        logweights[:, draw(st.integers(0, components - 1))] = -torch.inf
    means = torch.randn(batch, components, channels, *space, generator=generator)
    logstd = draw(st.sampled_from([-0.7, -1.5, -3.0, -8.0]))
    if draw(st.booleans()):  # not contiguous
        means = means.movedim(2, -1).contiguous().movedim(-1, 2)
    policy = GMFlowPolicy(
        means,
        torch.full((batch, 1, 1, *[1] * len(space)), logstd),
        logweights.log_softmax(1) if draw(st.booleans()) else logweights,
        torch.randn(batch, channels, *space, generator=generator),
        shift.warp(raw_src),
    )
    return policy, raw_src, raw_to, shift


def cast(policy: GMFlowPolicy, to: torch.dtype | torch.device) -> GMFlowPolicy:
    parts = (policy.means, policy.logstds, policy.logweights, policy.x_src, policy.sigma_src)
    return GMFlowPolicy(*(part.to(to) for part in parts))


def exactness(single: Tensor, double: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """Per value: our error against float64, and what is allowed.

    Where two narrow components are about equally likely the ODE itself multiplies rounding errors; there the
    float32 reference is off as well, and no closer to be followed than that.
    """
    scale = double.abs().clamp(min=1).amax()
    return (ours - double).abs(), CLOSE * scale + 4 * (single - double).abs().amax()


# Few components go by their inner products.
@given(gm_cases() | gm_cases(most_components=6))
@settings(max_examples=120, deadline=None)
def test_the_fused_rollout_is_the_reference(case: tuple[GMFlowPolicy, Tensor, Tensor, TimeShift]) -> None:
    policy, raw_src, raw_to, shift = case
    x, sigma = rollout(policy, policy.x_src, raw_src, raw_to, shift)
    sigmas = substep_sigmas(raw_src, raw_to, shift)
    single = rollout_reference(policy, policy.x_src, sigmas)
    double = rollout_reference(cast(policy, torch.float64), policy.x_src.double(), sigmas.double())
    error, allowed = exactness(single, double, x)
    assert (error <= allowed).all(), (error.max(), allowed)
    torch.testing.assert_close(sigma, sigmas[-1], atol=0, rtol=0)


@given(gm_cases())
@settings(max_examples=40, deadline=None)
def test_a_bfloat16_policy_is_its_float32_copy(
    case: tuple[GMFlowPolicy, Tensor, Tensor, TimeShift],
) -> None:
    policy, raw_src, raw_to, shift = case
    half = GMFlowPolicy(
        policy.means.bfloat16(), policy.logstds, policy.logweights, policy.x_src, policy.sigma_src
    )
    copy = GMFlowPolicy(half.means.float(), policy.logstds, policy.logweights, policy.x_src, policy.sigma_src)
    ours = rollout(half, policy.x_src, raw_src, raw_to, shift)[0]
    assert torch.equal(ours, rollout(copy, policy.x_src, raw_src, raw_to, shift)[0])


@given(gm_cases(), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_fused_window_and_its_gradient_are_the_reference(
    case: tuple[GMFlowPolicy, Tensor, Tensor, TimeShift], substeps: int
) -> None:
    def ours(built: GMFlowPolicy, x: Tensor, raw_a: Tensor, raw_to: Tensor, shift: TimeShift) -> Tensor:
        return mean_velocity(built, x, raw_a, raw_to, shift)

    assert_window_and_gradient(case, substeps, ours)


def assert_window_and_gradient(
    case: tuple[GMFlowPolicy, Tensor, Tensor, TimeShift],
    substeps: int,
    fused: Callable[[GMFlowPolicy, Tensor, Tensor, Tensor, TimeShift], Tensor],
) -> None:
    """Value and gradients to the head, to x_src and to the state are those of the reference."""
    policy, raw_src, raw_a, shift = case
    raw_to = (raw_a - substeps / 128).clamp(min=0)
    x_a = rollout(policy, policy.x_src, raw_src, raw_a, shift)[0]
    weight = torch.randn(x_a.shape, generator=torch.Generator().manual_seed(0))

    def run(dtype: torch.dtype, mean: Callable[..., Tensor]) -> list[Tensor]:
        built = cast(policy, dtype)
        inputs = [built.means, built.logstds, built.logweights, built.x_src, x_a.to(dtype)]
        inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        built = GMFlowPolicy(*inputs[:4], built.sigma_src)
        value = mean(built, inputs[4], raw_a, raw_to, shift)
        return [value.detach(), *torch.autograd.grad((value * weight).sum(), inputs)]

    def plain(built: GMFlowPolicy, x: Tensor, *times: Tensor) -> Tensor:
        return mean_velocity_reference(built, x, *(table.to(x.dtype) for table in _window(*times, 128)))

    runs = (run(torch.float32, plain), run(torch.float64, plain), run(torch.float32, fused))
    for single, double, ours in zip(*runs, strict=True):
        error, allowed = exactness(single, double, ours)
        assert (error <= allowed).all(), (ours.shape, error.max(), allowed)


@given(gm_cases())
@settings(max_examples=30, deadline=None)
def test_a_sample_does_not_depend_on_its_batch(
    case: tuple[GMFlowPolicy, Tensor, Tensor, TimeShift],
) -> None:
    policy, raw_src, raw_to, shift = case
    together, _ = rollout(policy, policy.x_src, raw_src, raw_to, shift)
    for b in range(len(together)):
        one = slice(b, b + 1)
        parts = (policy.means, policy.logstds, policy.logweights, policy.x_src, policy.sigma_src)
        part = GMFlowPolicy(*(tensor[one] for tensor in parts))
        alone, _ = rollout(part, policy.x_src[one], raw_src[one], raw_to[one], shift)
        assert torch.equal(alone[0], together[b])


@given(
    st.sampled_from(["grid", "polynomial"]),
    st.integers(2, 12),
    st.floats(0.1, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_dx_in_closed_form_is_the_reference(
    mode: str, points: int, segment: float, remaining: float, seed: int
) -> None:
    generator, shift = torch.Generator().manual_seed(seed), TimeShift(3.2)
    raw_src = 0.1 + 0.9 * torch.rand(3, generator=generator)
    raw_to = (raw_src - segment).clamp(min=0) * (1 - remaining) + raw_src * remaining
    output = torch.randn(3, points, 2, 3, 5, generator=generator).requires_grad_()
    x = torch.randn(3, 2, 3, 5, generator=generator)
    policy = DXPolicy(output, x, shift.warp(raw_src), segment, shift, mode)

    ours, _ = rollout(policy, x, raw_src, raw_to, shift)
    torch.testing.assert_close(
        ours, rollout_reference(policy, x, substep_sigmas(raw_src, raw_to, shift)), atol=CLOSE, rtol=CLOSE
    )
    with torch.no_grad():  # by the kernel, twice: the second time its table is known already
        for _ in range(2):
            torch.testing.assert_close(
                rollout(policy, x, raw_src, raw_to, shift)[0], ours, atol=CLOSE, rtol=CLOSE
            )
        for b in range(3):
            one = slice(b, b + 1)
            alone = DXPolicy(output[one], x[one], shift.warp(raw_src[one]), segment, shift, mode)
            end = rollout(alone, x[one], raw_src[one], raw_to[one], shift)[0]
            torch.testing.assert_close(end, ours[one], atol=CLOSE, rtol=CLOSE)
    window = _window(raw_src, (raw_src - 3 / 128).clamp(min=0), shift, 128)
    means = (
        mean_velocity(policy, x, raw_src, (raw_src - 3 / 128).clamp(min=0), shift),
        mean_velocity_reference(policy, x, *window),
    )
    torch.testing.assert_close(*means, atol=CLOSE, rtol=CLOSE)
    grads = [torch.autograd.grad(mean.square().sum(), output, retain_graph=True)[0] for mean in means]
    torch.testing.assert_close(*grads, atol=CLOSE, rtol=CLOSE)


def large_case(seed: int = 0) -> tuple[GMFlowPolicy, Tensor]:
    """A policy large enough for several threads, and its raw source times."""
    generator, raw = torch.Generator().manual_seed(seed), torch.full((2,), 0.9)
    policy = GMFlowPolicy(
        torch.randn(2, 8, 4, 33, 31, generator=generator),
        torch.full((2, 1, 1, 1, 1), -1.5),
        torch.randn(2, 8, 1, 33, 31, generator=generator),
        torch.randn(2, 4, 33, 31, generator=generator),
        TimeShift(3.2).warp(raw),
    )
    return policy, raw


def test_eight_python_threads_may_roll_out_at_once() -> None:
    cases = [large_case(seed) for seed in range(8)]

    def run(case: tuple[GMFlowPolicy, Tensor]) -> Tensor:
        torch.set_num_threads(2)
        policy, raw = case
        return rollout(policy, policy.x_src, raw, raw / 2, TimeShift(3.2))[0]

    alone = [run(case) for case in cases]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            together = list(threads.map(run, cases))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
def test_dx_on_several_threads_is_dx_on_one_bit_for_bit(mode: str) -> None:
    generator, raw = torch.Generator().manual_seed(0), torch.tensor([0.9, 0.7])
    output = torch.randn(2, 10, 16, 65, 63, generator=generator)
    x, shift, before = (
        torch.randn(2, 16, 65, 63, generator=generator),
        TimeShift(3.2),
        torch.get_num_threads(),
    )
    policy = DXPolicy(output, x, shift.warp(raw), 0.5, shift, mode)
    ends = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ends.append(rollout(policy, x, raw, raw / 2, shift)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_alters_nothing(threads: int) -> None:
    policy, raw = large_case()
    before = torch.get_num_threads()
    once = rollout(policy, policy.x_src, raw, raw / 2, TimeShift(3.2))[0]
    torch.set_num_threads(threads)
    try:
        assert torch.equal(rollout(policy, policy.x_src, raw, raw / 2, TimeShift(3.2))[0], once)
    finally:
        torch.set_num_threads(before)


def test_a_forked_process_rolls_out_on_several_threads_too() -> None:
    """OpenMP's do not survive a fork; whoever waits for them waits for ever."""
    code = """
import os, signal, torch
from tests.policies.test_kernels import TimeShift, large_case, rollout
torch.set_num_threads(2)
policy, raw = large_case()
run = lambda: rollout(policy, policy.x_src, raw, raw / 2, TimeShift(3.2))[0]
here = run()
if not (child := os.fork()):
    signal.alarm(20)
    os._exit(0 if torch.equal(run(), here) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "0"


def test_a_source_time_that_varies_over_the_latent_goes_by_the_reference() -> None:
    policy, raw = large_case()
    varied = GMFlowPolicy(
        policy.means, policy.logstds, policy.logweights, policy.x_src, torch.full((1, 1, 33, 31), 0.97)
    )
    assert kernels.kernel(policy, policy.x_src) is not None
    assert kernels.kernel(varied, policy.x_src) is None
    assert rollout(varied, policy.x_src, raw, raw / 2, TimeShift(3.2))[0].isfinite().all()


def test_nan_stays_visible() -> None:
    policy, raw = large_case()
    policy.means[0, 3, 1, 2, 5] = torch.nan
    x, _ = rollout(policy, policy.x_src, raw, raw / 2, TimeShift(3.2))
    assert x[0, :, 2, 5].isnan().all()
    assert x.isnan().sum() == 4


def test_a_rollout_with_gradient_has_one() -> None:
    policy, raw = large_case()
    means = policy.means.requires_grad_()
    built = GMFlowPolicy(means, policy.logstds, policy.logweights, policy.x_src, policy.sigma_src)
    with torch.no_grad():  # what a query without gradient leaves behind must not cut the graph later
        built.velocity(policy.x_src, policy.sigma_src)
    x, _ = rollout(built, policy.x_src, raw, raw - 2 / 128, TimeShift(3.2))
    assert torch.autograd.grad(x.square().sum(), means)[0].any()


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("substeps", [3, 12])
def test_a_window_takes_at_most_half_more_memory_than_one_query(
    kernel: bool, substeps: int, request: pytest.FixtureRequest
) -> None:
    if not kernel:
        request.getfixturevalue("no_compiler")
    policy, raw = large_case()
    head = [part.requires_grad_() for part in (policy.means, policy.logstds, policy.logweights)]

    def gradient(velocity: Callable[[GMFlowPolicy], Tensor]) -> Callable[[], object]:
        build = lambda: GMFlowPolicy(*head, policy.x_src, policy.sigma_src)  # noqa: E731
        return lambda: torch.autograd.grad(velocity(build()).square().mean(), head)

    query = gradient(lambda policy: policy.velocity(policy.x_src, policy.sigma_src))
    window = gradient(
        lambda policy: mean_velocity(policy, policy.x_src, raw, raw - substeps / 128, TimeShift(3.2))
    )
    device = torch.device("cpu")
    assert peak_memory(window, device) <= 1.5 * peak_memory(query, device)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(kernels.MODULES, "cpu", ("absent", "numba"))
    kernels._load.cache_clear()
    yield
    kernels._load.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_plain_torch_does_it_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    policy, raw = large_case()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            x, _ = rollout(policy, policy.x_src, raw, raw / 2, TimeShift(3.2))
    assert torch.equal(
        x, rollout_reference(policy, policy.x_src, substep_sigmas(raw, raw / 2, TimeShift(3.2)))
    )
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert "numba" in caplog.text


def test_compilers_are_imported_at_the_first_rollout_only() -> None:
    heavy = "'numba', 'ray', 'mlflow', 'diffusers'"
    code = f"import sys, fewstep.flow; print([name for name in ({heavy}) if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("kind", ["gm", "dx"])
def test_the_host_never_waits_for_the_device(kind: str) -> None:
    """On meta tensors, which have no values and refuse to be read; the times are on the CPU."""
    raw, x = torch.tensor([1.0, 0.6]), torch.empty(2, 4, 3, 5, device="meta")
    sigma_src, head = (
        torch.empty(2, device="meta"),
        torch.empty(2, 8, 4, 3, 5, device="meta", requires_grad=True),
    )
    if kind == "gm":
        logstds, logweights = (
            torch.empty(2, 1, 1, 1, 1, device="meta"),
            torch.empty(2, 8, 1, 3, 5, device="meta"),
        )
        policy = GMFlowPolicy(head, logstds, logweights, x, sigma_src)
    else:
        policy = DXPolicy(head, x, sigma_src, 0.3, TimeShift(3.2))
    end, sigma = rollout(policy.detach(), x, raw, raw / 2, TimeShift(3.2))
    mean = mean_velocity(policy, x, raw, raw - 3 / 128, TimeShift(3.2))
    mean.square().mean().backward()
    assert end.shape == mean.shape == x.shape
    assert sigma.device == x.device
    assert head.grad.shape == head.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_synchronisation_on_cuda() -> None:
    policy, raw = large_case()
    parts = (policy.means, policy.logstds, policy.logweights, policy.x_src, policy.sigma_src)
    means, *rest = (part.cuda() for part in parts)
    policy = GMFlowPolicy(means.requires_grad_(), *rest)

    def step() -> None:
        x, _ = rollout(policy.detach(), policy.x_src, raw, raw / 2, TimeShift(3.2))
        mean_velocity(policy, x, raw / 2, raw / 2 - 3 / 128, TimeShift(3.2)).square().mean().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def on_triton() -> ModuleType:
    """The Triton kernels, compiled where there is CUDA and interpreted elsewhere."""
    pytest.importorskip("triton", reason="needs triton")
    from fewstep.policies.kernels import cuda

    return cuda


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Few components go by their inner products.
@given(case=gm_cases(largest=3) | gm_cases(largest=3, most_components=6))
@settings(max_examples=30, deadline=None)
def test_the_triton_rollout_is_the_reference(
    on_triton: ModuleType, case: tuple[GMFlowPolicy, Tensor, Tensor, TimeShift]
) -> None:
    policy, raw_src, raw_to, shift = case
    sigmas = substep_sigmas(raw_src, raw_to, shift)
    single = rollout_reference(policy, policy.x_src, sigmas)
    double = rollout_reference(cast(policy, torch.float64), policy.x_src.double(), sigmas.double())
    there = cast(policy, DEVICE)
    error, allowed = exactness(single, double, on_triton.rollout(there, there.x_src, sigmas.to(DEVICE)).cpu())
    assert (error <= allowed).all(), (error.max(), allowed)


@given(case=gm_cases(largest=3), substeps=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_the_triton_window_and_its_gradient_are_the_reference(
    on_triton: ModuleType, case: tuple[GMFlowPolicy, Tensor, Tensor, TimeShift], substeps: int
) -> None:
    def triton(built: GMFlowPolicy, x: Tensor, *times: Tensor) -> Tensor:
        there = cast(built, DEVICE)  # autograd moves the gradients back
        tables = (table.to(DEVICE) for table in _window(*times, 128))
        return window.mean_velocity(on_triton, there, x.to(DEVICE), *tables).cpu()

    assert_window_and_gradient(case, substeps, triton)


def test_one_policy_for_several_states_is_left_to_plain_torch() -> None:
    """A kernel would read the policies of the other samples from beyond the means' end."""
    torch.manual_seed(0)
    policy = GMFlowPolicy(
        torch.randn(1, 4, 3, 6, 6), torch.full((1, 1, 1, 1, 1), -2.0), torch.randn(1, 4, 1, 6, 6),
        torch.randn(3, 3, 6, 6), torch.full((3,), 0.9),
    )  # fmt: skip
    assert kernels.kernel(policy, policy.x_src) is None
    ends = (torch.full((3,), 0.9), torch.full((3,), 0.2), TimeShift(1.0))
    x, _ = rollout(policy, policy.x_src, *ends)
    torch.testing.assert_close(
        x, rollout_reference(policy, policy.x_src, substep_sigmas(*ends)), atol=1e-4, rtol=0
    )
