"""Finding a run again to resume it: by a record in the current folder, or by the checkpoints in its storage."""

from __future__ import annotations

import difflib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.train import checkpoint as ckpt
from fewstep.train.recipe import DistillRecipe, TeacherRecipe, upgraded

RECORDS = Path(".fewstep") / "runs"
"""Folder with two files of each run: RUN.json, its `RunRecord`, and RUN.yaml, its recipe."""

EXPORTS = Path(".fewstep") / "models"
"""Folder with each run's student or teacher, by the run's name."""

SHAPING = (
    "teacher.family", "student.policy", "student.lora", "student.full",
    "network.family", "network.config", "optimizer.type",
)  # fmt: skip
"""Fields of a recipe that determine which tensors a checkpoint holds."""


@dataclass(frozen=True)
class RunRecord:
    """Where to find the parts of a run."""

    mlflow_run: str
    """Id of its MLflow run."""
    storage: str
    """Absolute address of the storage with its checkpoints."""

    @classmethod
    def of(cls, run_name: str) -> RunRecord | None:
        """The record of a run in the current folder; None if there is none, or if it is empty or torn."""
        # Older versions wrote it in place, where a power cut may leave anything.
        with suppress(ValueError, FileNotFoundError):
            return TypeAdapter(cls).validate_json(record_file(run_name).read_bytes(), strict=True)
        return None

    def save(self, run_name: str, recipe: DistillRecipe | TeacherRecipe) -> None:
        """Write the record and the recipe into `RECORDS`, each whole or not at all.

        Raises:
            UserError: they can't be written.
        """
        folder = Storage.at(RECORDS)
        # The recipe first: a run with a record would otherwise be resumed with the defaults.
        resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        folder.write(f"{run_name}.yaml", resolved.encode())
        folder.write(f"{run_name}.json", json.dumps(asdict(self)).encode())


def record_file(run_name: str) -> Path:
    """The file of a run's `RunRecord` in the current folder, which need not exist."""
    return RECORDS / f"{run_name}.json"


def run_folder(storage: str, run_name: str) -> Storage:
    """The storage of one run's checkpoints.

    Args:
        storage: folder or `s3://…` of all runs' checkpoints.
        run_name: name of the run.
    """
    return Storage.at(f"{Storage.at(storage).root}/{run_name}")


def last_checkpoint(storage: str, run_name: str) -> ckpt.SavedCheckpoint | None:
    """A run's newest whole checkpoint, wherever the run was started; None if it has none.

    Args:
        storage: folder or `s3://…` of all runs' checkpoints.
        run_name: name of the run.

    Raises:
        UserError: the storage can't be reached.
    """
    saved = ckpt.saved_checkpoints(run_folder(storage, run_name))
    return next((one for one in saved if one.fault is None), None)


def last_state(storage: str, run_name: str) -> ckpt.TrainState | None:
    """The state in a run's newest whole checkpoint; None if it has none. For arguments see `last_checkpoint`."""
    last = last_checkpoint(storage, run_name)
    return None if last is None else last.state


def recipe_of(run_name: str, storage: str) -> str | dict[str, Any] | None:
    """A run's own recipe, as `load_recipe` takes it: from the current folder's record, or from its checkpoints.

    Args:
        run_name: name of the run.
        storage: folder or `s3://…` of all runs' checkpoints; those in the record's storage count too.

    Returns:
        None if nothing tells of a recipe.

    Raises:
        UserError: the record's recipe is empty or torn, and no checkpoint has it; or the storage can't be reached.
    """
    # The record first: it also knows runs that have no checkpoint yet.
    if (file := RECORDS / f"{run_name}.yaml").exists() and _is_whole(file):
        return str(file)
    state, record = last_state(storage, run_name), RunRecord.of(run_name)
    if state is None and record is not None:
        state = last_state(record.storage, run_name)
    if not file.exists():
        return None if state is None else state.recipe
    if state is None:
        raise UserError(
            f"--resume: the run's recipe in {file} is empty or torn, and there is no whole checkpoint of it in "
            f"{record.storage if record else storage}: name the recipe with --recipe, or begin a new run."
        )
    print(f"{file} is empty or torn: the recipe is that of the checkpoint of step {state.step}", flush=True)
    return state.recipe


def _is_whole(recipe: Path) -> bool:
    """Whether a recipe of a record is as it was written, as far as that can be told."""
    content = recipe.read_bytes()
    with suppress(yaml.YAMLError):
        # YAML ends with a line's end; without it the last value may be the start of another.
        return content.endswith(b"\n") and isinstance(yaml.safe_load(content), dict)
    return False


def check_resumable(recipe: DistillRecipe | TeacherRecipe, run_name: str) -> None:
    """Refuse to resume a run that does not exist, or whose checkpoints do not fit the recipe.

    A run that was stopped before its first checkpoint may be resumed: it starts from the beginning.

    Raises:
        UserError: there is no such run in the recipe's storage, or its checkpoints hold other tensors.
    """
    storage, record = Storage.at(recipe.train.storage).root, RunRecord.of(run_name)
    if run_folder(storage, run_name).list():
        if (state := last_state(storage, run_name)) is not None:
            _check_same_tensors(recipe, run_name, state)
    elif record is None and record_file(run_name).exists():
        raise UserError(
            f"--resume: {record_file(run_name)} is empty or torn, and there are no checkpoints of run {run_name!r} in "
            f"{storage}: add --set train.storage=… if they are elsewhere, or begin a new run."
        )
    elif record is None:
        near = difflib.get_close_matches(run_name, [record.stem for record in RECORDS.glob("*.json")], 1)
        raise UserError(
            f"--resume: there is no run {run_name!r} in {recipe.train.storage}; "
            + (f"did you mean {near[0]!r}?" if near else "give the name that the run printed when it began.")
        )
    elif record.storage != storage:
        raise UserError(
            f"--resume: run {run_name!r} is not in {storage}, its checkpoints are in {record.storage}: "
            f"add --set train.storage={record.storage}, or move them."
        )


def _check_same_tensors(recipe: DistillRecipe | TeacherRecipe, run_name: str, state: ckpt.TrainState) -> None:
    """Refuse a recipe whose checkpoints would hold other tensors than the run's.

    Raises:
        UserError: one of the `SHAPING` fields differs.
    """
    # Checkpoints of older versions have old names of settings.
    asked, (began, _) = recipe.model_dump(mode="json"), upgraded(state.recipe)
    for name in SHAPING:
        section, field = name.split(".")
        was = began.get(section, {})
        # Fields that the run's version of fewstep did not have are not compared.
        if field in was and not _alike(was[field], asked.get(section, {}).get(field)):
            raise UserError(
                f"--resume: run {run_name!r} began with {name}={was[field]}, and its checkpoints fit only that: "
                f"leave {name} as it was, or begin a new run."
            )


def _alike(was: Any, asked: Any) -> bool:
    """Whether two settings are equal, in those fields that both have: other versions of fewstep may have more."""
    if isinstance(was, dict) and isinstance(asked, dict):
        return all(_alike(was[key], asked[key]) for key in was.keys() & asked.keys())
    return was == asked
