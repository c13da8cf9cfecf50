"""The hash that identifies a teacher's weights, remembered for files that have not changed since they were hashed."""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fewstep.home import cache_folder

_SETTLED_SECONDS = 2
"""Age of a file's last change from which on another change is sure to show in its times (some disks count seconds)."""

_PIECE = 1 << 18
"""Bytes read at a time: files may be larger than memory, and pieces of this size stay in a core's cache."""


def weights_hash(
    location: str, *, remembered: bool = True, ended: Callable[[], bool] = lambda: False
) -> str | None:
    """SHA-256 over a file, or the weights' files of a network's or pipeline's folder; None where there are none.

    Hashing takes longer than loading from a warm disk. So the result is kept in `~/.cache/fewstep/hashes`, under the
    files' paths, sizes, inodes and times of change, and read from there while all of these are the same.

    Args:
        location: the file or folder.
        remembered: whether a result that is kept there is taken.
        ended: asked between pieces of the files; where it says so, hashing ends, and the result is None.
    """
    folder = Path(location)
    # A network's own folder, or that of a pipeline, in which other parts have weights, too.
    places = ("*.safetensors", "transformer/*.safetensors", "unet/*.safetensors")
    files = [folder] if folder.is_file() else None
    files = files or next((found for place in places if (found := sorted(folder.glob(place)))), None)
    if files is None:
        return None
    before, newest = _state(files)
    memory = _memory(before)
    # Bytes that are no text are a ValueError.
    with suppress(OSError, ValueError):
        if remembered and memory is not None and re.fullmatch("[0-9a-f]{64}", known := memory.read_text()):
            return known
    started = time.time()
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while piece := handle.read(_PIECE):
                if ended():
                    return None
                digest.update(piece)
    if memory is not None and newest < started - _SETTLED_SECONDS and _state(files)[0] == before:
        _remember(memory, digest.hexdigest())
    return digest.hexdigest()


def _memory(name: str) -> Path | None:
    """The file in which a hash is kept; None for users without a home."""
    folder = cache_folder("hashes")
    return None if folder is None else folder / name


def _state(files: Sequence[Path]) -> tuple[str, float]:
    """What changes when a file is written or replaced, as the name of a file; and the time of the last change."""
    stats = [file.stat() for file in files]
    # The time of a file's inode (ctime) can't be set back, as that of its content (mtime) can.
    facts = [
        (str(file.resolve()), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for file, s in zip(files, stats, strict=True)
    ]
    name = hashlib.sha256(repr(facts).encode()).hexdigest()
    return name, max(max(s.st_mtime, s.st_ctime) for s in stats)


def _remember(memory: Path, digest: str) -> None:
    """Write a hash for later; without one, where nothing can be written, the files are hashed again."""
    beside = memory.with_name(uuid.uuid4().hex)
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(digest)
        os.replace(beside, memory)  # a reader never sees half of it
