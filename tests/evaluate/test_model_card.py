"""A student's model card says what is known of it, and nothing of the machine that made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from fewstep.assets import asset
from fewstep.evaluate.model_card import model_card
from fewstep.student import StudentCard, read_student_card

EMOJI = asset("emoji_student")
ADAPTERS = Path(__file__).parents[1] / "conformance" / "adapters"
FRONT = "---\nlicense: other\nlicense_name: house-licence\nlicense_link: {link}\n---\n\n# A teacher\n"


def changed(card: StudentCard, **teacher: Any) -> StudentCard:
    """The card with other entries of its teacher."""
    return StudentCard.model_validate(card.model_dump() | {"teacher": card.model_dump()["teacher"] | teacher})


def made(card: StudentCard, folder: Path = EMOJI) -> ModelCard:
    """The model card, as it is read back from its text."""
    return ModelCard(str(model_card(folder, card, "team/student")))


@pytest.fixture
def emoji() -> StudentCard:
    return read_student_card(EMOJI)


def test_a_teacher_and_loras_of_the_hub_are_the_base(emoji: StudentCard, tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").touch()
    loras = [
        {"path": "team/style/inner@v2", "scale": 0.8},
        {"path": str(tmp_path / "mine.safetensors"), "scale": 1},
    ]
    card = made(changed(emoji, path="team/base@v1", sha256=None, loras=loras))
    assert card.data.base_model == ["team/base", "team/style"]
    assert card.data.base_model_relation == "adapter"
    assert "| teacher | [team/base@v1](https://huggingface.co/team/base), family `qwen_image` |" in card.text
    assert "[team/style/inner@v2](https://huggingface.co/team/style), scale 0.8 |" in card.text
    assert "| `mine.safetensors`, scale 1 |" in card.text
    assert str(tmp_path) not in card.content


def test_a_teacher_that_lay_on_another_machine_is_none_of_the_hub(emoji: StudentCard) -> None:
    card = made(
        changed(emoji, path="models/teacher", loras=[{"path": "styles/mine.safetensors", "scale": 1}])
    )
    assert card.data.base_model is None
    assert card.data.get("base_model_relation") is None
    assert "| teacher | `teacher`, family" in card.text
    assert "models/teacher" not in card.content
    assert "styles/" not in card.content


def test_a_student_by_class_says_so() -> None:
    folder = asset("fashion_student")
    card = made(read_student_card(folder), folder)
    assert card.data.pipeline_tag is None, "the hub has no such task"
    assert {"frechet", "accuracy"} < {result.metric_type for result in card.data.eval_results}
    assert "96.9%" in card.text
    assert "| weights | its own |" in card.text
    assert "DiffusionPipeline" not in card.text, "there is none of this family"


def test_a_dx_student_says_so(emoji: StudentCard) -> None:
    assert "| policy | DX |" in made(emoji, ADAPTERS / "qwen_dx_adapter").text


@pytest.mark.parametrize("place", [".", "transformer"])
def test_the_licence_is_that_of_the_teachers_own_card(place: str, emoji: StudentCard, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline" / place
    shutil.copytree(ADAPTERS / "qwen_base", folder)
    card = changed(emoji, path=str(folder), sha256="0" * 64)
    (tmp_path / "README.md").write_text(FRONT.format(link="https://other.example"))  # of something else
    assert made(card).data.license is None
    for link, kept in (
        ("https://house.example/licence", "https://house.example/licence"),
        ("LICENSE.md", None),
    ):
        (tmp_path / "pipeline" / "README.md").write_text(FRONT.format(link=link))
        said = made(card)
        assert (said.data.license, said.data.get("license_name")) == ("other", "house-licence")
        assert said.data.get("license_link") == kept
        assert "The teacher's card says `other`" in said.text
    # A LoRA may have another.
    assert made(changed(card, loras=[{"path": "team/style", "scale": 1}])).data.license is None


@pytest.mark.parametrize("content", ["# no metadata\n", "---\n[broken: {\n---\n", "---\n- list\n---\n", ""])
def test_a_teachers_card_that_says_no_licence_is_none(
    content: str, emoji: StudentCard, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(content)
    card = made(changed(emoji, path=str(tmp_path), sha256="0" * 64))
    assert card.data.license is None
    assert "Not known" in card.text


def test_a_card_without_figures_and_recipe_says_so(emoji: StudentCard) -> None:
    card = made(emoji.model_copy(update={"metrics": {"loss": 1.0}, "recipe": {}}))
    assert card.data.eval_results is None
    assert "This student has not been evaluated." in card.text
    assert "The student's card holds no recipe." in card.text


def test_all_numbers_of_evaluations_are_named(emoji: StudentCard) -> None:
    sampler = json.loads(emoji.sampler.model_dump_json()) | {"nfe": 4, "more_nfes": [2]}
    card = StudentCard.model_validate(emoji.model_dump() | {"sampler": sampler})
    assert "| network evaluations (NFE) | 4; trained for 2, 4 |" in made(card).text
