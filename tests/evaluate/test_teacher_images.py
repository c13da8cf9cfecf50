"""What a teacher generated is found again by its other students, and by nothing that would have generated otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data.datasets import EMOJI_DATA
from fewstep.data.datasets.bundled import open_data
from fewstep.data.stream import Batch, read_split
from fewstep.evaluate.generation import Method, generate_images
from fewstep.evaluate.teacher_images import TeacherImages
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep.models.conditioning import ClassConditioning
from fewstep.models.teacher import TeacherReference
from fewstep.student import StudentCard, read_student_card, resolve_student
from fewstep.train.recipe import EvaluationConfig

CARD = StudentCard(
    teacher=TeacherReference("somewhere", "dit", "0" * 64),
    text_encoder="labels:2",
    autoencoder="grey",
    latent_shape=(1, 4, 4),
    sampler=SamplerConfig(nfe=1, shift=1.0, final_step_scale=1.0),
    teacher_sampler=TeacherSamplerConfig(guidance_scale=2.0),
)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def changed(section: str, **changes: Any) -> StudentCard:
    """The card with some settings of one of its parts replaced."""
    part = getattr(CARD, section)
    new = replace(part, **changes) if section == "teacher" else part.model_copy(update=changes)
    return CARD.model_copy(update={section: new})


def batch(*captions: str) -> Batch:
    conditioning = ClassConditioning(torch.zeros(len(captions), dtype=torch.int64))
    return Batch(None, conditioning, list(captions), list(captions), (1, 4, 4))


def test_another_student_of_the_teacher_finds_them() -> None:
    TeacherImages.of(CARD, batch("a", "b"), 0).save(64, 1, IMAGES)
    other = CARD.model_copy(
        update={
            "sampler": SamplerConfig(nfe=2, shift=3.2),
            "teacher_sampler": TeacherSamplerConfig(guidance_scale=2.0, shift=1.0),
            "recipe": {"name": "other"},
        }
    )
    assert np.array_equal(TeacherImages.of(other, batch("a", "b"), 0).load(64, 1), IMAGES)


@pytest.mark.parametrize(
    ("card", "captions", "seed", "steps", "noise"),
    [
        (changed("teacher", sha256="1" * 64), ("a", "b"), 0, 64, 1),
        (changed("teacher_sampler", guidance_scale=3.0), ("a", "b"), 0, 64, 1),
        (changed("teacher_sampler", guidance_interval=(0.0, 0.7)), ("a", "b"), 0, 64, 1),
        (changed("teacher_sampler", shift=3.2), ("a", "b"), 0, 64, 1),
        (changed("teacher_sampler", orthogonal=0.5), ("a", "b"), 0, 64, 1),
        (CARD, ("b", "a"), 0, 64, 1),
        (CARD, ("a", "b"), 1, 64, 1),
        (CARD, ("a", "b"), 0, 32, 1),
        (CARD, ("a", "b"), 0, 64, 0),
    ],
)
def test_whatever_would_be_generated_otherwise_is_not_found(card, captions, seed, steps, noise) -> None:
    TeacherImages.of(CARD, batch("a", "b"), 0).save(64, 1, IMAGES)
    assert TeacherImages.of(card, batch(*captions), seed).load(steps, noise) is None


@pytest.mark.parametrize(
    ("student", "identity"),
    [("emoji-student", "041a1f79e74dc147"), ("fashion-student", "470905d438a7acca")],
)
def test_images_kept_by_earlier_versions_are_still_found(student: str, identity: str) -> None:
    """The identities that version 0.1.0 gave, before the card's fields moved."""
    card = read_student_card(resolve_student(student).folder)
    captions = replace(batch("a", "b"), shape=card.latent_shape)
    assert TeacherImages.of(card, captions, 0).identity == identity


def test_a_hub_id_is_no_exact_teacher() -> None:
    hub = changed("teacher", sha256=None)
    TeacherImages.of(hub, batch("a", "b"), 0).save(64, 1, IMAGES)
    assert TeacherImages.of(hub, batch("a", "b"), 0).load(64, 1) is None


def test_a_torn_file_is_generated_again() -> None:
    images = TeacherImages.of(CARD, batch("a", "b"), 0)
    images.save(64, 1, IMAGES)
    [file] = images.folder.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert images.load(64, 1) is None


def test_the_bundled_images_are_what_the_bundled_teacher_draws(ray_cluster: str) -> None:
    info = open_data(EMOJI_DATA)
    held_out = read_split(info.root, "held_out", EvaluationConfig().captions)
    student = resolve_student("emoji-student").folder
    kept = TeacherImages.of(read_student_card(student), held_out, 0)
    for steps, noise in ((64, 0), (64, 1), (16, 0), (8, 0), (4, 0), (2, 0)):
        images = kept.load(steps, noise)
        assert images is not None, "the main job's evaluation has changed: see the module"
        assert images.shape == (len(held_out), 16, 16, 3)
    first = replace(
        held_out, conditioning=held_out.conditioning[slice(2)], captions=held_out.captions[:2], keys=held_out.keys[:2],
        latent=None,
    )  # fmt: skip
    drawn = generate_images(student, first, [Method("euler_4", 4), Method("other", 64, noise=1)])
    for method, (steps, noise) in {"euler_4": (4, 0), "other": (64, 1)}.items():
        # Another processor may round to the next of 256 levels.
        assert np.abs(drawn[method].astype(int) - kept.load(steps, noise)[:2]).max() <= 1
