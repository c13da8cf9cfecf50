"""The driver's side of a run: the door, the record, Ray Train, and the trained model brought home."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.data.schema import DatasetInfo
from fewstep.data.storage import Storage
from fewstep.data.stream import read_split
from fewstep.errors import UserError
from fewstep.models.family_code import code_of
from fewstep.tracking.run import TrackedRun, Tracker, has_run
from fewstep.train.checks import check
from fewstep.train.recipe import DistillRecipe, TeacherRecipe, TrainSection, network_section
from fewstep.train.runs import RunRecord, last_state
from fewstep.train.worker import EXPORT, Preview, WorkerJob, train_worker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

PREVIEW_CAPTIONS = 32
"""Held-out captions in the sample grids."""


@dataclass(frozen=True)
class TrainedModel:
    """What a run leaves behind."""

    run_name: str
    folder: Path
    """The exported model, on this machine."""
    checkpoint: str
    """Address of the last checkpoint."""
    mlflow_run: str
    metrics: dict[str, float]


def fit(recipe: DistillRecipe | TeacherRecipe, run_name: str | None = None) -> TrainedModel:
    """Train on the connected Ray cluster, or continue the run of that name.

    Args:
        recipe: what to train.
        run_name: name of the run and of its folder under `train.storage`; if it exists there, it is
            continued from its last checkpoint under the same MLflow run.

    Raises:
        UserError: see `check`; the loss became non-finite; or workers died more often than allowed.
    """
    from ray.train.v2.api.exceptions import TrainingFailedError

    from fewstep.export.pipeline import read_student_card, write_card
    from fewstep.tracking.version import run_tags

    info = check(recipe)
    run_name = run_name or f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    resolved = recipe.model_dump(mode="json")
    tracker = Tracker.start(
        uri=recipe.tracking.uri,
        experiment=recipe.tracking.experiment,
        run_name=run_name,
        params=resolved,
        tags=run_tags() | {"recipe": recipe.name},
        spool=spool(),
        run_id=_mlflow_run(recipe, run_name),
    )
    with tracker:
        RunRecord(tracker.run_id, Storage.at(recipe.train.storage).root).save(run_name, recipe)
        tracker.log_json(resolved, "recipe.json")
        tracker.flush()
        try:
            result = _ray_trainer(recipe, run_name, info, tracker.run).fit()
        except TrainingFailedError as error:
            raise UserError(
                f"run {run_name} failed: {_root_cause(error)}; "
                f"continue it from its last checkpoint with --resume {run_name}."
            ) from error
        if (stopped := result.return_value) is not None:
            raise UserError(f"run {run_name} stopped: {stopped}")
        folder = Path(".fewstep") / "models" / run_name
        _fetch_export(result.checkpoint, folder)
    if isinstance(recipe, DistillRecipe):
        # Workers were told the data's absolute address, which is nobody's business.
        write_card(replace(read_student_card(folder), recipe=resolved), folder)
    metrics = {k: float(v) for k, v in (result.metrics or {}).items() if isinstance(v, (int, float))}
    return TrainedModel(run_name, folder, result.checkpoint.path, tracker.run_id, metrics)


def _mlflow_run(recipe: DistillRecipe | TeacherRecipe, run_name: str) -> str | None:
    """The MLflow run to continue: of this folder's record, or of a checkpoint that was made from another one."""
    if (record := RunRecord.of(run_name)) is not None:
        return record.mlflow_run
    state = last_state(recipe.train.storage, run_name)
    return state.mlflow_run if state is not None and has_run(recipe.tracking.uri, state.mlflow_run) else None


def _ray_trainer(
    recipe: DistillRecipe | TeacherRecipe, run_name: str, info: DatasetInfo, tracking: TrackedRun
) -> TorchTrainer:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from fewstep.data.encoder import load_encoder

    settings = recipe.train
    job = WorkerJob(
        recipe=recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": info.root})}),
        null=load_encoder(info.encoding.text_encoder, max_tokens=info.encoding.max_tokens).null(),
        preview=_preview(info) if settings.sample_every else None,
        code=code_of(network_section(recipe).family),
        home=str(Path.cwd()),
        tracking=tracking,
    )
    return TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if settings.gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name=run_name,
            storage_path=Storage.at(settings.storage).root,
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            worker_runtime_env={"env_vars": worker_environment(settings)},
        ),
    )


def worker_environment(settings: TrainSection) -> dict[str, str]:
    """What must stand in a worker's environment before its process starts.

    Threads that wait spin only shortly: beside any other process on the same cores (Ray's own, the data
    pipeline), libgomp's default makes a step up to ten times slower. Freed memory is kept instead of handed
    back to the system and faulted in again at every operation: 15 % of a small model's step. And lines a
    worker prints are printed once: Ray Train's print patch repeats them.
    """
    keep = str(1 << 33)
    return {
        "OMP_NUM_THREADS": str(settings.threads),
        "GOMP_SPINCOUNT": "1000",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": keep,
        "MALLOC_TRIM_THRESHOLD_": keep,
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }


def _preview(info: DatasetInfo) -> Preview:
    split = "held_out" if "held_out" in info.splits else "train"
    shape = next(iter(info.buckets(split)))
    batch = read_split(info.root, split, PREVIEW_CAPTIONS, shape=shape)
    return Preview(batch.conditioning, shape, info.encoding.autoencoder)


def _fetch_export(checkpoint: Any, folder: Path) -> None:
    with checkpoint.as_directory() as local:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(Path(local) / EXPORT, folder)


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error.__cause__ or error}
    first = next(iter(failures.values()))
    return f"{type(first).__name__}: {str(first).strip().splitlines()[-1] if str(first).strip() else 'worker died'}"


def spool() -> Path:
    """Where what MLflow has not taken yet is kept."""
    return Path(".fewstep/spool").absolute()
