"""Families that come as a user's own file: how the file reaches workers, and how students find it again.

A student of such a teacher holds a copy of the file. Loading a student runs that copy only if the user has named
a file of the same content before (in `teacher.module`, `FEWSTEP_MODULES` or `use_module`): a model from elsewhere
can't bring code that nobody has looked at.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fewstep.errors import UserError
from fewstep.models.registry import registered

CODE = "family.py"
"""The copy inside a student's folder."""

MODULES = "FEWSTEP_MODULES"
"""Environment variable: files that register families, separated like those of PATH."""

_CODE: dict[str, FamilyCode] = {}
"""The file that registered a family, by the family's name."""


@dataclass(frozen=True)
class FamilyCode:
    """A Python file that registers families, by content, so that it can travel."""

    path: str
    """Where it was read: for messages alone."""
    content: bytes

    @classmethod
    def read(cls, path: str | Path) -> FamilyCode:
        """Read a file.

        Raises:
            UserError: there is none.
        """
        file = Path(path).expanduser().absolute()
        if not file.is_file():
            raise UserError(f"the family's module: there is no file {file}; name the one that registers it.")
        return cls(str(file), file.read_bytes())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def use(self) -> None:
        """Run the file, once per process.

        Raises:
            UserError: it fails, or registers nothing.
        """
        name = f"fewstep_family_{self.sha256[:16]}"
        if name in sys.modules:
            return
        module = ModuleType(name)
        module.__file__ = self.path
        sys.modules[name] = module  # dataclasses and pickle look their module up by name
        before = registered()
        try:
            exec(compile(self.content, self.path, "exec", dont_inherit=True), module.__dict__)
        except Exception as error:
            del sys.modules[name]
            raise UserError(
                f"the family's module: {self.path} does not run ({type(error).__name__}: {error}): mend it."
            ) from error
        new = [family for family, value in registered().items() if before.get(family) is not value]
        if not new:
            raise UserError(f"the family's module: {self.path} registers no family: end it with register(…).")
        _CODE.update(dict.fromkeys(new, self))


def use_module(path: str | Path) -> None:
    """Run a user's file that registers families, and remember on this machine that its content may be run.

    Raises:
        UserError: there is no such file, it fails, or it registers nothing.
    """
    code = FamilyCode.read(path)
    code.use()
    _trusted(code.sha256).parent.mkdir(parents=True, exist_ok=True)
    _trusted(code.sha256).write_text(f"{code.path}\n")


def code_of(family: str) -> FamilyCode | None:
    """The file that registered a family; None for those of fewstep."""
    return _CODE.get(family)


def find_code(family: str, sha256: str | None, folder: Path) -> None:
    """Make the family of a student's teacher known.

    Args:
        family: its name.
        sha256: of the file that registers it; None where fewstep has it.
        folder: the student's, with its copy of the file.

    Raises:
        UserError: the copy was never looked at on this machine, or is not the file that the student names.
    """
    for path in filter(None, os.environ.get(MODULES, "").split(os.pathsep)):
        use_module(path)
    if sha256 is None or family in _CODE:
        return
    copy = FamilyCode.read(folder / CODE)
    if copy.sha256 != sha256:
        raise UserError(
            f"{folder / CODE} is not the file that the student was exported with: export it again."
        )
    if not _trusted(sha256).exists():
        raise UserError(
            f"{folder} is the student of a teacher whose family {family!r} is code that came with it: read "
            f"{folder / CODE}, and if you trust it, set {MODULES}={folder / CODE}."
        )
    copy.use()


def _trusted(sha256: str) -> Path:
    return Path.home() / ".cache" / "fewstep" / "trusted" / sha256
