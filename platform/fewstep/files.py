"""Files of weights that others may read, as any other file that a program writes.

safetensors writes each file beside its place, for its owner alone whatever the umask says, and moves it there, which
replaces a symbolic link instead of the file that the link stands for.
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_PATTERN = "*.safetensors"
"""Names of files of weights."""


def save_weights(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that others may read as the umask says; a link is written through to its target.

    Args:
        tensors: contiguous ones by name.
        file: in a folder that exists.
        metadata: texts for the file's header.

    Raises:
        UserError: `file` is a link to a place where no file can be made.
    """
    from safetensors.torch import save_file

    file = _target(file)
    save_file(dict(tensors), file, metadata=dict(metadata) if metadata else None)
    file.chmod(_mode_of_new_files(file.parent))


@contextmanager
def shared_weights(folder: Path) -> Iterator[None]:
    """A context in which a library writes safetensors files below a folder: they come out as from `save_weights`.

    Args:
        folder: need not exist before.

    Raises:
        UserError: a file there is a link to a place where no file can be made.
    """
    before = {file: _identity(file) for file in folder.rglob(WEIGHTS_PATTERN)}
    links = {file: (file.readlink(), _target(file)) for file in before if file.is_symlink()}
    yield
    written = [file for file in folder.rglob(WEIGHTS_PATTERN) if before.get(file) != _identity(file)]
    mode = _mode_of_new_files(folder) if written else 0
    for file in written:
        file.chmod(mode)
        if file in links and not file.is_symlink():
            link, target = links[file]
            shutil.move(file, target)
            file.symlink_to(link)


def _target(file: Path) -> Path:
    """The file that a path stands for, through links.

    Raises:
        UserError: it is a link in a circle, to a folder, or into a folder that does not exist. No folder is made, as by
            `open`: it may lie on a disk that is not mounted.
    """
    try:
        target = file.resolve()
        # Python 3.13 leaves a circle as it is, where older versions raise.
        fault = "leads in a circle" if target.is_symlink() else None
    except (OSError, RuntimeError):
        target, fault = file, "leads in a circle"
    if fault is None and file.is_symlink():
        if target.is_dir():
            fault = f"leads to the folder {target}"
        elif not target.parent.is_dir():
            fault = f"leads to {target}, whose folder does not exist"
    if fault is not None:
        raise UserError(
            f"weights can't be written to {file}, a link that {fault}: correct the link or delete it."
        )
    return target


def _identity(file: Path) -> tuple[int, int]:
    """What changes when a file, or the link itself, is replaced or written."""
    status = file.lstat()
    return status.st_ino, status.st_mtime_ns


def _mode_of_new_files(folder: Path) -> int:
    """The permissions that a new file of this process gets in a folder."""
    # Found by making one: the umask can only be read by changing it for all threads, and folders may have rules too.
    probe = folder / f".{uuid.uuid4().hex}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()
