"""The driver's part of a run: validation, the run's record, Ray Train, and fetching the trained model."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fewstep.cluster import told_own_cluster
from fewstep.data.encode import EncoderPool
from fewstep.data.schema import DatasetInfo
from fewstep.data.stream import read_split
from fewstep.encoders import load_encoder
from fewstep.errors import DivergenceError, UserError
from fewstep.models.family_code import code_of
from fewstep.storage import Storage
from fewstep.student.card import read_student_card, write_student_card
from fewstep.tracking import spool_folder
from fewstep.tracking.run import TrackedRun, Tracker, has_run
from fewstep.tracking.version import run_tags
from fewstep.train.checkpoint import TrainState, read_state
from fewstep.train.grids import SamplePlan
from fewstep.train.health import HealthConfig
from fewstep.train.preview import BestStudent
from fewstep.train.recipe import DistillRecipe, TeacherRecipe, TrainConfig, network_section
from fewstep.train.recovery import recover
from fewstep.train.runs import EXPORTS, RunRecord, last_checkpoint, record_file, run_folder
from fewstep.train.setbacks import Setback, go_back, read_setbacks
from fewstep.train.validation import check
from fewstep.train.worker import EXPORT, EarlyEnd, WorkerJob, train_worker

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

RESIZE_SECONDS = 60.0
"""Time between two looks whether the cluster has grown or shrunk, for runs of [fewest, most] workers."""

START_SECONDS = 60.0
"""How long Ray Train waits for its workers to start, before it tries again; RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S
changes it."""

LOOK_SECONDS = 0.5
"""Time between two looks of Ray Train at its workers; RAY_TRAIN_HEALTH_CHECK_INTERVAL_S changes it. A report waits for
the one before to be seen, and a run ends some looks after its last step: with Ray's own 2 s, five seconds after it."""

PREVIEW_CAPTIONS = 32
"""Number of held-out captions in the sample grids."""


@dataclass(frozen=True)
class TrainedModel:
    """The results of a finished run."""

    run_name: str
    """Name of the run."""
    folder: Path
    """The exported model, on this machine."""
    checkpoint: str
    """Address of the last checkpoint."""
    mlflow_run: str
    """Id of the run in MLflow."""
    metrics: dict[str, float]
    """The last metrics that were reported."""


