"""Reading torch's list of the tensors in a checkpoint, a pickle, without running what a changed one might hold.

torch.distributed.checkpoint reads tensors with `weights_only`, but unpickles its list `.metadata` as it is. Checkpoints
come from folders and buckets that others may write to, so the list is read here with the few names that it needs.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.serialization import _get_layout

from fewstep.errors import UserError

INDEX = ".metadata"
"""Name of the file in a checkpoint in which torch lists the tensors."""

_MODULES = {"torch", "torch.serialization", "pathlib", filesystem.__name__, metadata.__name__}
_PATHS = (pathlib.PosixPath, pathlib.PurePosixPath, pathlib.WindowsPath, pathlib.PureWindowsPath)
_CHANGED = "somebody has changed it, so nothing of it is read; take another checkpoint."


def read_index(content: bytes) -> metadata.Metadata:
    """The list of tensors in a checkpoint's `.metadata`.

    Raises:
        UserError: it holds anything that is no part of such a list, or lists what are no tensors in files beside it.
    """
    try:
        index = _Index(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError):
        index = None
    if not isinstance(index, metadata.Metadata):
        raise UserError(f"the checkpoint's {INDEX} is no list of tensors: {_CHANGED}")
    # Of anything but tensors, torch would unpickle the values as they are.
    tensors = isinstance(index.state_dict_metadata, dict) and all(
        isinstance(one, metadata.TensorStorageMetadata) for one in index.state_dict_metadata.values()
    )
    places = index.storage_data.values() if isinstance(index.storage_data, dict) else [None]
    if not tensors or not all(_is_beside(place) for place in places):
        raise UserError(f"the checkpoint's {INDEX} lists what are no tensors in files beside it: {_CHANGED}")
    return index


class IndexReader(filesystem.FileSystemReader):
    """Reads a checkpoint's tensors by its list as `read_index` gives it, and by no other.

    Args:
        folder: the checkpoint's.

    Raises:
        UserError: see `read_index`.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self._index = read_index((folder / INDEX).read_bytes())

    # Without torch's keyword `rank`: where the list could not be read, torch would unpickle one of each rank instead.
    def read_metadata(self) -> metadata.Metadata:
        """The list."""
        self._index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return self._index


def _is_beside(place: Any) -> bool:
    """Whether a tensor lies in a file of the checkpoint's folder."""
    name = getattr(place, "relative_path", None)
    return isinstance(name, str) and pathlib.PurePath(name).name == name


# The one in Python, as of the one in C no opcode can be overridden. Any, as type stubs know only that.
_Unpickler: Any = pickle._Unpickler


class _Index(_Unpickler):
    """Unpickles the classes of such lists, and calls no function but the one that looks a layout up."""

    def find_class(self, module: str, name: str) -> Any:
        # Of other modules nothing is even imported.
        found = super().find_class(module, name) if module in _MODULES and "." not in name else None
        if (
            found in (filesystem._StorageInfo, torch.Size, _get_layout, *_PATHS)
            or isinstance(found, torch.dtype)
            or (isinstance(found, type) and found.__module__ == metadata.__name__)
        ):
            return found
        raise UserError(
            f"the checkpoint's {INDEX} names {module}.{name}, which no list of tensors needs: {_CHANGED}"
        )

    def load_build(self) -> None:
        """The opcode that sets attributes: of objects, and not of classes, which it would change for all."""
        target = self.stack[-2]
        if isinstance(target, type) or callable(target):
            raise UserError(f"the checkpoint's {INDEX} changes {target.__name__}: {_CHANGED}")
        super().load_build()

    dispatch: ClassVar = {**_Unpickler.dispatch, pickle.BUILD[0]: load_build}
