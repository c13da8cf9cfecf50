"""bfloat16 on CPUs: refused where it is emulated, close to float32 where it is not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.train import validation as checks
from fewstep.train.parallel import _bfloat16_products
from fewstep.train.recipe import DistillRecipe, load_recipe


def test_a_cpu_without_bfloat16_refuses_it_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(DistillRecipe, None, ["train.precision=bfloat16"])
    monkeypatch.setattr(checks, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(UserError, match=r"no bfloat16 arithmetic.*train\.precision=float32"):
        checks._check_precision(recipe.train)
    monkeypatch.setattr(checks, "cpu_has_bfloat16", lambda: True)
    checks._check_precision(recipe.train)
    checkpointing = recipe.train.model_copy(update={"activation_checkpointing": True})
    with pytest.raises(UserError, match=r"on CPUs it works in float32 alone"):
        checks._check_precision(checkpointing)


def test_products_are_bfloat16_and_attention_float32() -> None:
    x, weight = torch.randn(1, 2, 6, 8), torch.randn(8, 8)
    seen = {}

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen["product"] = F.linear(x, weight)
        seen["attention"] = F.scaled_dot_product_attention(*[seen["product"]] * 3)
        return seen["attention"]

    result = _bfloat16_products(forward)(x)
    assert seen["product"].dtype == torch.bfloat16
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, forward(x), rtol=0.05, atol=0.1)
