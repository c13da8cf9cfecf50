"""Sharded, asynchronous checkpoints through torch.distributed.checkpoint and Ray Train.

At the step of a checkpoint the tensors are copied to memory of the host, which needs room for all that its workers hold
of them, and written in the background while training goes on; at a later step, when every rank has finished writing,
the checkpoint is reported to Ray Train. Random numbers and batches of a step are pure functions of (seed, rank,
micro-batch), so a checkpoint needs no state of generators or of the data stream: the step is enough.

Each rank writes its own files to the run's storage, and then a manifest with their sizes and checksums. A checkpoint
whose manifests of all ranks are there, and whose files have those sizes, is whole: what a power cut or a killed upload
leaves is told from it without reading the tensors.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter
from torch import Tensor

from fewstep.storage import Storage, through_outages
from fewstep.train.checkpoint_index import INDEX, IndexReader, read_index
from fewstep.train.optimizers import first_slots

if TYPE_CHECKING:
    import ray.train

STATE = "state.json"
"""Name of the file in a checkpoint that holds what are no tensors, a `TrainState`."""

FOLDER = "step-"
"""Prefix of the names of checkpoints' folders, before the step in seven digits."""

_NAME = re.compile(rf"{FOLDER}(?P<step>\d{{7,}})-[0-9a-f]{{4}}")
"""Names that `Checkpoints` gives to folders; other folders there, such as copies of these, are the user's own."""


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
    ranks: int = 0
    """Number of ranks that wrote it, each with a manifest; 0 in checkpoints of before fewstep 0.2, which have none."""
    health: dict[str, Any] = field(default_factory=dict)
    """What coming readings are compared with, see `HealthMonitor.state`."""
    best: dict[str, Any] | None = None
    """The best student so far, see `BestStudent`; None before the first measurement."""

    @classmethod
    def parse(cls, content: bytes) -> TrainState:
        """Read a checkpoint's JSON; fields that only other versions of fewstep know are left out.

        Raises:
            ValueError: it is no JSON, or a field is missing or of another type.
        """
        return TypeAdapter(cls).validate_json(content, strict=True)