def fit(recipe: DistillRecipe | TeacherRecipe, run_name: str | None = None) -> TrainedModel:
    """Train on the connected Ray cluster, or resume a run.

    Args:
        recipe: what to train.
        run_name: name of the run and of its folder in `train.storage`. If the run exists there, it is resumed from its
            last checkpoint, in the same MLflow run.

    Raises:
        UserError: see `check`; the run has no whole checkpoint any more, or one of a later step than the recipe's last;
            workers died more often than the recipe allows; or Ray Train's controller died.
        DivergenceError: the loss became infinite, NaN or far too large.
    """
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import TrainingFailedError

    info = check(recipe)
    run_name = run_name or f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    resolved = recipe.model_dump(mode="json")
    begun = recover(run := run_folder(recipe.train.storage, run_name))
    if begun is not None and begun.step > recipe.train.steps:
        raise UserError(
            f"--resume: run {run_name!r} can't end at step {recipe.train.steps}, its last checkpoint is of step "
            f"{begun.step}: set train.steps to that or more."
        )
    # Checkpoints have the data's absolute address.
    ours = resolved | {"data": resolved["data"] | {"path": info.root}}
    if begun is not None and (changed := _changed(begun.recipe, ours)):
        print(f"--resume: goes on with other settings than it began with: {', '.join(changed)}", flush=True)
    tracker = Tracker.start(
        uri=recipe.tracking.uri,
        experiment=recipe.tracking.experiment,
        run_name=run_name,
        params=resolved,
        tags=run_tags() | {"recipe": recipe.name} | _parent(recipe),
        spool=spool_folder(),
        run_id=_mlflow_run(recipe, run_name, begun),
    )
    with tracker:
        # Before training begins, so that a run that is killed at any time can be resumed by its name.
        RunRecord(tracker.run_id, Storage.at(recipe.train.storage).root).save(run_name, recipe)
        tracker.log_json(resolved, "recipe.json")
        tracker.flush()
        print(f"run {run_name}; if it is ended, --resume {run_name} goes on with it", flush=True)
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(LOOK_SECONDS))
        try:
            with told_own_cluster(), _reader(recipe, info) as reader:
                result = _train(recipe, run_name, info, tracker, reader)
        except TrainingFailedError as error:
            way_on = _way_on(recipe, run_name, begun)
            reason = _no_room(error, recipe.train) or _root_cause(error)
            raise UserError(f"run {run_name} failed: {reason.rstrip('.')}; {way_on}.") from error
        except RayActorError as error:
            raise UserError(
                f"run {run_name} failed: Ray Train's controller, a process on this machine, was killed or ran out of "
                f"memory; {_way_on(recipe, run_name, begun)}."
            ) from error
        folder = EXPORTS / run_name
        _fetch_export(result.checkpoint, folder, run)
    if isinstance(recipe, DistillRecipe):
        # The worker's copy of the recipe has the data's absolute address; a published card should not show the folders
        # of this machine.
        card = read_student_card(folder).model_copy(update={"recipe": resolved})
        write_student_card(card, folder)
    metrics = {k: float(v) for k, v in (result.metrics or {}).items() if isinstance(v, (int, float))}
    return TrainedModel(run_name, folder, cast(Any, result).checkpoint.path, tracker.run_id, metrics)


def _train(
    recipe: DistillRecipe | TeacherRecipe,
    run_name: str,
    info: DatasetInfo,
    tracker: Tracker,
    reader: EncoderPool | None,
) -> Any:
    """Train to the last step, from the last good checkpoint again if the run diverges; returns Ray Train's result.

    Raises:
        DivergenceError: the run diverged and may not go back, or not once more.
        UserError: something else stopped it.
    """
    run, config = run_folder(recipe.train.storage, run_name), recipe.health
    while True:
        setbacks = read_setbacks(run)
        if setbacks:
            print(_told(setbacks, config), flush=True)
            tracker.set_tags({"health.times_back": len(setbacks)})
        trainer = _ray_trainer(recipe, run_name, info, tracker.run, reader, len(setbacks))
        # Ray Train v2's results and settings have fields that its type annotations, those of v1, lack.
        result = cast(Any, trainer.fit())
        end: EarlyEnd | None = result.return_value
        if end is None:
            return result
        if end.diverged_at is None:
            raise UserError(f"run {run_name} stopped: {end.message}")
        if config.on_divergence != "go_back" or len(setbacks) >= config.go_back_times:
            again = f" again, after it had gone back {_times(len(setbacks))}" if setbacks else ""
            raise DivergenceError(
                f"run {run_name} diverged{again}: {end.message}: lower optimizer.lr or optimizer.max_grad_norm, or "
                f"look at the data, and go on with --resume {run_name}; the last good checkpoint is kept."
            )
        setback = go_back(run, end.diverged_at, end.message)
        tracker.log_metrics({"health/went_back_to": setback.back_to}, end.diverged_at)
        recover(run)


def _parent(recipe: DistillRecipe | TeacherRecipe) -> dict[str, str]:
    """The tag by which MLflow shows a run below another."""
    parent = recipe.tracking.parent_run
    return {} if parent is None else {"mlflow.parentRunId": parent}


