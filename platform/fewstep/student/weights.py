"""A student's network without values, which tells what its weights will take before any of them is read."""

from __future__ import annotations

from pathlib import Path

from fewstep.config import Precision
from fewstep.models.architecture import build_on_meta
from fewstep.models.family_code import find_code
from fewstep.models.network import PolicyNetwork
from fewstep.student.adapter import adapter_on_meta
from fewstep.student.card import read_student_card


def student_on_meta(folder: Path, precision: Precision, teacher: str | None = None) -> PolicyNetwork:
    """The network of a student as a pipeline holds it, on the meta device, whose tensors have shapes and no values.

    Known from the teacher's configuration and the heads of the adapter's files, without a weight being read.

    Args:
        folder: the student's.
        precision: of the base's weights.
        teacher: the teacher's folder or hub id, if it differs from that in the student's card.

    Raises:
        UserError: there is no student, or an adapter for another base; or the configuration of its teacher is not found
            here or on the hub; or its family is code that may not be run yet (see `family_code.py`).
    """
    card = read_student_card(folder)
    find_code(card.teacher.family, card.teacher.code_sha256, folder)
    path, scale = teacher or card.teacher.path, card.teacher_sampler.embedded_guidance_scale
    transformer, family = build_on_meta(path, card.teacher.family, scale)
    network = adapter_on_meta(transformer, family, folder, precision).eval()
    network.keep_folded()
    return network
