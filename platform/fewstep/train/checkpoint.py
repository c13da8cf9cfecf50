"""Sharded, asynchronous checkpoints through torch.distributed.checkpoint and Ray Train.

A checkpoint is taken at one step (copied aside, written in the background) and reported at a later one,
when every rank has finished writing: training goes on in between. Every random draw of a step is a pure
function of (seed, rank, micro-batch), and so is the data stream; so the step is all the random and data state
there is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fewstep.train.optimizers import first_slots

STATE = "state.json"
"""The part of a checkpoint that is no tensor."""

FOLDER = "step-"
"""What the names of checkpoints' folders begin with, before the step in seven digits."""


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint says beside the tensors."""

    step: int
    """Optimizer steps done."""
    seed: int
    mlflow_run: str
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, content: bytes) -> TrainState:
        """From a checkpoint's JSON; what other versions wrote besides is left out."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in json.loads(content).items() if key in known})


class Checkpoints:
    """The checkpoints of one worker: one at a time is written in the background, and reported once it is whole.

    Every rank calls every method at the same steps.

    Args:
        tensors: gives the nested state, sharded or not; each rank writes its shards.
        origin: what the checkpoints of this run have in common.
        group: a process group of its own (gloo), so that writing never waits behind training's collectives.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, Any]], origin: TrainState, group: Any) -> None:
        self._tensors, self._origin, self._group = tensors, origin, group
        self._pending: tuple[Path, TrainState, Future[Any]] | None = None

    def begin(self, step: int, metrics: dict[str, float]) -> None:
        """Copy the tensors aside and have them written; the checkpoint before this one is reported first."""
        self.settle()
        state = replace(self._origin, step=step, metrics=metrics)
        folder = Path(tempfile.mkdtemp(prefix="fewstep-checkpoint-"))
        future = dcp.async_save(dict(self._tensors()), checkpoint_id=str(folder), process_group=self._group)
        (folder / STATE).write_text(json.dumps(asdict(state), indent=1))
        self._pending = folder, state, future

    def settle(self) -> None:
        """Wait for the one that is being written, if there is one, and hand it to Ray Train."""
        import ray.train

        if self._pending is None:
            return
        folder, state, future = self._pending
        future.result()
        ray.train.report(
            {"step": state.step, **state.metrics},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=f"{FOLDER}{state.step:07d}-{os.urandom(2).hex()}",
            delete_local_checkpoint_after_upload=True,
        )
        self._pending = None

    def finish(self, step: int, export: Callable[[Path], None] | None) -> None:
        """Report the last one, with what `export` writes into its folder (on rank 0 alone)."""
        if self._pending is None:  # resumed from a checkpoint of the very last step
            self.begin(step, {})
        assert self._pending is not None
        if export is not None:
            export(self._pending[0])
        self.settle()


def read_state(folder: Path) -> TrainState:
    """The JSON part of a checkpoint."""
    return TrainState.parse((folder / STATE).read_bytes())


def load_tensors(tensors: Mapping[str, Any], folder: Path) -> None:
    """Fill nested tensors in place from a checkpoint, whatever number of ranks wrote it."""
    dcp.load(dict(tensors), checkpoint_id=str(folder))


def optimizer_tensors(
    optimizers: Iterable[torch.optim.Optimizer], names: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Optimizers' state by parameter name, created if no step was taken yet, for in-place loading."""
    owners = {
        id(p): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    state: dict[str, Any] = {}
    for name, parameter in names.items():
        optimizer = owners[id(parameter)]
        slots = optimizer.state[parameter]
        if not slots:
            slots.update(first_slots(optimizer, parameter))
        state[name] = dict(slots)
    return state