def _told(setbacks: list[Setback], config: HealthConfig) -> str:
    """A line about a run that went back."""
    where = f"the checkpoint of step {setbacks[-1].back_to}" if setbacks[-1].back_to else "its beginning"
    return (
        f"health: the run went back {_times(len(setbacks))}, the last time from step {setbacks[-1].found} to {where}; "
        f"learning rates are {config.lr_factor ** len(setbacks):g} of the recipe's, and random numbers are others"
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _changed(before: Any, now: Any, name: str = "") -> list[str]:
    """The settings of a recipe that differ from those of another, as `data.batch_size=6 (was 4)`."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            change
            for key in now
            if key in before  # an older version did not know the others
            for change in _changed(before[key], now[key], f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [f"{name}={now} (was {before})"]


def _mlflow_run(recipe: DistillRecipe | TeacherRecipe, run_name: str, begun: TrainState | None) -> str | None:
    """Id of the MLflow run to continue: from the current folder's record, or else from the checkpoints; or None."""
    if (record := RunRecord.of(run_name)) is not None:
        return record.mlflow_run
    known = begun.mlflow_run if begun is not None and has_run(recipe.tracking.uri, begun.mlflow_run) else None
    if (file := record_file(run_name)).exists():
        goes_on = f"in MLflow run {known}, which its checkpoint names" if known else "in a new MLflow run"
        print(f"{file} is empty or torn: the run goes on {goes_on}", flush=True)
    return known


def _way_on(recipe: DistillRecipe | TeacherRecipe, run_name: str, begun: TrainState | None) -> str:
    """What a user may do after a run failed; resuming alone is not it where the same would happen again.

    Args:
        recipe, run_name: of the run.
        begun: the state that it was resumed from.
    """
    try:
        last = last_checkpoint(recipe.train.storage, run_name)
    except UserError as error:  # where the storage is away, that is the thing to mend
        return f"and {str(error).rstrip('.')}"
    if last is None or last.state is None:
        return f"it has no checkpoint yet: mend the cause, and begin it again with --resume {run_name}"
    if begun is not None and last.state.step <= begun.step:
        folder = run_folder(recipe.train.storage, run_name).root
        return (
            f"it came to no checkpoint after that of step {begun.step}, from which it was resumed: mend the cause "
            f"before you resume it again, or delete {folder}/{last.name} to go on from the one before"
        )
    return f"continue it from its last checkpoint with --resume {run_name}"


@contextmanager
def _reader(recipe: DistillRecipe | TeacherRecipe, info: DatasetInfo) -> Iterator[EncoderPool | None]:
    """The encoders of a dataset of raw rows, which end with the training; None for one that is encoded."""
    if info.raw is None:
        yield None
        return
    if isinstance(recipe, DistillRecipe) and recipe.data_free:
        info = replace(info, has_latents=False)  # captions are all that it uses: no image need be read
    pool = EncoderPool.start(info, recipe.data.encoders, recipe.data.cache)
    try:
        yield pool
    finally:
        pool.stop()


def _ray_trainer(
    recipe: DistillRecipe | TeacherRecipe,
    run_name: str,
    info: DatasetInfo,
    tracking: TrackedRun,
    reader: EncoderPool | None,
    setbacks: int = 0,
) -> TorchTrainer:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    settings, storage = recipe.train, Storage.at(recipe.train.storage)
    # Everything that workers need is computed here once, and sent to them.
    job = WorkerJob(
        recipe=recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": info.root})}),
        null=load_encoder(info.encoding.text_encoder, max_tokens=info.encoding.max_tokens).null(),
        samples=_sample_plan(info) if settings.sample_every or _measures(recipe) else None,
        setbacks=setbacks,
        reader=reader,
        code=code_of(network_section(recipe).family),
        home=str(Path.cwd()),
        tracking=tracking,
    )
    return TorchTrainer(
        # As a part of the function, which only workers unpickle. Its configuration would be unpickled by Ray Train's
        # controller, too, which would import all that the workers need before it starts them.
        cast(Any, partial(train_worker, job)),  # Ray's annotations know no function that returns something
        scaling_config=cast(Any, ray.train.ScalingConfig)(
            num_workers=settings.workers,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=settings.gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if settings.gpu else "gloo"),
        run_config=cast(Any, ray.train.RunConfig)(
            name=run_name,
            # Not an address: Ray would read it as a URI, and decode it.
            storage_path=storage.base,
            storage_filesystem=storage.filesystem,
            failure_config=cast(Any, ray.train.FailureConfig)(
                max_failures=settings.max_failures, controller_failure_limit=_start_attempts(settings) - 1
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            worker_runtime_env={"env_vars": worker_environment(settings)},
        ),
    )


def _start_attempts(settings: TrainConfig) -> int:
    """How often Ray Train may try to start the workers; by default it would try without end."""
    each = float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_SECONDS))
    return max(1, round(60 * settings.wait_minutes / each))


