"""A student that travels to other machines as bytes: they need not see the folders of the one that sends it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from fewstep.config import Precision
from fewstep.models.family_code import CODE, FamilyCode
from fewstep.models.precision import pipeline_arguments
from fewstep.student.pipeline import FewStepPipeline


def packed(student: Path) -> dict[str, bytes]:
    """The files of an exported folder, by name."""
    return {file.name: file.read_bytes() for file in student.iterdir() if file.is_file()}


def unpacked(files: Mapping[str, bytes], device: str, precision: Precision = "float32") -> FewStepPipeline:
    """The pipeline of a student that was `packed`; its teacher must be found under the same path or hub id here.

    Code of a family of one's own is run: who sends the student has checked that it may be.

    Args:
        files: of the student.
        device: where to compute.
        precision: of the weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        if (code := Path(folder) / CODE).exists():
            FamilyCode.read(code).use()
        return FewStepPipeline.from_pretrained(folder, device=device, **pipeline_arguments(precision))
