"""Finding a student by any of its names and addresses."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.assets import bundled_folder, expanded
from fewstep.errors import UserError
from fewstep.hub import HUB_ID, hub_folder, is_hub_id

if TYPE_CHECKING:
    from fewstep.storage import Storage

BUNDLED_STUDENTS = {
    "emoji64-student": "emoji64_student",
    "emoji-student": "emoji_student",
    "emoji-edit-student": "emoji_edit_student",
    "fashion-student": "fashion_student",
}
"""Names of the bundled students → their folders in the assets."""

DEFAULT_TRACKING = "sqlite:///mlflow.db"
"""MLflow's address if nothing names another."""
REGISTERED = ("models:", "runs:")
"""Prefixes of MLflow's addresses."""


@dataclass(frozen=True)
class ResolvedStudent:
    """A student's files, and the version that identifies it exactly."""

    folder: Path
    """Its files, on this machine."""
    version: str
    """`models:/name/3` for a registered student, otherwise `sha256:…`, a hash of weights and card."""


def resolve_student(
    source: str | os.PathLike[str], *, tracking_uri: str | None = None, into: Path | None = None
) -> ResolvedStudent:
    """Find a student, and fetch it if it is not on this machine.

    Args:
        source: a bundled name, a student's folder, `s3://bucket/folder`, MLflow's `models:/name@alias`,
            `models:/name/3`, `models:/name/latest` or `runs:/id/path`, or a hub id (owner/name, owner/name/folder,
            either with @revision).
        tracking_uri: address of MLflow; by default `MLFLOW_TRACKING_URI` or ./mlflow.db.
        into: folder that files are fetched to; by default a new temporary folder, or the hub's cache.

    Raises:
        UserError: there is no such student, or a library that fetching it needs is not installed.
    """
    address = str(source)
    if address.startswith(REGISTERED):
        from fewstep.tracking.registry import resolve

        if into is not None:
            into.mkdir(parents=True, exist_ok=True)
        # The alias is resolved to a version here, so that weights and version belong together.
        folder, info = resolve(address, registry_uri(tracking_uri), into)
        return ResolvedStudent(folder, str(info.uri) if info.uri else folder_version(folder))
    folder = fetch_folder(address, into, "model", BUNDLED_STUDENTS)
    return ResolvedStudent(folder, folder_version(folder))


def current_version(source: str, tracking_uri: str | None = None) -> str | None:
    """The version that `resolve_student` would give now, without fetching weights; None if that takes fetching them.

    Raises:
        UserError: there is no such student, or the registry can't be reached.
    """
    if source.startswith("models:"):
        from fewstep.tracking.registry import look_up

        return str(look_up(source, registry_uri(tracking_uri)).uri)
    # A hash of local files is cheap; object storage and hub ids would have to be fetched.
    local = source in BUNDLED_STUDENTS or expanded(source).is_dir()
    return resolve_student(source).version if local else None


def fetch_lora(source: str, into: Path, tracking_uri: str | None = None) -> str:
    """The path of a LoRA, fetched if it is in object storage or in MLflow; hub ids are returned as they are.

    Args:
        source: a safetensors file or a folder with one, of this machine or `s3://…`; a hub id; or an address in MLflow,
            such as `models:/name@alias`, whose files have one safetensors file.
        into: folder that files are fetched to.
        tracking_uri: as for `resolve_student`.

    Raises:
        UserError: there is nothing, or a library that fetching it needs is not installed.
    """
    if source.startswith(REGISTERED):
        from fewstep.tracking.registry import fetch

        into.mkdir(parents=True, exist_ok=True)
        folder, _ = fetch(source, registry_uri(tracking_uri), into)
        files = list(folder.rglob("*.safetensors"))  # MLflow's models have their files in folders
        if len(files) != 1:
            raise UserError(f"{source} has {len(files)} *.safetensors files: register a LoRA as one file.")
        return str(files[0])
    if "://" not in source:
        return source
    if not source.endswith(".safetensors"):
        return str(_fetch(source, into))
    storage, name = _storage().of_file(source)
    if (content := storage.read(name)) is None:
        raise UserError(f"there is no file {source}: correct the address.")
    into.mkdir(parents=True, exist_ok=True)
    (into / name).write_bytes(content)
    return str(into / name)


def fetch_folder(address: str, into: Path | None, field: str, bundled: dict[str, str]) -> Path:
    """The local folder of a model, fetched if it is not on this machine.

    Args:
        address: a bundled name, a folder, an address of object storage, or a hub id.
        into: folder that object storage is fetched to; by default a new temporary one.
        field: name of the setting, for error messages.
        bundled: names of bundled models → their folders in the assets.

    Raises:
        UserError: there is no such model.
    """
    if not address:  # the current folder would be meant otherwise
        raise UserError(f"{field}: there is no model without a name.")
    # Bundled names first: a folder of the same name in the current one would otherwise be taken unnoticed.
    if address in bundled:
        return bundled_folder(address, bundled)
    if "://" in address:
        return _fetch(address, into or Path(tempfile.mkdtemp(prefix="fewstep-student-")))
    folder = expanded(address)
    if folder.is_dir():
        return folder
    if is_hub_id(address):
        return _from_hub(address, field)
    raise UserError(
        f"{field}: there is no folder {address!r}; give a folder, s3://…, models:/name@alias, a hub id "
        f"({HUB_ID}) or one of the bundled names: {', '.join(bundled)}."
    )


def registry_uri(given: str | None) -> str:
    """MLflow's address: the given one, or that of the environment, or the local database."""
    return given or os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_TRACKING)


def folder_version(folder: Path) -> str:
    """The version of a student in a local folder: a hash of its weights and card."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    # Sizes and times are part of the cache's key, so that changed files are hashed again.
    return _hash_of(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=64)
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """`sha256:…` over the content of files, given as (path, size, time of change)."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _fetch(address: str, into: Path) -> Path:
    """Copy all objects below an address of object storage into a folder.

    Raises:
        UserError: there are none, the storage can't be reached, or pyarrow is not installed.
    """
    if not _storage().at(address).copy_to(into):
        raise UserError(f"no model lies at {address}: give the folder that a distillation job exported.")
    return into


def _storage() -> type[Storage]:
    """The class that reads object storage.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        from fewstep.storage import Storage
    except ImportError as error:
        raise UserError("object storage needs pyarrow: pip install 'fewstep[train]'.") from error
    return Storage


def _from_hub(name: str, field: str) -> Path:
    """The folder of a hub id in the hub's cache.

    Raises:
        UserError: it can't be fetched.
    """
    try:
        return hub_folder(name)
    except OSError as error:
        raise UserError(f"{field}: {error}: check the name and the connection, or give a folder.") from error
