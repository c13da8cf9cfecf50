"""What an interrupted run goes on from: its newest whole checkpoint, and Ray Train's own list of checkpoints.

Ray Train resumes from the checkpoint that is the latest in its list, a file that it writes in place. A power cut may
leave the list empty, or the checkpoint that it names: then the list is written anew here, of what is whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.train.checkpoint import SavedCheckpoint, TrainState, saved_checkpoints

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

RAYS_LIST = "checkpoint_manager_snapshot.json"
"""Name of Ray Train's list in a run's folder."""


def recover(run: Storage) -> TrainState | None:
    """Make Ray Train resume a run from its newest whole checkpoint, and say in one line if that isn't the newest one.

    Args:
        run: the run's folder in its storage; empty for a new run.

    Returns:
        The state in that checkpoint; None if the run begins from its start.

    Raises:
        UserError: checkpoints were finished, but none is whole any more; or the storage can't be reached.
    """
    saved = list(saved_checkpoints(run))
    content = run.read(RAYS_LIST)
    listed = None if content is None else _parsed(content)
    whole = [one for one in saved if one.fault is None]
    # Of a run that was killed in its first upload nothing is listed: it begins again.
    finished = content is not None and (listed is None or bool(listed.checkpoint_results))
    if saved and not whole and finished:
        raise UserError(
            f"no checkpoint in {run.root} is whole ({'; '.join(f'{one.name}: {one.fault}' for one in saved)}): "
            "delete these folders, and --resume begins the run again, or put back a copy of one."
        )
    _report_left_out(run, saved, whole)
    if not (listed and _lists(listed, whole)) and (content is not None or whole):
        run.write(RAYS_LIST, _list_of(whole).encode())
    return whole[0].state if whole else None


def _report_left_out(run: Storage, saved: list[SavedCheckpoint], whole: list[SavedCheckpoint]) -> None:
    """Print a line if checkpoints newer than the newest whole one are left out."""
    newer = saved[: saved.index(whole[0])] if whole else saved
    if newer:
        state = whole[0].state if whole else None
        where = f"the checkpoint of step {state.step}" if state else "its beginning"
        what = "; ".join(f"{one.name} ({one.fault})" for one in newer)
        print(
            f"the run goes on from {where}: what is newer in {run.root} is not whole, and may be deleted: {what}",
            flush=True,
        )


def _parsed(content: bytes) -> _CheckpointManagerState | None:
    """Ray Train's list; None if Ray Train itself could not read it."""
    # Not a public class, but the list has no other description.
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    try:
        return _CheckpointManagerState.parse_raw(content)
    except ValueError:  # no JSON, or, as pydantic's own error, not with the wanted content
        return None


def _lists(listed: _CheckpointManagerState, whole: list[SavedCheckpoint]) -> bool:
    """Whether Ray Train's list is of whole checkpoints alone, the newest one as its latest."""
    latest = listed.latest_checkpoint_result
    names = {result.checkpoint_dir_name for result in listed.checkpoint_results}
    newest = whole[0].name if whole else None
    return names <= {one.name for one in whole} and (latest and latest.checkpoint_dir_name) == newest


def _list_of(whole: list[SavedCheckpoint]) -> str:
    """A list, as Ray Train writes it, of checkpoints that are given newest first."""
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    results = [
        _TrainingResultState(
            checkpoint_dir_name=one.name, metrics={"step": one.state.step, **one.state.metrics}
        )
        for one in reversed(whole)
        if one.state is not None
    ]
    return _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(results))),
        latest_checkpoint_result=results[-1] if results else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    ).json()
