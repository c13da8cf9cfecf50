"""Images that were generated for an evaluation, kept on disk.

A teacher's 64 steps are most of an evaluation's work, and the same for all of its students, so they are kept for the
next ones. A student's are kept until its evaluation is done, so that one that is ended goes on. Unfinished sets are in
parts. Those of the bundled emoji teachers for the main job's evaluation are bundled too, compressed; whoever changes
such a teacher or that evaluation runs the main job once, and calls `bundle` with what it kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.assets import asset
from fewstep.config import Precision
from fewstep.data.stream import Batch
from fewstep.models.solvers import Solver
from fewstep.student.card import StudentCard

TEACHERS = Path(".fewstep/teacher_images")
"""Where a teacher's are kept, below the current folder."""
STUDENTS = Path(".fewstep/student_images")
"""Where a student's are kept while it is evaluated."""

BUNDLED = "teacher_images"
"""Folder of the bundled ones in the assets."""


@dataclass(frozen=True)
class KeptImages:
    """What one network generated for one list of captions, kept on disk if its weights are known exactly.

    Attributes:
        identity: a hash of all that the images depend on, beside steps and noise; None keeps nothing.
        folder: where the files are, one per set.
    """

    identity: str | None
    folder: Path = TEACHERS

    @classmethod
    def of_teacher(
        cls, card: StudentCard, batch: Batch, seed: int, precision: Precision = "float32"
    ) -> KeptImages:
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
        }
        return cls(_hash(facts | _asked(card, batch, seed, precision)))

    @classmethod
    def of_student(
        cls, student: Path, card: StudentCard, batch: Batch, seed: int, precision: Precision = "float32"
    ) -> KeptImages:
        """The images of a student in a folder; for other arguments see `of_teacher`."""
        if card.teacher.sha256 is None:
            return cls(None)
        # A card's figures and recipe change no image, and are written after an evaluation.
        told = card.model_dump(mode="json", exclude={"metrics", "recipe"})
        files = [file for file in sorted(student.iterdir()) if file.suffix == ".safetensors"]
        facts = {"card": told, "weights": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]}
        return cls(_hash(facts | _asked(card, batch, seed, precision)), STUDENTS)

    def load(self, steps: int, noise: int, solver: Solver = "euler") -> np.ndarray | None:
        """The images of so many evaluations from noise of that number, (N, H, W, 3) uint8; None if there are none."""
        if self.identity is None:
            return None
        name = self._name(steps, noise, solver)
        # Not there yet; or torn, as the disk was full when they were written: they are generated again.
        with suppress(OSError, ValueError):
            return np.load(self.folder / name)
        with suppress(OSError, ValueError):
            return np.load((asset(BUNDLED) / name).with_suffix(".npz"))["images"]
        return None

    def save(self, steps: int, noise: int, images: np.ndarray, solver: Solver = "euler") -> None:
        """Keep images (N, H, W, 3) uint8, whole or not at all, in place of their parts."""
        if self.identity is None:
            return
        file = self.folder / self._name(steps, noise, solver)
        _write(file, images)
        shutil.rmtree(file.with_suffix(".parts"), ignore_errors=True)

    def parts(self, steps: int, noise: int, solver: Solver = "euler") -> dict[int, np.ndarray]:
        """The parts of an unfinished set: number of the first caption → (n, H, W, 3) uint8."""
        found: dict[int, np.ndarray] = {}
        if self.identity is None:
            return found
        for file in (self.folder / self._name(steps, noise, solver)).with_suffix(".parts").glob("*.npy"):
            with suppress(OSError, ValueError):
                found[int(file.stem)] = np.load(file)
        return found

    def save_part(
        self, start: int, images: np.ndarray, steps: int, noise: int, solver: Solver = "euler"
    ) -> None:
        """Keep a part of a set, which begins with the caption of that number."""
        if self.identity is not None:
            folder = (self.folder / self._name(steps, noise, solver)).with_suffix(".parts")
            _write(folder / f"{start}.npy", images)

    def discard(self) -> None:
        """Delete all that was kept."""
        if self.identity is None:
            return
        for path in self.folder.glob(f"{self.identity}-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _name(self, steps: int, noise: int, solver: Solver) -> str:
        # Euler's have no name of their own, so that images kept before there were others are still found.
        return f"{self.identity}-{steps}-{noise}{'' if solver == 'euler' else f'-{solver}'}.npy"


def bundle(file: Path) -> Path:
    """Compress a kept set into the assets.

    Args:
        file: of `TEACHERS`.

    Returns:
        The file in the assets.
    """
    bundled = (asset(BUNDLED) / file.name).with_suffix(".npz")
    np.savez_compressed(bundled, images=np.load(file))
    return bundled


def _asked(card: StudentCard, batch: Batch, seed: int, precision: Precision) -> dict[str, Any]:
    facts = {
        "autoencoder": card.autoencoder,
        "text_encoder": card.text_encoder,
        "shape": batch.shape,
        "captions": batch.captions,
        "seed": seed,
    }
    if references := batch.conditioning.references:
        facts["references"] = [
            hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest() for images in references
        ]
    return facts if precision == "float32" else facts | {"precision": precision}


def _hash(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _write(file: Path, images: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # With the process's number, as two evaluations may write the same images at the same time.
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as stream:
        np.save(stream, images)
    unfinished.rename(file)
