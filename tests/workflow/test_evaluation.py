"""An evaluation compares the right methods, counts their passes, and leaves its pictures and figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fewstep.data.stream import Batch
from fewstep.errors import UserError
from fewstep.student import read_student_card, resolve_student, write_student_card
from fewstep.train.recipe import EvaluationConfig
from fewstep.workflow.evaluation import evaluate, held_out, of_prompts, summary, write_page


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """The bundled student as one of 4 and 2 evaluations."""
    folder = Path(shutil.copytree(resolve_student("emoji-student").folder, tmp_path / "student"))
    card = read_student_card(folder)
    sampler = card.sampler.model_copy(update={"nfe": 4, "more_nfes": (2,)})
    write_student_card(card.model_copy(update={"sampler": sampler}), folder)
    return folder


def captions(student: Path, data: Path, count: int) -> Batch:
    return held_out(read_student_card(student), str(data), count)


def test_a_student_is_compared_with_its_teachers_reference_and_baseline(
    student, data, fake_images, tmp_path
) -> None:
    config = EvaluationConfig(captions=8, reference_steps=64, baseline_steps=(2, 4, 8))
    results = tmp_path / "results"
    report = evaluate(student, captions(student, data, 8), config, results)

    asked = {(method.name, method.steps, method.student, method.noise) for method in fake_images.methods}
    assert asked == {
        ("teacher_64", 64, False, 0),
        ("independent", 64, False, 1),
        ("student_4", 4, True, 0),
        ("student_2", 2, True, 0),
        ("euler_2", 2, False, 0),
        ("euler_4", 4, False, 0),
        ("euler_8", 8, False, 0),
    }
    assert (report.captions, report.teacher, report.student) == (8, "teacher_64", "student_4")
    assert read_student_card(student).teacher_sampler.guidance_scale > 1
    assert {row.name: row.passes for row in report.rows} == {
        "teacher_64": 128, "student_2": 2, "student_4": 4, "euler_2": 4, "euler_4": 8, "euler_8": 16,
    }  # fmt: skip
    assert all(row.kid_real is not None for row in report.rows), "the data has images"
    assert json.loads((results / "report.json").read_text())["captions"] == 8
    for picture in ("comparison.png", "quality.png"):
        with Image.open(results / picture) as image:
            assert min(image.size) > 100


def test_an_unguided_teacher_takes_one_pass_a_step(student, data, fake_images, tmp_path) -> None:
    card = read_student_card(student)
    unguided = card.teacher_sampler.model_copy(update={"guidance_scale": 1.0})
    write_student_card(card.model_copy(update={"teacher_sampler": unguided}), student)
    report = evaluate(student, captions(student, data, 8), EvaluationConfig(captions=8), tmp_path / "results")
    assert (report.row("teacher_64").passes, report.row("euler_8").passes) == (64, 8)


def test_the_summary_holds_the_table_and_the_criteria(student, data, fake_images, tmp_path) -> None:
    report = evaluate(student, captions(student, data, 8), EvaluationConfig(captions=8), tmp_path / "results")
    text = summary(report, "quick")
    assert "student, 4 evaluations" in text
    assert "MISSED  measured on at least 384 captions: 8 against 384" in text


def test_other_solvers_of_the_teacher_are_rows_of_their_own(student, data, fake_images, tmp_path) -> None:
    config = EvaluationConfig(captions=8, baseline_steps=(4, 8), solvers=("heun", "unipc"))
    report = evaluate(student, captions(student, data, 8), config, tmp_path)
    asked = {method.name: (method.steps, method.solver) for method in fake_images.methods}
    others = {name: how for name, how in asked.items() if how[1] != "euler"}
    # Heun's method takes two evaluations a step, but for the last.
    assert others == {
        "heun_3": (3, "heun"), "heun_7": (7, "heun"), "unipc_4": (4, "unipc"), "unipc_8": (8, "unipc")
    }  # fmt: skip
    assert {row.name: row.passes for row in report.rows if row.name in others} == {
        "heun_3": 6, "heun_7": 14, "unipc_4": 8, "unipc_8": 16
    }  # fmt: skip
    page = write_page(report, config, tmp_path, "a student")
    assert "teacher, 7 Heun evaluations" in page.read_text()


def brightness(images, captions):
    """A score of one's own."""
    assert len(images) == len(captions)
    return images.mean(axis=(1, 2, 3))


def test_own_scores_and_several_images_of_a_caption_are_measured(
    student, data, fake_images, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("fewstep.workflow.evaluation.CAPTIONS_OF_SEVERAL", 5)
    config = EvaluationConfig(
        captions=8, scores=("workflow.test_evaluation:brightness",), images_per_caption=3
    )
    report = evaluate(student, captions(student, data, 8), config, tmp_path / "results")
    assert {(method.name, method.noise) for method in fake_images.methods} >= {
        ("teacher_64:2", 2), ("teacher_64:4", 4), ("student_4:2", 2), ("euler_8:3", 3)
    }  # fmt: skip
    for row in report.rows:
        assert 0 < row.scores["brightness"] < 255
        assert row.prompt_diversity_ci[0] < row.prompt_diversity < row.prompt_diversity_ci[1]
        assert 1 <= row.prompt_vendi <= 3
    page = write_page(report, config, tmp_path / "results", "a student").read_text()
    assert "brightness" in page
    assert "Vendi per prompt" in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scores": ("nowhere:x",)}, "evaluation.scores: nowhere:x"),
        ({"scores": ("math:nothing",)}, "evaluation.scores: math:nothing"),
        ({"lpips": "/nowhere.pt"}, "evaluation.lpips: there is no file /nowhere.pt"),
        ({"clip": "/nowhere"}, "evaluation.clip: /nowhere"),
    ],
)
def test_a_judge_that_is_missing_is_told_before_anything_is_generated(
    student, data, fake_images, tmp_path, settings, said
) -> None:
    with pytest.raises(UserError, match=said):
        evaluate(
            student,
            captions(student, data, 8),
            EvaluationConfig(captions=8, **settings),
            tmp_path / "results",
        )
    assert not fake_images.methods


def test_prompts_of_ones_own_are_measured_without_real_images(student, fake_images, tmp_path) -> None:
    card = read_student_card(student)
    batch = of_prompts(card, ["a red heart", "an owl", "a very small red car"])
    assert batch.shape == card.latent_shape
    report = evaluate(student, batch, EvaluationConfig(), tmp_path)
    assert report.captions == 3
    assert all(row.kid_real is None and row.precision is None for row in report.rows)
    assert "3 captions" in write_page(report, EvaluationConfig(), tmp_path, "x").read_text()
