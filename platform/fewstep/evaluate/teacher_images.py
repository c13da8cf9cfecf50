"""Images that a teacher drew for an earlier evaluation.

A teacher's 64 steps are most of an evaluation's work, and the same for all of its students.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.data.stream import Batch
from fewstep.export.pipeline import StudentCard

FOLDER = Path(".fewstep/teacher_images")


@dataclass(frozen=True)
class TeacherImages:
    """What one teacher drew for one list of captions, on disk; nothing where the teacher can't be told exactly.

    Attributes:
        identity: all that its images depend on, beside steps and noise; None turns keeping off.
        folder: where the files lie, one per set.
    """

    identity: str | None
    folder: Path = FOLDER

    @classmethod
    def of(cls, card: StudentCard, batch: Batch, seed: int) -> TeacherImages:
        """Those of a student's teacher; hub ids, whose weights may change under their name, are not kept."""
        if card.teacher.sha256 is None:
            return cls(None)
        facts = {
            "teacher": {
                "sha256": card.teacher.sha256,
                "family": card.teacher.family,
                "code": card.teacher.code_sha256,
            },
            "sampler": [
                card.guidance,
                card.guidance_interval,
                card.embedded_guidance,
                card.teacher_shift or card.shift,
                *([card.orthogonal] if card.orthogonal else []),  # as before there was such a fact
            ],
            "autoencoder": card.autoencoder,
            "text_encoder": card.text_encoder,
            "shape": batch.shape,
            "captions": batch.captions,
            "seed": seed,
        }
        return cls(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16])

    def load(self, steps: int, noise: int) -> np.ndarray | None:
        """(N, H, W, 3) uint8; None if they were not drawn yet."""
        if self.identity is None or not (file := self._file(steps, noise)).exists():
            return None
        try:
            return np.load(file)
        except (OSError, ValueError):  # a disk that was full: they are drawn again
            return None

    def save(self, steps: int, noise: int, images: np.ndarray) -> None:
        """Keep a set, whole or not at all."""
        if self.identity is None:
            return
        file = self._file(steps, noise)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as stream:
            np.save(stream, images)
        unfinished.rename(file)

    def _file(self, steps: int, noise: int) -> Path:
        return self.folder / f"{self.identity}-{steps}-{noise}.npy"
