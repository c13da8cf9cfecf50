"""Files that ship with fewstep: the captioned emoji set, its teacher, and the student distilled from it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def asset(name: str) -> Path:
    """Path of a file or folder that ships with the package (it may not exist)."""
    return Path(str(files("fewstep.assets"))) / name
