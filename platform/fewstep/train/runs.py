"""What a run leaves so that it can be found again: a record in this folder, and its checkpoints in its storage."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fewstep.data.storage import Storage
from fewstep.errors import UserError
from fewstep.train import checkpoint as ckpt
from fewstep.train.recipe import DistillRecipe, TeacherRecipe

RECORDS = Path(".fewstep") / "runs"
"""Of each run RUN.json, a `RunRecord`, and RUN.yaml, its recipe."""


SHAPING = (
    "teacher.family", "student.policy", "student.lora", "student.full",
    "network.family", "network.config", "optimizer.type",
)  # fmt: skip
"""Fields that decide which tensors a checkpoint holds."""


@dataclass(frozen=True)
class RunRecord:
    """Where a run's parts are."""

    mlflow_run: str
    storage: str
    """Address of checkpoints, absolute."""

    @classmethod
    def of(cls, run_name: str) -> RunRecord | None:
        """What this folder knows of a run."""
        file = RECORDS / f"{run_name}.json"
        return cls(**json.loads(file.read_text())) if file.exists() else None

    def save(self, run_name: str, recipe: DistillRecipe | TeacherRecipe) -> None:
        RECORDS.mkdir(parents=True, exist_ok=True)
        (RECORDS / f"{run_name}.json").write_text(json.dumps(asdict(self)))
        resolved = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        (RECORDS / f"{run_name}.yaml").write_text(resolved)


def last_state(storage: str, run_name: str) -> ckpt.TrainState | None:
    """What a run's newest checkpoint says of it, wherever the run was started.

    Args:
        storage: folder or `s3://…` of all runs' checkpoints.

    Raises:
        UserError: the storage is out of reach.
    """
    place = Storage.at(f"{storage}/{run_name}")
    states = [name for name in place.list() if name.startswith(ckpt.FOLDER) and name.endswith(ckpt.STATE)]
    content = place.read(max(states)) if states else None
    return None if content is None else ckpt.TrainState.parse(content)


def recipe_of(run_name: str, storage: str) -> str | dict[str, Any] | None:
    """A run's own recipe, as `load_recipe` takes it: this folder's record of it, or what its checkpoints say."""
    if (file := RECORDS / f"{run_name}.yaml").exists():
        return str(file)
    state = last_state(storage, run_name)
    return None if state is None else state.recipe


def check_resumable(recipe: DistillRecipe | TeacherRecipe, run_name: str) -> None:
    """Refuse to continue a run that is not there, which would begin anew, or whose checkpoints would not fit.

    Raises:
        UserError: the recipe's storage has no such run, and this folder none that was to be there; or the run was
            made with other tensors.
    """
    storage, record = Storage.at(recipe.train.storage).root, RunRecord.of(run_name)
    if Storage.at(f"{storage}/{run_name}").list():
        if (state := last_state(storage, run_name)) is not None:
            _check_same_tensors(recipe, run_name, state)
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
    asked = recipe.model_dump(mode="json")
    for name in SHAPING:
        section, field = name.split(".")
        was = state.recipe.get(section, {})
        if field in was and not _alike(was[field], asked.get(section, {}).get(field)):
            raise UserError(
                f"--resume: run {run_name!r} began with {name}={was[field]}, and its checkpoints hold what that "
                f"needs: leave {name} as it was, or begin a new run."
            )


def _alike(was: Any, asked: Any) -> bool:
    """Whether settings are the same, as far as both versions of fewstep know them."""
    if isinstance(was, dict) and isinstance(asked, dict):
        return all(_alike(was[key], asked[key]) for key in was.keys() & asked.keys())
    return was == asked
