"""The reference implementation's recorded numbers are ours."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.flow import SamplerSchedule, Segments, TimeShift, guided_velocity
from fewstep.policies import DXPolicy, GMFlowPolicy, mean_velocity, rollout

VECTORS = Path(__file__).parents[1] / "conformance" / "policy_vectors.npz"
STATE, TABLE = 1e-4, 1e-5

with np.load(VECTORS) as archive:
    DATA = {key: torch.from_numpy(archive[key]) for key in archive.files}

INPUTS = {"gm/means", "gm/logstds", "gm/logweights", "x_src", "sigma_src", "dx/output", "cfg/pos", "cfg/neg"}


def keys(pattern: str) -> list[str]:
    """The folders of keys that match, each once."""
    found = (re.match(pattern, key) for key in DATA)
    return sorted({match.group() for match in found if match})


ROLLOUTS = keys(r"shift[\d.]+/gm/dst\d")
TEMPERATURES = keys(r"shift[\d.]+/gm/temp[\d.]+")
DX_ROLLOUTS = keys(r"shift[\d.]+/dx_[a-z]+_[\d.]+/dst\d")
SHIFTS = keys(r"shift[\d.]+(?=/)")
SCHEDULES = keys(r"schedule/[^/]+")
SEGMENTS = keys(r"segments/[^/]+")
WINDOWS = keys(r"window\d+")
GUIDANCE = keys(r"cfg/guided.*")


def assert_close(ours: Tensor, key: str, atol: float) -> None:
    torch.testing.assert_close(ours, DATA[key], atol=atol, rtol=0)


def shift_of(key: str) -> TimeShift:
    return TimeShift(float(re.search(r"shift([\d.]+)", key).group(1)))


def gm_policy(requires_grad: bool = False) -> tuple[GMFlowPolicy, dict[str, Tensor]]:
    names = ("means", "logstds", "logweights")
    head = {name: DATA[f"gm/{name}"].clone().requires_grad_(requires_grad) for name in names}
    return GMFlowPolicy(**head, x_src=DATA["x_src"], sigma_src=DATA["sigma_src"]), head


def test_every_recorded_key_is_checked() -> None:
    folders = (*ROLLOUTS, *TEMPERATURES, *DX_ROLLOUTS, *SCHEDULES, *SEGMENTS, *WINDOWS)
    checked = {key for key in DATA if key.rpartition("/")[0] in folders}
    checked |= {f"{shift}/{name}" for shift in SHIFTS for name in ("raw_src", "gm/velocity_at_src")}
    checked |= {f"window/{name}" for name in ("x_a", "sigma_a", "raw_a")} | set(GUIDANCE) | INPUTS
    assert checked == set(DATA)


@pytest.mark.parametrize("shift", SHIFTS)
def test_source(shift: str) -> None:
    assert_close(shift_of(shift).unwarp(DATA["sigma_src"]), f"{shift}/raw_src", TABLE)
    velocity = gm_policy()[0].velocity(DATA["x_src"], DATA["sigma_src"])
    assert_close(velocity, f"{shift}/gm/velocity_at_src", STATE)


@pytest.mark.parametrize("case", ROLLOUTS)
def test_gmflow_rollout(case: str) -> None:
    shift, (policy, _) = shift_of(case), gm_policy()
    raw_src = DATA[f"{case.split('/')[0]}/raw_src"]
    x, sigma = rollout(policy, DATA["x_src"], raw_src, DATA[f"{case}/raw"], shift)
    assert_close(x, f"{case}/x", STATE)
    assert_close(sigma, f"{case}/sigma", TABLE)
    if f"{case}/velocity" in DATA:
        # At the recorded state: 1/σ magnifies the last digits in which two rollouts differ.
        x, sigma = DATA[f"{case}/x"], DATA[f"{case}/sigma"]
        assert_close(policy.velocity(x, sigma), f"{case}/velocity", STATE)
        assert_close(policy.velocity(x, sigma.view(-1, 1, 1, 1)), f"{case}/velocity", STATE)


@pytest.mark.parametrize("case", TEMPERATURES)
def test_gmflow_temperature(case: str) -> None:
    policy = gm_policy()[0].with_temperature(float(case.rpartition("temp")[2]))
    raw_src = DATA[f"{case.split('/')[0]}/raw_src"]
    x, _ = rollout(policy, DATA["x_src"], raw_src, raw_src / 2, shift_of(case))
    assert_close(x, f"{case}/x", STATE)


@pytest.mark.parametrize("case", DX_ROLLOUTS)
def test_dx_rollout(case: str) -> None:
    mode, segment, index = re.search(r"dx_([a-z]+)_([\d.]+)/dst(\d)", case).groups()
    segment_size = {"1.0000": 1.0, "0.2857": 1 / 3.5}[segment]
    shift, raw_src = shift_of(case), DATA[f"{case.split('/')[0]}/raw_src"]
    policy = DXPolicy(DATA["dx/output"], DATA["x_src"], DATA["sigma_src"], segment_size, shift, mode)
    x, sigma = rollout(policy, DATA["x_src"], raw_src, raw_src * (0.9, 0.8)[int(index)], shift)
    assert_close(x, f"{case}/x", STATE)
    assert_close(policy.velocity(x, sigma), f"{case}/velocity", STATE)


@pytest.mark.parametrize("case", SCHEDULES)
def test_sampler_schedule(case: str) -> None:
    nfe, shift, final, h = re.search(r"nfe(\d+)_shift([\d.]+)_final([\d.]+)_h(.+)", case).groups()
    schedule = SamplerSchedule(int(nfe), TimeShift(float(shift)), float(final), float(h))
    assert_close(schedule.sigma_src, f"{case}/sigma_src", TABLE)
    assert_close(schedule.sigma_dst, f"{case}/sigma_dst", TABLE)
    assert_close(schedule.renoise, f"{case}/m", TABLE)


@pytest.mark.parametrize("case", SEGMENTS)
def test_segments(case: str) -> None:
    nfe, final = re.search(r"nfe(\d+)_final([\d.]+)", case).groups()
    raw_src, segment_size = Segments(int(nfe), float(final)).containing(DATA[f"{case}/raw_t"])
    assert_close(raw_src, f"{case}/raw_src", TABLE)
    assert_close(segment_size, f"{case}/segment_size", TABLE)
    assert_close(TimeShift(3.2).warp(raw_src), f"{case}/sigma_src", TABLE)


@pytest.mark.parametrize("case", WINDOWS)
def test_mean_velocity_and_its_gradient(case: str) -> None:
    policy, head = gm_policy(requires_grad=True)
    raw_a = DATA["window/raw_a"]
    assert_close(TimeShift(3.2).warp(raw_a), "window/sigma_a", TABLE)
    raw_to = raw_a - int(case.removeprefix("window")) / 128
    mean = mean_velocity(policy, DATA["window/x_a"], raw_a, raw_to, TimeShift(3.2))
    assert_close(mean, f"{case}/mean_velocity", STATE)
    mean.square().mean().backward()
    for name, parameter in head.items():
        assert_close(parameter.grad, f"{case}/grad_{name}", TABLE)


@pytest.mark.parametrize("case", GUIDANCE)
def test_guidance(case: str) -> None:
    scale, orthogonal = re.search(r"guided([\d.]+)_orth([\d.]+)", case).groups()
    guided = guided_velocity(DATA["cfg/pos"], DATA["cfg/neg"], float(scale), float(orthogonal))
    assert_close(guided, case, STATE)