class Checkpoints:
    """Writes the checkpoints of one worker in the background, one at a time, and reports each when it is complete.

    Every rank has to call every method at the same steps.

    Args:
        tensors: returns the nested state, sharded or not; each rank writes its own shards.
        origin: the parts of `TrainState` that all checkpoints of this run have in common.
        group: a process group for this alone (gloo), so that writing never waits for the training's collectives.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, Any]], origin: TrainState, group: Any) -> None:
        self._tensors, self._group = tensors, group
        self._rank = dist.get_rank(group)
        self._origin = replace(origin, ranks=dist.get_world_size(group))
        self._pending: tuple[Path, TrainState, Any] | None = None  # the last is a future of writing

    def begin(self, step: int, metrics: dict[str, float], **more: Any) -> None:
        """Copy the tensors and begin to write them; a checkpoint that is still being written is reported before.

        Args:
            step: optimizer steps done.
            metrics: the last ones.
            more: other fields of the `TrainState`.
        """
        self.settle()
        # The state that belongs to the tensors of this step; it is reported with them later.
        state = replace(self._origin, step=step, metrics=metrics, **more)
        # Local to this worker: Ray Train copies it to the run's storage when it is reported.
        folder = Path(tempfile.mkdtemp(prefix="fewstep-checkpoint-"))
        # Returns when the tensors are copied to memory of their own, so that training may change them.
        future = dcp.async_save(dict(self._tensors()), checkpoint_id=str(folder), process_group=self._group)
        if self._rank == 0:
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
            checkpoint_upload_fn=self._upload,
        )
        self._pending = None

    def _upload(self, local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Copy this rank's files to the run's storage, and then their manifest."""
        return through_outages(lambda: self._copied(local, name), f"the checkpoint {name}")

    def _copied(self, local: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Copy, once."""
        import ray.train

        kept = ray.train.get_context().get_storage().persist_current_checkpoint(local, name)
        files = {path: _measured(Path(local.path, path)) for path in _files(Path(local.path))}
        place = Storage(kept.path, kept.filesystem, kept.path)
        place.settle(files)
        place.write(_manifest(self._rank), json.dumps(files, indent=1).encode())
        return kept

    def finish(self, step: int, export: Callable[[Path], None] | None, **more: Any) -> None:
        """Report the last checkpoint.

        Args:
            step: the run's last step.
            export: on rank 0, writes the trained model into the checkpoint's folder; None on other ranks.
            more: as for `begin`.
        """
        if self._pending is None:  # resumed at the last step: the export still has to be written
            self.begin(step, {}, **more)
        assert self._pending is not None
        if export is not None:
            export(self._pending[0])
        self.settle()


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint in a run's storage."""

    name: str
    """Of its folder."""
    state: TrainState | None
    """Its content beside the tensors; None if it can't be read."""
    fault: str | None
    """What keeps it from being whole, in words; None if it is."""


def saved_checkpoints(run: Storage) -> Iterator[SavedCheckpoint]:
    """The checkpoints of a run, newest first. Their tensors are not read.

    The newest is that of the latest step, which is taken from its state, or, if that can't be read, from its name.

    Args:
        run: the run's folder.

    Raises:
        UserError: the storage can't be reached.
    """
    sizes: dict[str, dict[str, int]] = {}
    for path, size in run.list().items():
        name, _, file = path.partition("/")
        if file and _NAME.fullmatch(name):
            sizes.setdefault(name, {})[file] = size
    states = {name: _state_in(run, name) for name in sizes}
    for name in sorted(sizes, key=lambda name: (_step(name, states[name]), name), reverse=True):
        if (state := states[name]) is None:
            yield SavedCheckpoint(name, None, _unreadable(STATE, sizes[name]))
        else:
            yield SavedCheckpoint(name, state, _fault(run, name, state.ranks, sizes[name]))


def _state_in(run: Storage, name: str) -> TrainState | None:
    """The state in a checkpoint of a run; None if it can't be read."""
    try:
        return TrainState.parse(run.read(f"{name}/{STATE}") or b"")
    except ValueError:
        return None


def _step(name: str, state: TrainState | None) -> int:
    """The step of a checkpoint: as its state has it, or else as the name of its folder."""
    if state is not None:
        return state.step
    match = _NAME.fullmatch(name)
    assert match is not None, "folders of other names are no checkpoints"
    return int(match["step"])


def _fault(run: Storage, name: str, ranks: int, sizes: Mapping[str, int]) -> str | None:
    """What keeps a checkpoint from being whole, in words; None if it is.

    Args:
        run: the run's folder.
        name: of the checkpoint's folder.
        ranks: how many have a manifest in it.
        sizes: bytes of each file in it.
    """
    wanted: dict[str, int] = {}
    # Before there were manifests: torch's own list of what lies where in the files.
    for listing in map(_manifest, range(ranks)) if ranks else [INDEX]:
        content = run.read(f"{name}/{listing}") or b""
        try:
            wanted |= _sizes_in_manifest(content) if ranks else _sizes_in_index(content)
        except Exception:  # pickle raises errors of every kind
            return _unreadable(listing, sizes)
    short = [file for file, size in wanted.items() if sizes.get(file, 0) < size]
    return f"its {short[0]} has {sizes.get(short[0], 0)} bytes of {wanted[short[0]]}" if short else None


def _unreadable(file: str, sizes: Mapping[str, int]) -> str:
    """Why a file of a checkpoint that has files of `sizes` can't be read, in words."""
    return f"its {file} is {'empty or torn' if file in sizes else 'missing'}"


def _sizes_in_manifest(content: bytes) -> dict[str, int]:
    """Name → bytes of the files of a rank."""
    return {file: int(size) for file, (size, _) in json.loads(content).items()}


def _sizes_in_index(content: bytes) -> dict[str, int]:
    """Name → bytes that each file has at least, by torch's list of tensors."""
    sizes: dict[str, int] = {}
    for part in read_index(content).storage_data.values():
        sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
    return sizes


def altered_file(folder: Path, group: Any) -> str | None:
    """Name of a file whose content is not what its manifest says; None if all are as they were written.

    The ranks share the work, and all get the same answer.

    Args:
        folder: of a checkpoint, on this machine.
        group: a process group of all ranks.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    listed = {
        file: tuple(measured)
        for manifest in sorted(folder.glob(_manifest("*")))
        for file, measured in json.loads(manifest.read_text()).items()
    }
    mine = sorted(listed)[rank::ranks]
    altered = [
        file for file in mine if not (folder / file).is_file() or _measured(folder / file) != listed[file]
    ]
    everywhere: list[list[str]] = [[] for _ in range(ranks)]
    dist.all_gather_object(everywhere, altered, group=group)
    return next((file for files in everywhere for file in files), None)


def _manifest(rank: int | str) -> str:
    """Name of the manifest of a rank, which maps the names of its files to `_measured`."""
    return f"manifest-{rank}.json"


def _files(folder: Path) -> list[str]:
    """Every file below a folder, relative to it."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _measured(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    size = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def read_state(folder: Path) -> TrainState:
    """The part of a checkpoint that are no tensors."""
    return TrainState.parse((folder / STATE).read_bytes())


def load_tensors(tensors: Mapping[str, Any], folder: Path) -> None:
    """Fill nested tensors in place from a checkpoint, which may be of another number of ranks.

    Raises:
        UserError: its list of tensors holds what is no data.
    """
    dcp.load(dict(tensors), storage_reader=IndexReader(folder))


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
