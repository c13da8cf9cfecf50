"""Compiled blocks compute what plain ones do, in both roles of the shared network."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.data.stream import read_split
from fewstep.encoders import load_encoder
from fewstep.train.objectives import build_objective
from fewstep.train.parallel import shard
from fewstep.train.recipe import DistillRecipe, load_recipe


def test_compiled_blocks_learn_the_same(tiny_data: Path, tiny_teacher: Path) -> None:
    batch, null = read_split(str(tiny_data), "train", 4), load_encoder().null()
    results = []
    for backend in ("null", "aot_eager"):
        overrides = [f"teacher.path={tiny_teacher}", "student.lora={rank: 4}", f"train.compile={backend}"]
        recipe = load_recipe(DistillRecipe, None, overrides)
        objective = build_objective(recipe, null, torch.device("cpu"))
        shard(objective, recipe.train, world_size=1)
        objective.read_weights(torch.device("cpu"))
        [result] = objective.losses(batch, torch.Generator().manual_seed(0), 1)
        result.loss.backward()
        results.append([result.loss.detach(), *(p.grad for p in objective.parameters().values())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-3)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted >= 2, "both roles went through the compiler"