def worker_environment(settings: TrainConfig) -> dict[str, str]:
    """Environment variables that a worker's process has to be started with.

    Threads that wait spin only for a short time: with other processes on the same cores (Ray's own, the data pipeline),
    libgomp's default makes a step up to ten times slower. Freed memory is kept, up to 1 GB, instead of being returned
    to the system and mapped again at every operation, which takes 10 to 15 % of a small model's step; but not blocks of
    16 MB and more, in which FSDP gathers a large model: kept, they leave gaps of more than twice the model's size.
    Lines that a worker prints are printed once, where Ray Train's print patch would repeat them.
    """
    return {
        "OMP_NUM_THREADS": str(settings.threads),
        "GOMP_SPINCOUNT": "1000",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 24),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }


def _sample_plan(info: DatasetInfo) -> SamplePlan:
    """The conditions of sample grids: held-out ones, if there are any."""
    # Of one latent shape, as a grid's images are generated in one batch.
    split = "held_out" if "held_out" in info.splits else "train"
    shape = next(iter(info.buckets(split)))
    batch = read_split(info.root, split, PREVIEW_CAPTIONS, shape=shape)
    return SamplePlan(batch.conditioning, shape, info.encoding.autoencoder, batch.latent)


def _measures(recipe: DistillRecipe | TeacherRecipe) -> bool:
    """Whether the student is measured while it trains."""
    return isinstance(recipe, DistillRecipe) and recipe.evaluation.every > 0


def _fetch_export(checkpoint: Any, folder: Path, run: Storage) -> None:
    """Copy the trained model into a folder on this machine: out of the last checkpoint, or the best student.

    Args:
        checkpoint: the last one.
        folder: where to.
        run: the run's folder in its storage.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with checkpoint.as_directory() as local:
        state = read_state(Path(local))
        best = BestStudent.of(state.best)
        if best is None or best.step == state.step or not run.copy_to(folder, best.folder):
            shutil.copytree(Path(local) / EXPORT, folder)
            return
    print(
        f"the student of step {best.step} is taken: its held-out paired distance, {best.distance:.4g}, is clearly less "
        f"than after step {state.step}",
        flush=True,
    )


def _no_room(error: BaseException, settings: TrainConfig) -> str | None:
    """What is wrong if the cluster has no room for the workers; None if something else is."""
    # By its name, as Ray has the class in a private module.
    if type(getattr(error, "controller_failure", None)).__name__ != "WorkerGroupStartupTimeoutError":
        return None
    each = f"{settings.cpus_per_worker:g} CPUs" + (" and a GPU" if settings.gpu else "")
    return (
        f"for {settings.wait_minutes:g} minutes the cluster had no room for {settings.fewest_workers} workers of "
        f"{each} each: add a node (`ray status` shows what there is), lower train.workers, or let it wait longer with "
        "train.wait_minutes"
    )


def _root_cause(error: BaseException) -> str:
    """What went wrong in the first worker that failed, in one line."""
    # Ray's own message has whole tracebacks in it; their last line is the error.
    failures = getattr(error, "worker_failures", None) or {0: error.__cause__ or error}
    first = next(iter(failures.values()))
    return f"{type(first).__name__}: {str(first).strip().splitlines()[-1] if str(first).strip() else 'worker died'}"
