"""Families that are defined in a user's own file: how the file reaches workers, and how students find it again.

A student of such a teacher holds a copy of the file. Loading the student runs the copy only if the user has named a
file of the same content before (in `teacher.module`, `FEWSTEP_MODULES` or `use_module`), so that a downloaded model
can't run code that the user has not seen.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fewstep.assets import expanded
from fewstep.errors import UserError
from fewstep.home import cache_folder
from fewstep.models.registry import registered

CODE = "family.py"
"""Name of the file's copy in a student's folder."""

MODULES = "FEWSTEP_MODULES"
"""Name of the environment variable that lists files that register families, separated as in PATH."""

_CODE: dict[str, FamilyCode] = {}
"""A family's name → the file that registered it."""


@dataclass(frozen=True)
class FamilyCode:
    """A Python file that registers families. It holds the content, so that it can be sent to other machines."""

    path: str
    """Where the file was read; only for messages."""
    content: bytes

    @classmethod
    def read(cls, path: str | Path) -> FamilyCode:
        """Read a file.

        Raises:
            UserError: there is no such file.
        """
        file = expanded(path).absolute()
        if not file.is_file():
            raise UserError(f"the family's module: there is no file {file}; name the one that registers it.")
        return cls(str(file), file.read_bytes())

    @property
    def sha256(self) -> str:
        """Hash of the file's content, which identifies it exactly."""
        return hashlib.sha256(self.content).hexdigest()

    def use(self) -> None:
        """Run the file, once per process.

        Raises:
            UserError: it fails, or registers nothing.
        """
        # Named by content, so that the same file under two paths runs once.
        name = f"fewstep_family_{self.sha256[:16]}"
        if name in sys.modules:
            return
        module = ModuleType(name)
        module.__file__ = self.path
        sys.modules[name] = module  # dataclasses and pickle look their module up by name
        before = registered()
        try:
            # Not imported by path: on workers the file exists only as these bytes.
            exec(compile(self.content, self.path, "exec", dont_inherit=True), module.__dict__)
        except Exception as error:
            del sys.modules[name]
            raise UserError(
                f"the family's module: {self.path} does not run ({type(error).__name__}: {error}): mend it."
            ) from error
        # Compared by object, so that a file may also replace a family of the same name.
        new = [family for family, value in registered().items() if before.get(family) is not value]
        if not new:
            raise UserError(f"the family's module: {self.path} registers no family: end it with register(…).")
        _CODE.update(dict.fromkeys(new, self))


def use_module(path: str | Path) -> None:
    """Run a user's file that registers families, and record on this machine that its content may be run.

    Raises:
        UserError: there is no such file, it fails, or it registers nothing.
    """
    code = FamilyCode.read(path)
    code.use()
    if (record := _trusted(code.sha256)) is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{code.path}\n")


def code_of(family: str) -> FamilyCode | None:
    """The file that registered a family; None for fewstep's own families."""
    return _CODE.get(family)


def find_code(family: str, sha256: str | None, folder: Path) -> None:
    """Register the family of a student's teacher, if it is not registered yet.

    Args:
        family: its name.
        sha256: of the file that registers it; None for fewstep's own families.
        folder: the student's folder, with its copy of the file.

    Raises:
        UserError: the user has not named a file of this content on this machine, or the copy is not the file that the
            student names.
    """
    # The user named these files just now, which counts as having seen them.
    for path in filter(None, os.environ.get(MODULES, "").split(os.pathsep)):
        use_module(path)
    if sha256 is None or family in _CODE:
        return
    copy = FamilyCode.read(folder / CODE)
    if copy.sha256 != sha256:
        raise UserError(
            f"{folder / CODE} is not the file that the student was exported with: export it again."
        )
    if (record := _trusted(sha256)) is None or not record.exists():
        raise UserError(
            f"{folder} is the student of a teacher whose family {family!r} is code that came with it: read "
            f"{folder / CODE}, and if you trust it, set {MODULES}={folder / CODE}."
        )
    copy.use()


def _trusted(sha256: str) -> Path | None:
    """The file whose existence records that code of this hash may be run; None for users without a home."""
    folder = cache_folder("trusted")
    return None if folder is None else folder / sha256
