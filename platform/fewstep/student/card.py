"""The student's card, `fewstep.json`: its teacher, the encoders of captions and images, and its sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fewstep.config import MAX_TOKENS, Config, Shape
from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep.models.teacher import TeacherReference

CARD = "fewstep.json"
CARD_SCHEMA_VERSION = 2
"""Version of the card's fields. Version 1 (before fewstep 0.2) had the fields of both samplers beside the others; such
cards can still be read."""


class StudentCard(Config):
    """Everything that generating needs beside the weights."""

    schema_version: int = CARD_SCHEMA_VERSION
    """Version of the card's fields."""
    teacher: TeacherReference
    """The teacher that the student was distilled from, and needs for loading."""
    text_encoder: str
    """Name of the encoder of captions or classes (`load_encoder`)."""
    autoencoder: str
    """Name of the autoencoder of its latents (`load_autoencoder`)."""
    latent_shape: Shape
    """(C, H, W) of the latents that it was trained on."""
    sampler: SamplerConfig
    """The sampler that it was trained for."""
    teacher_sampler: TeacherSamplerConfig
    """The teacher's guidance, and its own sampler."""
    references: int = 0
    """Reference images that it was trained with, and needs, for each image; 0 for a student that takes texts alone."""
    max_tokens: int = MAX_TOKENS
    """Longest prompt in tokens; the limit on captions in training."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The resolved recipe that it was trained with."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Results of its evaluation."""


def write_student_card(card: StudentCard, folder: Path) -> None:
    """Write (or replace) the card of a student folder."""
    (folder / CARD).write_text(card_text(card))


def card_text(card: StudentCard) -> str:
    """The content of a card's file."""
    return json.dumps(card.model_dump(mode="json"), indent=2) + "\n"


def read_student_card(folder: Path) -> StudentCard:
    """Read the card of a student folder.

    Raises:
        UserError: there is no card, it is broken, or it is from a newer fewstep.
    """
    file = folder / CARD
    if (folder / "model_index.json").exists():
        raise UserError(
            f"{folder} is a diffusers pipeline, which diffusers.DiffusionPipeline loads; give the student that it was "
            "exported from."
        )
    if not file.exists():
        raise UserError(
            f"{folder} is no exported student: it has no {CARD}; give the folder that a distillation job wrote, "
            "models:/name@alias, or a bundled name (emoji64-student, emoji-student, fashion-student)."
        )
    try:
        fields = json.loads(file.read_text())
        version = fields.get("schema_version", 1)  # version 1 had no such field
        if version > CARD_SCHEMA_VERSION:
            raise UserError(
                f"{file} has schema version {version}, this fewstep reads up to {CARD_SCHEMA_VERSION}: "
                "install a newer one."
            )
        return StudentCard.model_validate(_upgraded(fields) if version == 1 else fields)
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is no card of a student ({reason}): export the student again.") from error


def _upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a card of version 1 as fields of the present version."""
    fields = dict(fields)
    # `shift` is a field of both samplers' settings: version 1 had the student's, and `teacher_shift`.
    sampler_names = SamplerConfig.model_fields.keys() & fields.keys() - {"shift"}
    sampler = {name: fields.pop(name) for name in sampler_names} | {"shift": fields.pop("shift")}
    teacher = {
        "guidance_scale": fields.pop("guidance"),
        "shift": fields.pop("teacher_shift", None),
        "embedded_guidance_scale": fields.pop("embedded_guidance", None),
    }
    # The first cards of version 1 lack these two: the defaults hold then.
    for name in ("guidance_interval", "orthogonal"):
        if name in fields:
            teacher[name] = fields.pop(name)
    return {
        **fields,
        "schema_version": CARD_SCHEMA_VERSION,
        "sampler": sampler,
        "teacher_sampler": teacher,
    }
