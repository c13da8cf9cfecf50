"""What is stored with a registered student so that MLflow can load it: a script, its libraries, and fewstep's code.

fewstep is not on a package index, so a registered model can't require it by version. It holds a copy of the code that
made it instead, which MLflow puts on the path when it loads the model.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import fewstep
from fewstep.models.teacher import BUNDLED_TEACHERS
from fewstep.student.card import read_student_card

PYFUNC_MODEL = Path(__file__).with_name("pyfunc_model.py")
"""The script that `mlflow.pyfunc` runs to load a student."""


def model_requirements() -> list[str]:
    """Libraries that loading a student needs, pinned to the versions that are installed here."""
    pinned = []
    for requirement in metadata.requires("fewstep") or []:
        if "extra ==" in requirement:  # libraries for training or serving
            continue
        [name] = re.findall(r"^[A-Za-z0-9._-]+", requirement)
        # Without suffixes such as "+cpu", which name a build that other machines can't install.
        pinned.append(f"{name}=={metadata.version(name).split('+')[0]}")
    return pinned


def model_code(student: Path, scratch: Path) -> Sequence[Path]:
    """Copy this package for storage with a model, together with the student's teacher if that is a bundled one.

    Args:
        student: the exported student's folder.
        scratch: an empty folder to copy into.

    Returns:
        Folders to store with the model.
    """
    source, target = Path(fewstep.__file__).parent, scratch / "fewstep"
    teacher = BUNDLED_TEACHERS.get(read_student_card(student).teacher.path)

    def left_out(folder: str, names: list[str]) -> list[str]:
        caches = [name for name in names if name == "__pycache__"]
        if Path(folder) != source / "assets":
            return caches
        # Of the assets only the teacher: the others are 25 MB that this student does not need.
        return caches + [name for name in names if name not in {teacher, "__init__.py"}]

    shutil.copytree(source, target, ignore=left_out)
    return [target]
