"""An evaluation compares the right methods, counts their passes, and leaves its pictures and figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fewstep.student import read_student_card, resolve_student, write_student_card
from fewstep.train.recipe import EvaluationConfig
from fewstep.workflow.evaluation import evaluate, summary


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """The bundled student as one of 4 and 2 evaluations."""
    folder = Path(shutil.copytree(resolve_student("emoji-student").folder, tmp_path / "student"))
    card = read_student_card(folder)
    sampler = card.sampler.model_copy(update={"nfe": 4, "more_nfes": (2,)})
    write_student_card(card.model_copy(update={"sampler": sampler}), folder)
    return folder


def test_a_student_is_compared_with_its_teachers_reference_and_baseline(
    student, data, fake_images, tmp_path
) -> None:
    config = EvaluationConfig(captions=8, reference_steps=64, baseline_steps=(2, 4, 8))
    results = tmp_path / "results"
    report = evaluate(student, str(data), config, results)

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
    report = evaluate(student, str(data), EvaluationConfig(captions=8), tmp_path / "results")
    assert (report.row("teacher_64").passes, report.row("euler_8").passes) == (64, 8)


def test_the_summary_holds_the_table_and_the_criteria(student, data, fake_images, tmp_path) -> None:
    report = evaluate(student, str(data), EvaluationConfig(captions=8), tmp_path / "results")
    text = summary(report, "quick")
    assert "student, 4 evaluations" in text
    assert "MISSED  measured on at least 384 captions: 8 against 384" in text
