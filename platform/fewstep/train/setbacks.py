"""The record of a run that went back to an earlier checkpoint: how often, from where, and why.

It lies in the run's folder of the storage, so that whoever resumes the run goes on with the same learning rates and
random numbers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from fewstep.errors import UserError
from fewstep.storage import Storage
from fewstep.train.checkpoint import SavedCheckpoint, saved_checkpoints

SETBACKS = "setbacks.json"
"""Name of the file in a run's folder."""


@dataclass(frozen=True)
class Setback:
    """One time that a run went back."""

    found: int
    """The step at which the run was found to diverge."""
    back_to: int
    """The step of the checkpoint that it went on from; 0 for its beginning."""
    reason: str
    """What was found, as one sentence."""


def read_setbacks(run: Storage) -> list[Setback]:
    """The times that a run went back, in order.

    Args:
        run: the run's folder.

    Raises:
        UserError: the record can't be read, or the storage can't be reached.
    """
    if (content := run.read(SETBACKS)) is None:
        return []
    try:
        return TypeAdapter(list[Setback]).validate_json(content, strict=True)
    except ValueError:
        raise UserError(
            f"{run.root}/{SETBACKS} can't be read: delete it, and the run goes on with the recipe's own learning rate."
        ) from None


def go_back(run: Storage, found: int, reason: str) -> Setback:
    """Have the run go on from its last good checkpoint, and write down that it does.

    Checkpoints are made only while a run is healthy. So its newest whole one is the last good one; but if the run has
    gone back to it before and came to no other, the fault may be older, and that checkpoint is deleted.

    Args:
        run: the run's folder.
        found: the step at which it was found to diverge.
        reason: what was found.

    Raises:
        UserError: as for `read_setbacks`.
    """
    whole = [one for one in saved_checkpoints(run) if one.fault is None and one.state is not None]
    before = read_setbacks(run)
    if before and whole and len(whole) > 1 and _step(whole[0]) == before[-1].back_to:
        run.delete([path for path in run.list() if path.startswith(f"{whole[0].name}/")])
        del whole[0]
    setback = Setback(found, _step(whole[0]) if whole else 0, reason)
    run.write(SETBACKS, json.dumps([asdict(one) for one in (*before, setback)], indent=1).encode())
    return setback


def _step(saved: SavedCheckpoint) -> int:
    assert saved.state is not None, "a whole checkpoint has a state"
    return saved.state.step
