"""Precisions that a training can't do are refused before it starts."""

from __future__ import annotations

import pytest

from fewstep.errors import UserError
from fewstep.models import precision as precisions
from fewstep.train import validation as checks
from fewstep.train.recipe import DistillRecipe, TeacherRecipe, load_recipe


def distillation(*overrides: str) -> DistillRecipe:
    return load_recipe(DistillRecipe, None, list(overrides))


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_a_cpu_without_bfloat16_refuses_it_before_training(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = distillation(f"train.precision={precision}")
    monkeypatch.setattr(precisions, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(UserError, match=rf"train\.precision {precision}: this CPU has no bfloat16.*float32"):
        checks._check_precision(recipe)
    checks._check_precision(distillation(f"train.precision={precision}", "train.gpu=true"))
    monkeypatch.setattr(precisions, "cpu_has_bfloat16", lambda: True)
    checks._check_precision(recipe)


def test_quantised_weights_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "cpu_has_bfloat16", lambda: True)
    two = ("train.precision=int8", "train.workers=2")
    with pytest.raises(UserError, match=r"FSDP does not shard quantised weights: set train\.parallel=ddp"):
        checks._check_precision(distillation(*two))
    checks._check_precision(distillation(*two, "train.parallel=ddp"))
    checks._check_precision(distillation("train.precision=bfloat16", "train.workers=2"))


def test_a_teacher_whose_weights_are_trained_is_not_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "cpu_has_bfloat16", lambda: True)
    with pytest.raises(UserError, match="a teacher's weights are all trained: set it to bfloat16 or float32"):
        checks._check_precision(load_recipe(TeacherRecipe, None, ["train.precision=int4"]))
