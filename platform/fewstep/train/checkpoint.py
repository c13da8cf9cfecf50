"""Sharded, asynchronous checkpoints through torch.distributed.checkpoint and Ray Train.

At the step of a checkpoint the tensors are copied, and written in the background while training goes on; at a later
step, when every rank has finished writing, the checkpoint is reported to Ray Train. Random numbers and batches of a
step are pure functions of (seed, rank, micro-batch), so a checkpoint needs no state of generators or of the data
stream: the step is enough.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fewstep.train.optimizers import first_slots

STATE = "state.json"
"""Name of the file in a checkpoint that holds what are no tensors, a `TrainState`."""

FOLDER = "step-"
"""Prefix of the names of checkpoints' folders, before the step in seven digits."""


@dataclass(frozen=True)
class TrainState:
    """The content of a checkpoint beside its tensors."""

    step: int
    """Optimizer steps done."""
    seed: int
    """The recipe's seed."""
    mlflow_run: str
    """Id of the MLflow run, which a resumed run continues."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last metrics that were logged."""

    @classmethod
    def parse(cls, content: bytes) -> TrainState:
        """Read a checkpoint's JSON; fields that only other versions of fewstep know are left out."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in json.loads(content).items() if key in known})


class Checkpoints:
    """Writes the checkpoints of one worker in the background, one at a time, and reports each when it is complete.

    Every rank has to call every method at the same steps.

    Args:
        tensors: returns the nested state, sharded or not; each rank writes its own shards.
        origin: the parts of `TrainState` that all checkpoints of this run have in common.
        group: a process group for this alone (gloo), so that writing never waits for the training's collectives.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, Any]], origin: TrainState, group: Any) -> None:
        self._tensors, self._origin, self._group = tensors, origin, group
        self._pending: tuple[Path, TrainState, Any] | None = None  # the last is a future of writing

    def begin(self, step: int, metrics: dict[str, float]) -> None:
        """Copy the tensors and begin to write them; a checkpoint that is still being written is reported before."""
        self.settle()
        # The state that belongs to the tensors of this step; it is reported with them later.
        state = replace(self._origin, step=step, metrics=metrics)
        # Local to this worker: Ray Train copies it to the run's storage when it is reported.
        folder = Path(tempfile.mkdtemp(prefix="fewstep-checkpoint-"))
        # Returns when the tensors are copied to memory of their own, so that training may change them.
        future = dcp.async_save(dict(self._tensors()), checkpoint_id=str(folder), process_group=self._group)
        (folder / STATE).write_text(json.dumps(asdict(state), indent=1))
        self._pending = folder, state, future

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and report it to Ray Train."""
        import ray.train

        if self._pending is None:
            return
        folder, state, future = self._pending
        future.result()  # raises what went wrong in the background
        ray.train.report(
            {"step": state.step, **state.metrics},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            # The random part makes a new folder also where an interrupted run has left one of the same step.
            checkpoint_dir_name=f"{FOLDER}{state.step:07d}-{os.urandom(2).hex()}",
            delete_local_checkpoint_after_upload=True,
        )
        self._pending = None

    def finish(self, step: int, export: Callable[[Path], None] | None) -> None:
        """Report the last checkpoint.

        Args:
            step: the run's last step.
            export: on rank 0, writes the trained model into the checkpoint's folder; None on other ranks.
        """
        if self._pending is None:  # resumed at the last step: the export still has to be written
            self.begin(step, {})
        assert self._pending is not None
        if export is not None:
            export(self._pending[0])
        self.settle()


def read_state(folder: Path) -> TrainState:
    """The part of a checkpoint that are no tensors."""
    return TrainState.parse((folder / STATE).read_bytes())


def load_tensors(tensors: Mapping[str, Any], folder: Path) -> None:
    """Fill nested tensors in place from a checkpoint, which may be of another number of ranks."""
    dcp.load(dict(tensors), checkpoint_id=str(folder))


def optimizer_tensors(
    optimizers: Iterable[torch.optim.Optimizer], names: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The optimizers' state by parameter name: the tensors themselves, so that a checkpoint can be loaded into them.

    Args:
        optimizers: one or several, which share the parameters.
        names: all parameters by name.
    """
    # By name rather than by index, as torch's state dicts: a checkpoint then fits whatever the order of parameters.
    owners = {
        id(p): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    state: dict[str, Any] = {}
    for name, parameter in names.items():
        optimizer = owners[id(parameter)]
        # torch creates the state at the first step; before that, loading needs tensors to load into.
        slots = optimizer.state[parameter]
        if not slots:
            slots.update(first_slots(optimizer, parameter))
        state[name] = dict(slots)
    return state
