"""A teacher's own sampler runs at the times of its own pipeline."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from fewstep.flow import TimeShift, euler
from fewstep.models.own_schedule import OwnSchedule, samples_by_euler
from fewstep.models.qwen_image import QwenImage
from fewstep.models.registry import get_family
from fewstep.models.teacher import own_scheduler

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
QWEN = EULER | {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
"""Settings of Qwen-Image's scheduler."""


class LeavesSigmas(QwenImage):
    """A family whose pipeline leaves σ to the scheduler, as SD3's does."""

    passes_sigmas = False


def test_qwen_images_schedule_ends_at_its_terminal_sigma() -> None:
    sigmas = OwnSchedule(QWEN, get_family("qwen_image"), 4096).sigmas(50)
    assert len(sigmas) == 51
    # e^mu is 2.0 for 4,096 tokens; the stretch to the last σ moves the middle little.
    shifted = TimeShift(2.0).sigmas(50)
    assert (sigmas[:25] - shifted[:25]).abs().max() < 0.02
    assert sigmas[-2].item() == pytest.approx(0.02)
    assert sigmas[-1] == 0


def test_one_step_goes_from_noise_to_data() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the stretch to a terminal σ would divide 0 by 0
        assert OwnSchedule(QWEN, get_family("qwen_image"), 4096).sigmas(1).tolist() == [1, 0]


def test_sigmas_that_a_pipeline_leaves_to_its_scheduler_are_shifted_twice_at_the_end() -> None:
    fixed = EULER | {"shift": 3.0}
    given = OwnSchedule(fixed, get_family("qwen_image"), 64).sigmas(4)
    assert given.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    left = OwnSchedule(fixed, LeavesSigmas(), 64).sigmas(4)
    assert left.tolist() == pytest.approx([1, 0.858, 0.602, 0.0089, 0], abs=1e-3)


def test_flux2_shift_depends_on_the_steps_up_to_4300_tokens() -> None:
    dynamic, family = EULER | {"use_dynamic_shifting": True}, get_family("flux2")
    odds = {
        (tokens, steps): (sigma / (1 - sigma) / (steps - 1)).item()
        for tokens in (4290, 4301)
        for steps in (4, 50)
        if (sigma := OwnSchedule(dynamic, family, tokens).sigmas(steps)[1]) is not None
    }
    assert odds[4290, 4] == pytest.approx(10.05, rel=0.01)
    assert odds[4290, 50] == pytest.approx(7.7, rel=0.01)
    assert odds[4301, 4] == pytest.approx(odds[4301, 50], rel=1e-3)


def test_euler_takes_the_steps_of_a_schedule() -> None:
    seen: list[float] = []
    schedule = OwnSchedule(QWEN, get_family("qwen_image"), 1024)
    euler(
        lambda x, s: (seen.append(s[0].item()), torch.ones_like(x))[1], torch.zeros(1, 1, 2, 2), 5, schedule
    )
    assert seen == pytest.approx(schedule.sigmas(5)[:-1].tolist())


def test_the_scheduler_is_found_beside_a_network_and_beside_its_pipeline(tmp_path: Path) -> None:
    network = tmp_path / "transformer"
    (tmp_path / "scheduler").mkdir()
    network.mkdir()
    (network / "config.json").write_text("{}")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(QWEN))
    for path in (tmp_path, network):
        assert own_scheduler(str(path)) == QWEN
    assert own_scheduler("emoji") is None
    assert samples_by_euler(QWEN)
    assert not samples_by_euler({"_class_name": "UniPCMultistepScheduler"})
    assert not samples_by_euler(None)
