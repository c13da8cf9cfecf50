"""What a teacher drew is found again by its other students, and by nothing that would have drawn differently."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data.stream import Batch
from fewstep.evaluate.teacher_images import TeacherImages
from fewstep.export.pipeline import StudentCard
from fewstep.models.conditioning import TextConditioning
from fewstep.models.teacher import TeacherReference

CARD = StudentCard(
    TeacherReference("somewhere", "dit", "0" * 64), "labels:2", "grey", (1, 4, 4), nfe=1, shift=1.0,
    final_step_scale=1.0, substeps=128, temperature=1.0, guidance=2.0,
)  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def batch(*captions: str) -> Batch:
    conditioning = TextConditioning.collate([torch.zeros(1, 1) for _ in captions])
    return Batch(None, conditioning, list(captions), list(captions), (1, 4, 4))


def test_another_student_of_the_teacher_finds_them() -> None:
    TeacherImages.of(CARD, batch("a", "b"), 0).save(64, 1, IMAGES)
    other = replace(CARD, nfe=2, shift=3.2, teacher_shift=1.0, recipe={"name": "other"})
    assert np.array_equal(TeacherImages.of(other, batch("a", "b"), 0).load(64, 1), IMAGES)


@pytest.mark.parametrize(
    ("card", "captions", "seed", "steps", "noise"),
    [
        (replace(CARD, teacher=replace(CARD.teacher, sha256="1" * 64)), ("a", "b"), 0, 64, 1),
        (replace(CARD, guidance=3.0), ("a", "b"), 0, 64, 1),
        (replace(CARD, guidance_interval=(0.0, 0.7)), ("a", "b"), 0, 64, 1),
        (replace(CARD, teacher_shift=3.2), ("a", "b"), 0, 64, 1),
        (CARD, ("b", "a"), 0, 64, 1),
        (CARD, ("a", "b"), 1, 64, 1),
        (CARD, ("a", "b"), 0, 32, 1),
        (CARD, ("a", "b"), 0, 64, 0),
    ],
)
def test_whatever_would_be_drawn_differently_is_not_found(card, captions, seed, steps, noise) -> None:
    TeacherImages.of(CARD, batch("a", "b"), 0).save(64, 1, IMAGES)
    assert TeacherImages.of(card, batch(*captions), seed).load(steps, noise) is None


def test_a_hub_id_is_no_exact_teacher() -> None:
    hub = replace(CARD, teacher=replace(CARD.teacher, sha256=None))
    TeacherImages.of(hub, batch("a", "b"), 0).save(64, 1, IMAGES)
    assert TeacherImages.of(hub, batch("a", "b"), 0).load(64, 1) is None


def test_a_torn_file_is_drawn_again() -> None:
    images = TeacherImages.of(CARD, batch("a", "b"), 0)
    images.save(64, 1, IMAGES)
    [file] = images.folder.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert images.load(64, 1) is None
