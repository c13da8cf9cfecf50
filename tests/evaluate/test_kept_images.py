"""What was generated is found again, and by nothing that would have generated otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.data.datasets import EMOJI64_DATA, EMOJI_DATA
from fewstep.data.datasets.bundled import open_data
from fewstep.data.stream import Batch, read_split
from fewstep.evaluate import kept_images
from fewstep.evaluate.generation import Method, discard_images, generate_images
from fewstep.evaluate.kept_images import KeptImages
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep.models.conditioning import ClassConditioning, TextConditioning
from fewstep.models.teacher import TeacherReference
from fewstep.student import StudentCard, read_student_card, resolve_student
from fewstep.train.recipe import EvaluationConfig
from fewstep.workflow.evaluation import of_prompts

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
    KeptImages.of_teacher(CARD, batch("a", "b"), 0).save(64, 1, IMAGES)
    other = CARD.model_copy(
        update={
            "sampler": SamplerConfig(nfe=2, shift=3.2),
            "teacher_sampler": TeacherSamplerConfig(guidance_scale=2.0, shift=1.0),
            "recipe": {"name": "other"},
        }
    )
    assert np.array_equal(KeptImages.of_teacher(other, batch("a", "b"), 0).load(64, 1), IMAGES)


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
    KeptImages.of_teacher(CARD, batch("a", "b"), 0).save(64, 1, IMAGES)
    assert KeptImages.of_teacher(card, batch(*captions), seed).load(steps, noise) is None


@pytest.mark.parametrize(
    ("student", "identity"),
    [("emoji-student", "041a1f79e74dc147"), ("fashion-student", "470905d438a7acca")],
)
def test_images_kept_by_earlier_versions_are_still_found(student: str, identity: str) -> None:
    """The identities that version 0.1.0 gave, before the card's fields moved."""
    card = read_student_card(resolve_student(student).folder)
    captions = replace(batch("a", "b"), shape=card.latent_shape)
    assert KeptImages.of_teacher(card, captions, 0).identity == identity


def test_a_hub_id_is_no_exact_teacher() -> None:
    hub = changed("teacher", sha256=None)
    KeptImages.of_teacher(hub, batch("a", "b"), 0).save(64, 1, IMAGES)
    assert KeptImages.of_teacher(hub, batch("a", "b"), 0).load(64, 1) is None


def test_a_torn_file_is_generated_again() -> None:
    images = KeptImages.of_teacher(CARD, batch("a", "b"), 0)
    images.save(64, 1, IMAGES)
    [file] = images.folder.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert images.load(64, 1) is None


def test_a_bundled_set_is_found_where_nothing_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = KeptImages.of_teacher(CARD, batch("a", "b"), 0)
    images.save(64, 1, IMAGES)
    [file] = images.folder.iterdir()
    (tmp_path / "assets" / kept_images.BUNDLED).mkdir(parents=True)
    monkeypatch.setattr(kept_images, "asset", lambda name: tmp_path / "assets" / name)
    kept_images.bundle(file)
    file.unlink()
    assert np.array_equal(images.load(64, 1), IMAGES)


def test_parts_are_kept_until_the_set_is_whole() -> None:
    images = KeptImages.of_teacher(CARD, batch("a", "b"), 0)
    assert images.parts(64, 1) == {}
    images.save_part(1, IMAGES[1:], 64, 1)
    images.save_part(0, IMAGES[:1], 64, 1, "heun")
    [(start, part)] = images.parts(64, 1).items()
    assert start == 1
    assert np.array_equal(part, IMAGES[1:])
    images.save(64, 1, IMAGES)
    assert images.parts(64, 1) == {}
    assert np.array_equal(images.parts(64, 1, "heun")[0], IMAGES[:1])
    images.discard()
    assert not list(images.folder.iterdir())


def test_a_student_s_images_are_those_of_its_weights(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve_student("emoji-student").folder, tmp_path / "student"))
    card = read_student_card(folder)

    def identity(card: StudentCard) -> str | None:
        return KeptImages.of_student(folder, card, batch("a"), 0).identity

    first = identity(card)
    assert first is not None
    assert first != KeptImages.of_teacher(card, batch("a"), 0).identity
    assert identity(card.model_copy(update={"metrics": {"x": 1.0}})) == first, "figures change no image"
    assert identity(card.model_copy(update={"sampler": SamplerConfig(nfe=2)})) != first
    [weights] = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert identity(card) != first


def test_an_evaluation_that_was_ended_goes_on_with_what_it_had(ray_cluster: str) -> None:
    student = resolve_student("emoji-student").folder
    captions = of_captions(student, 34)
    kept = KeptImages.of_student(student, read_student_card(student), captions, 0)
    marked = np.full((32, 16, 16, 3), 7, np.uint8)
    kept.save_part(0, marked, 2, 0)
    images = generate_images(student, captions, [Method("student_2", 2, student=True)])["student_2"]
    assert np.array_equal(images[:32], marked), "they were there already"
    assert images[32:].std() > 0
    assert np.array_equal(kept.load(2, 0), images)
    discard_images(student, captions)
    assert kept.load(2, 0) is None


def of_captions(student: Path, count: int) -> Batch:
    """Some captions for a student."""
    return of_prompts(read_student_card(student), [f"thing {number}, noto style" for number in range(count)])


@pytest.mark.parametrize(
    ("name", "data", "side", "sets", "again"),
    [
        (
            "emoji-student",
            EMOJI_DATA,
            16,
            ((64, 0), (64, 1), (16, 0), (8, 0), (4, 0), (2, 0)),
            ((4, 0),),
        ),
        pytest.param("emoji-student", EMOJI_DATA, 16, ((64, 1),), ((64, 1),), marks=pytest.mark.slow),
        pytest.param(
            "emoji64-student",
            EMOJI64_DATA,
            64,
            ((64, 0), (64, 1)),
            ((64, 0), (64, 1)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_bundled_images_are_what_the_bundled_teacher_draws(
    ray_cluster: str,
    name: str,
    data: str,
    side: int,
    sets: Sequence[tuple[int, int]],
    again: Sequence[tuple[int, int]],
) -> None:
    info = open_data(data)
    held_out = read_split(info.root, "held_out", EvaluationConfig().captions)
    student = resolve_student(name).folder
    kept = KeptImages.of_teacher(read_student_card(student), held_out, 0)
    for steps, noise in sets:
        images = kept.load(steps, noise)
        assert images is not None, "the main job's evaluation has changed: see the module"
        assert images.shape == (len(held_out), side, side, 3)
    first = replace(
        held_out, conditioning=held_out.conditioning[slice(2)], captions=held_out.captions[:2], keys=held_out.keys[:2],
        latent=None,
    )  # fmt: skip
    for steps, noise in again:
        drawn = generate_images(student, first, [Method("drawn", steps, noise=noise)])["drawn"]
        # Another processor may round to the next of 256 levels, and an autoencoder's convolutions to one more.
        assert np.abs(drawn.astype(int) - kept.load(steps, noise)[:2]).max() <= (1 if side == 16 else 3)


def test_images_of_other_references_are_not_found() -> None:
    def edits(seed: int) -> Batch:
        images = torch.rand(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).unbind(1)
        texts = TextConditioning(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool), references=images)
        return replace(batch("a", "b"), conditioning=texts)

    KeptImages.of_teacher(CARD, edits(0), 0).save(64, 1, IMAGES)
    assert np.array_equal(KeptImages.of_teacher(CARD, edits(0), 0).load(64, 1), IMAGES)
    assert KeptImages.of_teacher(CARD, edits(1), 0).load(64, 1) is None
