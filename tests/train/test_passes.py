"""The passes that a recipe is said to take are those that its steps take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fewstep.data.schema import DatasetInfo
from fewstep.data.stream import ShardStream
from fewstep.encoders import load_encoder
from fewstep.train.learner import Learner
from fewstep.train.passes import passes_of
from fewstep.train.progress import LossMeter

IMAGES = "student.policy={type: dx, points: 2}"
OBJECTIVES = {
    "imitation": ["imitation.intermediate_states=3"],
    "imitation without guidance": ["teacher.guidance_scale=1"],
    "imitation without data": ["imitation.data_free=true", "sampler.more_nfes=[4]"],
    "regression by Heun's method": ["objective=regression", "regression.solver=heun", "regression.steps=2"],
    "regression without data": ["objective=regression", "regression.data_free=true"],
    "consistency": ["objective=consistency"],
    "continuous consistency": ["objective=consistency", "consistency.continuous=true"],
    "meanflow": ["objective=meanflow"],
    "dmd2": ["objective=dmd2", "dmd2.critic_steps=2"],
    "dmd2 of the last segment": ["objective=dmd2", "dmd2.critic_steps=1", "dmd2.last_segment=true"],
}
STEPS = 12
"""A whole number of turns of every objective."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_passes_are_those_of_real_steps(name: str, tiny_data: Path, tiny_teacher: Path) -> None:
    recipe = tiny.recipe(
        tiny_data, tiny_teacher, f"train.steps={STEPS}", "sampler.nfe=2", IMAGES, *OBJECTIVES[name]
    )
    encoding = DatasetInfo.open(recipe.data.path).encoding
    null = load_encoder(encoding.text_encoder, max_tokens=encoding.max_tokens).null()
    learner = Learner(recipe, null, torch.device("cpu"))
    counted = {True: 0, False: 0}

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states = kwargs.get("hidden_states", args[0] if args else None)
        counted[torch.is_grad_enabled()] += len(states)

    for model in learner.objective.models:
        for network in model.transformers():
            learner.objective.family.blocks(network)[0].register_forward_pre_hook(count, with_kwargs=True)
    stream = ShardStream(
        recipe.data.path, "train", batch_size=recipe.data.batch_size, seed=0, parts=learner.share.parts,
        reading="threads",
    )  # fmt: skip
    batches = iter(stream)
    for step in range(1, STEPS + 1):
        learner.step(step, batches, LossMeter(learner.device))
    batches.close()

    passes, samples = passes_of(recipe), STEPS * recipe.data.batch_size
    assert counted[True] / samples == pytest.approx(passes.with_gradient)
    assert counted[False] / samples == pytest.approx(passes.forward + passes.teacher)
