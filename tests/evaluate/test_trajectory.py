"""Errors along the way: zero for the teacher's own steps, and what can be computed by hand for others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from fewstep.evaluate.generation import measure_trajectories
from fewstep.evaluate.trajectory import trajectory_errors
from fewstep.student import FewStepPipeline, resolve_student
from fewstep.workflow.evaluation import of_prompts


@pytest.fixture(scope="module")
def pipe() -> FewStepPipeline:
    return FewStepPipeline.from_pretrained(resolve_student("emoji-student").folder)


CAPTIONS = ["red heart, noto style", "owl, fluent style"]


def test_the_reference_is_no_way_from_itself_and_few_steps_are_farther_the_fewer(
    pipe: FewStepPipeline,
) -> None:
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    errors = trajectory_errors(pipe, noise, pipe.encode(CAPTIONS), 16, [4], [2, 4, 16])
    assert set(errors) == {"student_4", "euler_2", "euler_4", "euler_16"}
    assert all(distance < 1e-9 for _, distance in errors["euler_16"])
    assert errors["euler_2"][-1][1] > errors["euler_4"][-1][1] > errors["student_4"][-1][1] > 0
    for points in errors.values():
        sigmas = [sigma for sigma, _ in points]
        assert sigmas == sorted(sigmas, reverse=True)
        assert sigmas[-1] == 0.0
    teacher = pipe.sample_teacher(noise, pipe.encode(CAPTIONS), 16)
    student = pipe.sample(noise, pipe.encode(CAPTIONS), pipe.sampler_for((3, 16, 16)))
    assert errors["student_4"][-1][1] == pytest.approx(float((student - teacher).square().mean()), rel=1e-4)


def test_a_student_that_renews_noise_follows_no_trajectory(
    tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tiny_data, tiny_teacher, "train.steps=1", "sampler.nfe=2", "sampler.h=1")
    tiny.train_here(recipe, tmp_path)
    pipe = FewStepPipeline.from_pretrained(tmp_path)
    noise = torch.randn(1, *tiny.SHAPE)
    assert set(trajectory_errors(pipe, noise, pipe.encode(CAPTIONS[:1]), 4, [2], [2])) == {"euler_2"}


@pytest.mark.slow
def test_the_cluster_measures_all_captions(pipe: FewStepPipeline, ray_cluster: str) -> None:
    student = resolve_student("emoji-student").folder
    batch = of_prompts(pipe.card, [f"thing {number}, noto style" for number in range(34)])
    found = measure_trajectories(student, batch, 8, [4], [4])
    assert set(found) == {"student_4", "euler_4"}
    assert len(found["euler_4"]) == 4
    first = measure_trajectories(student, batch.head(32), 8, [4], [4])
    for name, points in found.items():
        # Two captions more move the mean of 32 by little.
        assert 0 < points[-1][1] != first[name][-1][1] == pytest.approx(points[-1][1], rel=0.2)
