"""Requests by class: accepted where a model knows classes, and refused with one sentence everywhere else."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fewstep.data.labels import LabelEncoder
from serve.generator import Generator
from serve.schema import ImageRequest, Order, Refusal


def request(**body: Any) -> ImageRequest:
    return ImageRequest.model_validate(body)


class Engine:
    """Checks prompts as the real one does, and remembers what it was asked for."""

    def __init__(self, encoder: str) -> None:
        self.encoder, self.prompts = encoder, []

    async def generate(self, model, tasks, **options):
        self.prompts = [task.prompt for task in tasks]
        if self.encoder.startswith("labels:"):
            LabelEncoder(self.encoder).check(self.prompts)
        return [SimpleNamespace(seed=task.seed, pixels=np.zeros((2, 2, 3), np.uint8)) for task in tasks]


def drawn(encoder: str, prompt: str, label: int | str | None) -> list[str] | Refusal:
    """What a model of this encoder was asked to draw, or why it was not."""
    generator = object.__new__(Generator.func_or_class)
    card = SimpleNamespace(text_encoder=encoder, nfe=1)
    model = SimpleNamespace(
        name="m", pipeline=SimpleNamespace(card=card), latent_shape=lambda size: (1, 2, 2)
    )

    async def get(name: str):
        return model

    generator._store, generator._engine = SimpleNamespace(get=get, default="m"), Engine(encoder)
    generator._deliver = lambda order, model, steps, images: generator._engine.prompts
    order = Order("id", None, prompt, 2, 0, None, None, None, "student", "png", 100, class_label=label)
    return asyncio.run(generator._draw(order))


def test_a_class_by_number_or_name_needs_no_prompt() -> None:
    assert request(class_label=7).class_label == 7
    assert request(class_label="ankle boot").class_label == "ankle boot"
    with pytest.raises(ValidationError, match="prompt"):
        request(seed=1)
    for wrong in (-1, "", 1.5, ["bag"]):
        with pytest.raises(ValidationError, match="class_label"):
            request(prompt="x", class_label=wrong)


@pytest.mark.parametrize(
    ("prompt", "label", "expected"), [("x", 7, "7"), ("x", "bag", "bag"), ("sneaker", None, "sneaker")]
)
def test_a_class_conditional_model_draws_the_class(
    prompt: str, label: int | str | None, expected: str
) -> None:
    assert drawn("labels:fashion-mnist", prompt, label) == [expected] * 2


def test_an_unknown_class_is_refused_where_it_was_said() -> None:
    by_label = drawn("labels:fashion-mnist", "x", 10)
    assert (by_label.status, by_label.code, by_label.param) == (400, "invalid_value", "class_label")
    assert "no class '10'" in by_label.message
    by_prompt = drawn("labels:fashion-mnist", "sneakers", None)
    assert (by_prompt.status, by_prompt.param) == (400, "prompt")
    assert "the nearest is 'sneaker'" in by_prompt.message


def test_a_text_model_takes_no_class() -> None:
    refusal = drawn("minilm", "owl", 3)
    assert (refusal.status, refusal.param) == (400, "class_label")
    assert "leave class_label out" in refusal.message
    assert drawn("minilm", "owl", None) == ["owl"] * 2
