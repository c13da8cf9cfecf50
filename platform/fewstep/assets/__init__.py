"""Files that are bundled with fewstep: the captioned emoji set, small teachers, and students distilled from them.

Beside these, what names of models in general mean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from fewstep.errors import UserError


def asset(name: str) -> Path:
    """Path of a bundled file or folder; it need not exist."""
    return Path(str(files("fewstep.assets"))) / name


def bundled_folder(name: str, folders: Mapping[str, str]) -> Path:
    """The folder of a bundled model.

    Args:
        name: of the model, a key of `folders`.
        folders: names of models → their folders in the assets.

    Raises:
        UserError: this installation does not have it.
    """
    # An installation may leave out assets, such as the copies of this package that registered models carry.
    folder = asset(folders[name])
    if not folder.exists():
        raise UserError(f"the bundled model {name!r} is missing from this installation: reinstall fewstep.")
    return folder


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with a home folder in place of a leading `~` or `~user`.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise UserError(
            f"{str(path)!r}: there is no home folder {user!r}; give the folder's whole path."
        ) from error
