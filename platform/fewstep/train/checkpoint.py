"""Sharded, asynchronous checkpoints through torch.distributed.checkpoint and Ray Train.

A checkpoint is taken at one step (copied aside, written in the background) and reported at a later one,
when every rank has finished writing: training goes on in between. Every random draw of a step is a pure
function of (seed, rank, step), and the data stream of (seed, rank, batches consumed); so step and batch
count are all the random and data state there is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint says beside the tensors."""

    step: int
    """Optimizer steps done."""
    batches: int
    """Micro-batches that each rank has consumed."""
    world_size: int
    seed: int
    mlflow_run: str
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class PendingCheckpoint:
    """A checkpoint that is being written in the background."""

    folder: Path
    state: TrainState
    future: Future[Any]

    def wait(self) -> Path:
        """Block until this rank's part is on disk."""
        self.future.result()
        return self.folder


def begin_save(tensors: Mapping[str, Any], state: TrainState, group: Any) -> PendingCheckpoint:
    """Copy the tensors aside and write them in the background, each rank its shards.

    Args:
        tensors: nested state, sharded or not.
        state: goes beside them as JSON, and holds everything but tensors.
        group: a process group of its own (gloo), so that writing never waits behind training's collectives.
    """
    folder = Path(tempfile.mkdtemp(prefix="fewstep-checkpoint-"))
    future = dcp.async_save(dict(tensors), checkpoint_id=str(folder), process_group=group)
    (folder / STATE).write_text(json.dumps(asdict(state), indent=1))
    return PendingCheckpoint(folder, state, future)


def read_state(folder: Path) -> TrainState:
    """The JSON part of a checkpoint."""
    return TrainState(**json.loads((folder / STATE).read_text()))


def load_tensors(tensors: Mapping[str, Any], folder: Path) -> None:
    """Fill nested tensors in place from a checkpoint, whatever number of ranks wrote it."""
    dcp.load(dict(tensors), checkpoint_id=str(folder))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state by parameter name, created if no step was taken yet, for in-place loading."""
    state: dict[str, Any] = {}
    for name, parameter in names.items():
        slots = optimizer.state[parameter]
        if not slots:
            slots["step"] = torch.zeros((), dtype=torch.float32)
            slots["exp_avg"] = torch.zeros_like(parameter)
            slots["exp_avg_sq"] = torch.zeros_like(parameter)
        state[name] = dict(slots)
    return state
