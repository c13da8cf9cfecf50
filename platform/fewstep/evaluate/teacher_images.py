"""Images that a teacher generated for an earlier evaluation, kept for the next one.

A teacher's 64 steps are most of an evaluation's work, and the same for all of its students. Those of the bundled emoji
teacher for the main job's evaluation are bundled too; whoever changes that teacher or that evaluation runs the main job
once, and copies what it kept to the assets.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.assets import asset
from fewstep.config import Precision
from fewstep.data.stream import Batch
from fewstep.student.card import StudentCard

FOLDER = Path(".fewstep/teacher_images")
"""Where they are kept, below the current folder."""

BUNDLED = "teacher_images"
"""Folder of the bundled ones in the assets."""


@dataclass(frozen=True)
class TeacherImages:
    """What one teacher generated for one list of captions, kept on disk if the teacher's weights are known exactly.

    Attributes:
        identity: a hash of all that the images depend on, beside steps and noise; None keeps nothing.
        folder: where the files are, one per set.
    """

    identity: str | None
    folder: Path = FOLDER

    @classmethod
    def of(
        cls, card: StudentCard, batch: Batch, seed: int, precision: Precision = "float32"
    ) -> TeacherImages:
        """The images of a student's teacher.

        Args:
            card: of the student.
            batch: captions and the latent shape.
            seed: of the noise.
            precision: of the teacher's weights.
        """
        if card.teacher.sha256 is None:  # a hub id, whose weights may change under the same name
            return cls(None)
        how = card.teacher_sampler
        facts = {
            "teacher": {
                "sha256": card.teacher.sha256,
                "family": card.teacher.family,
                "code": card.teacher.code_sha256,
            },
            "sampler": [
                how.guidance_scale,
                how.guidance_interval,
                how.embedded_guidance_scale,
                how.shift or card.sampler.shift,
                # Left out where it is 0, so that images kept before there was such a setting are still found.
                *([how.orthogonal] if how.orthogonal else []),
                *([how.renorm] if how.renorm != "none" else []),
                *([how.scheduler] if how.scheduler is not None and how.shift is None else []),
            ],
            "autoencoder": card.autoencoder,
            "text_encoder": card.text_encoder,
            "shape": batch.shape,
            "captions": batch.captions,
            "seed": seed,
        }
        if precision != "float32":
            facts["precision"] = precision
        return cls(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16])

    def load(self, steps: int, noise: int) -> np.ndarray | None:
        """The images of so many steps from noise of that number, (N, H, W, 3) uint8; None if there are none yet."""
        if self.identity is None:
            return None
        for folder in (self.folder, asset(BUNDLED)):
            # Not there yet; or torn, as the disk was full when they were written: they are generated again.
            with suppress(OSError, ValueError):
                return np.load(folder / self._name(steps, noise))
        return None

    def save(self, steps: int, noise: int, images: np.ndarray) -> None:
        """Keep images (N, H, W, 3) uint8, whole or not at all."""
        if self.identity is None:
            return
        file = self.folder / self._name(steps, noise)
        file.parent.mkdir(parents=True, exist_ok=True)
        # With the process's number, as two evaluations may write the same images at the same time.
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as stream:
            np.save(stream, images)
        unfinished.rename(file)

    def _name(self, steps: int, noise: int) -> str:
        return f"{self.identity}-{steps}-{noise}.npy"
