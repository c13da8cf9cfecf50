"""The objectives that π-ID is compared with run through the same recipe, checkpoints, export and pipeline."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

import tiny
from fewstep.data.schema import DatasetInfo
from fewstep.data.stream import ShardStream
from fewstep.encoders import load_encoder
from fewstep.student import FewStepPipeline
from fewstep.train.checkpoint import load_tensors
from fewstep.train.learner import Learner
from fewstep.train.progress import LossMeter
from fewstep.train.recipe import DistillRecipe

NEAR = {"rtol": 1e-3, "atol": 1e-5}
"""Weights after three steps whose sums were taken in another order; a step changes them by some 1e-4."""
ONE_IMAGE = "student.policy={type: dx, points: 1}"
OBJECTIVES = {
    "consistency": ["objective=consistency", ONE_IMAGE, "consistency.step=0.1"],
    "continuous consistency": ["objective=consistency", ONE_IMAGE, "consistency.continuous=true"],
    "dmd2": ["objective=dmd2", ONE_IMAGE, "dmd2.critic_steps=1"],
    "dmd2 of all weights": ["objective=dmd2", ONE_IMAGE, "student.full=true", "student.lora=null"],
    "dmd2 of a mixture": ["objective=dmd2", "dmd2.last_segment=true"],
    "meanflow": ["objective=meanflow", "student.policy={type: dx, points: 4}"],
    "regression": ["objective=regression", ONE_IMAGE],
    "regression without data": ["objective=regression", ONE_IMAGE, "regression.data_free=true"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_student_of_each_objective_is_trained_and_draws(
    name: str, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tiny_data, tiny_teacher, "train.steps=12", "sampler.nfe=2", *OBJECTIVES[name])
    metrics = tiny.train_here(recipe, tmp_path)
    assert all(math.isfinite(one["train/loss"]) for one in metrics)
    pipe = FewStepPipeline.from_pretrained(tmp_path)
    assert pipe.card.sampler.nfe == 2
    [image] = pipe("small thing 1", output_type="np", seed=0).images
    assert np.isfinite(image).all()


@pytest.mark.parametrize(
    "name",
    [
        "meanflow",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("consistency", "regression", "regression without data")
        ),
    ],
)
def test_the_student_comes_nearer_to_the_teacher(
    name: str, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    def distance(steps: int) -> float:
        settings = ["optimizer.lr=1e-3", *OBJECTIVES[name]]
        recipe = tiny.recipe(tiny_data, tiny_teacher, f"train.steps={steps}", "sampler.nfe=2", *settings)
        tiny.train_here(recipe, tmp_path / str(steps))
        pipe = FewStepPipeline.from_pretrained(tmp_path / str(steps))
        conditions = pipe.encode([f"small thing {index}" for index in range(8)])
        noise = torch.randn(8, *tiny.SHAPE, generator=torch.Generator().manual_seed(0))
        return float(
            (pipe.sample(noise, conditions, pipe.card.sampler) - pipe.sample_teacher(noise, conditions, 32))
            .square()
            .mean()
        )

    assert distance(150) < 0.8 * distance(1)


def learner_of(recipe: DistillRecipe, rank: int = 0) -> Learner:
    encoding = DatasetInfo.open(recipe.data.path).encoding
    encoder = load_encoder(encoding.text_encoder, max_tokens=encoding.max_tokens)
    return Learner(recipe, encoder.null(), torch.device("cpu"), rank, recipe.train.fewest_workers)


def train(learner: Learner, steps: range) -> None:
    """The steps after the first ones, of the stream from there on."""
    recipe = learner.recipe
    stream = ShardStream(
        recipe.data.path, "train", batch_size=recipe.data.batch_size, seed=recipe.train.seed,
        parts=learner.share.parts, reading="threads", start_batch=steps.start - 1,
    )  # fmt: skip
    batches = iter(stream)
    for step in steps:
        learner.set_lr(step)
        learner.step(step, batches, LossMeter(learner.device))
    batches.close()


@pytest.mark.parametrize("name", ["dmd2", "consistency"])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(
    name: str, tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    # After an odd number of steps: only one of DMD2's networks has been trained once.
    recipe = tiny.recipe(tiny_data, tiny_teacher, "train.steps=6", *OBJECTIVES[name])
    first = learner_of(recipe)
    train(first, range(1, 4))
    dcp.save(first.tensors(), checkpoint_id=str(tmp_path / "c"))
    train(first, range(4, 7))
    second = learner_of(recipe)
    load_tensors(second.tensors(), tmp_path / "c")
    train(second, range(4, 7))
    for key, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[key]), key


def test_dmd2_trains_its_networks_in_turns(tiny_data: Path, tiny_teacher: Path) -> None:
    learner = learner_of(tiny.recipe(tiny_data, tiny_teacher, "train.steps=6", *OBJECTIVES["dmd2"]))

    def changed(steps: range) -> set[bool]:
        before = {name: value.detach().clone() for name, value in learner.parameters.items()}
        train(learner, steps)
        moved = [name for name, value in learner.parameters.items() if not torch.equal(value, before[name])]
        return {name.startswith("critic.") for name in moved}

    assert changed(range(1, 2)) == {True}
    assert changed(range(2, 3)) == {False}
    assert changed(range(3, 4)) == {True}


def train_sharded(rank: int, recipes: dict[str, DistillRecipe], folder: str) -> None:
    """One of two ranks' work: three steps of each recipe, whose weights are kept in a checkpoint of both."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name, recipe in recipes.items():
        learner = learner_of(recipe, rank)
        train(learner, range(1, 4))
        dcp.save(learner.tensors(), checkpoint_id=f"{folder}/{name}")
    dist.destroy_process_group()


def test_sharded_workers_train_as_one_that_is_alone(
    tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """All networks of an objective are sharded, DMD2's fake score among them."""
    settings = {
        name: ["train.steps=6", "train.accumulate=1", *objective] for name, objective in OBJECTIVES.items()
    }
    both = {
        name: tiny.recipe(tiny_data, tiny_teacher, *own, "train.workers=2", "train.parallel=fsdp")
        for name, own in settings.items()
    }
    mp.spawn(train_sharded, (both, str(tmp_path)), nprocs=2)
    for name, own in settings.items():
        recipe = tiny.recipe(tiny_data, tiny_teacher, *own, "train.accumulate=2")
        alone, sharded = learner_of(recipe), learner_of(recipe)
        moved = [parameter.detach().clone() for parameter in alone.parameters.values()]
        train(alone, range(1, 4))
        load_tensors(sharded.tensors(), tmp_path / name)
        for key, parameter in alone.parameters.items():
            torch.testing.assert_close(sharded.parameters[key], parameter, **NEAR, msg=f"{name}: {key}")
        assert not all(map(partial(torch.allclose, **NEAR), moved, alone.parameters.values())), name
