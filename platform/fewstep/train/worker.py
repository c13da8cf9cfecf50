"""The training loop, which every Ray Train worker runs: metrics, sample grids and checkpoints around a learner."""

from __future__ import annotations

import logging
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.data.encode import EncoderPool
from fewstep.data.stream import ShardStream
from fewstep.models.conditioning import Conditioning
from fewstep.models.family_code import FamilyCode
from fewstep.storage import through_outages
from fewstep.tracking.run import TrackedRun, Tracker
from fewstep.train import checkpoint as ckpt
from fewstep.train.drain import DrainNotice
from fewstep.train.gauges import RunGauges
from fewstep.train.grids import SampleGrids, SamplePlan
from fewstep.train.learner import Learner
from fewstep.train.progress import LossMeter, progress_line
from fewstep.train.recipe import DistillRecipe, TeacherRecipe
from fewstep.train.watch import Diverged, HealthWatch, TrainingStopped

EXPORT = "export"
"""Name of the folder in the final checkpoint that holds the trained model."""


@dataclass(frozen=True)
class WorkerJob:
    """What the driver sends to every worker."""

    recipe: DistillRecipe | TeacherRecipe
    """The recipe, with the data's absolute address."""
    null: Conditioning
    """The null condition of guidance (B = 1)."""
    samples: SamplePlan | None
    """What the sample grids show; None if there are to be none."""
    tracking: TrackedRun
    """The run's place in MLflow."""
    home: str
    """The driver's folder, to which the recipe's paths are relative."""
    reader: EncoderPool | None = None
    """Encodes the rows of a dataset that is not encoded yet."""
    code: FamilyCode | None = None
    """The user's file that registers the network's family, if there is one."""
    setbacks: int = 0
    """How often the run went back to an earlier checkpoint."""


@dataclass(frozen=True)
class EarlyEnd:
    """Why training stopped before its last step."""

    message: str
    """For the user; if the run diverged, without a remedy."""
    diverged_at: int | None = None
    """The step at which the run was found to diverge; None if something else is wrong."""


def train_worker(job: WorkerJob) -> EarlyEnd | None:
    """Train to the recipe's last step, from Ray Train's latest checkpoint if there is one.

    Returns:
        None, or why training stopped early. It is returned rather than raised, because after an exception Ray Train
        would restart from the last checkpoint and come to the same numbers.
    """
    try:
        _train(job)
    except TrainingStopped as reason:
        return EarlyEnd(str(reason), reason.step if isinstance(reason, Diverged) else None)
    return None


def _train(job: WorkerJob) -> None:
    import ray.train
    import torch.distributed as dist

    recipe, settings = job.recipe, job.recipe.train
    device = _prepare_process(job)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    learner = Learner(recipe, job.null, device, rank, world_size, job.setbacks)

    origin = ckpt.TrainState(0, settings.seed, job.tracking.run_id, recipe.model_dump(mode="json"))
    # A process group of its own: writing in the background must not wait for the training's collectives.
    group = dist.new_group(backend="gloo")
    checkpoints = ckpt.Checkpoints(learner.tensors, origin, group)
    tracker = Tracker.join(job.tracking) if rank == 0 else None  # only one worker reports to MLflow
    # Not the group of the checkpoints, whose messages are sent by another thread.
    unjudged = recipe.unjudged_steps if isinstance(recipe, DistillRecipe) else 0
    watch = HealthWatch(recipe.health, dist.new_group(backend="gloo"), tracker, unjudged)
    done = _resume(learner, watch, group)
    if tracker is not None and done:
        tracker.set_tags({"resumed_from_step": done})
    grids = SampleGrids(learner, watch, job.samples)

    stream = ShardStream(
        recipe.data.path,
        "train",
        batch_size=recipe.data.batch_size,
        seed=learner.draw_seed,
        parts=learner.share.parts,
        open_shards=recipe.data.open_shards,
        reading=recipe.data.reading,
        start_batch=done,
        reader=job.reader,
        stored=device.type != "cpu",  # half as much to copy; on CPUs the reading thread converts
    )
    notice = DrainNotice(dist.new_group(backend="gloo"))
    _loop(job, learner, stream, checkpoints, notice, watch, grids, done)

    # The end: the trained model, with the EMA's weights, goes into the last checkpoint. `whole` gathers shards, so all
    # ranks take part, although only rank 0 writes.
    weights = learner.averaged()
    export = (lambda folder: learner.objective.export(folder / EXPORT, weights)) if rank == 0 else None
    checkpoints.finish(settings.steps, export, **watch.state())
    if tracker is not None:
        tracker.flush(timeout=30)


def _prepare_process(job: WorkerJob) -> torch.device:
    """Set what holds for the whole process: folder, threads, the user's family; returns the device to train on."""
    import ray.train.torch

    _quiet_reports()
    # Ray Train starts workers in a folder of its own. On other machines the driver's may not exist.
    if Path(job.home).is_dir():
        os.chdir(job.home)
    torch.set_num_threads(job.recipe.train.threads)
    # Adam's second moments decay to denormal numbers, with which CPUs compute a hundred times slower.
    torch.set_flush_denormal(True)
    if job.code is not None:
        job.code.use()  # registers the user's family in this process
    return ray.train.torch.get_device() if job.recipe.train.gpu else torch.device("cpu")


def _resume(learner: Learner, watch: HealthWatch, group: Any) -> int:
    """Load Ray Train's latest checkpoint, if there is one; returns the optimizer steps that are done.

    Args:
        learner: gets the checkpoint's tensors.
        watch: gets what readings are compared with.
        group: a process group of all ranks, on CPUs.

    Raises:
        TrainingStopped: a file of the checkpoint is not what was written.
    """
    import ray.train

    if (latest := ray.train.get_checkpoint()) is None:
        return 0
    with ExitStack() as stack:
        folder = through_outages(
            lambda: stack.enter_context(latest.as_directory()), "going on from a checkpoint"
        )
        if (file := ckpt.altered_file(Path(folder), group)) is not None:
            raise TrainingStopped(
                f"{file} in its last checkpoint is not what was written there: delete the folder {latest.path}, and "
                "--resume goes on from the checkpoint before."
            )
        state = ckpt.read_state(Path(folder))
        watch.load(state.health, state.best)
        ckpt.load_tensors(learner.tensors(), Path(folder))
    if learner.rank == 0:
        print(f"resumed from the checkpoint of step {state.step}", flush=True)
    return state.step


def _loop(
    job: WorkerJob,
    learner: Learner,
    stream: ShardStream,
    checkpoints: ckpt.Checkpoints,
    notice: DrainNotice,
    watch: HealthWatch,
    grids: SampleGrids,
    done: int,
) -> None:
    """Take the optimizer steps after the `done` ones, with metrics, sample grids and checkpoints.

    Raises:
        Diverged: the run turns to noise, and the recipe doesn't have it go on.
    """
    recipe, settings = job.recipe, job.recipe.train
    source, meter = iter(stream), LossMeter(learner.device)
    gauges = RunGauges(recipe.name) if learner.rank == 0 else None
    due = False  # whether a checkpoint is to be written
    started = time.perf_counter()
    for step in range(done + 1, settings.steps + 1):
        lr = recipe.optimizer.lr * learner.set_lr(step)
        learner.step(step, source, meter)

        # Progress and metrics: the only place where the host waits for the device
        drained = notice.arrived()
        now = step % settings.checkpoint_every == 0 or step == settings.steps or drained
        due = due or now
        read = now or step % settings.log_every == 0 or step == 1
        try:
            if read:
                meter.sum_over_workers(learner.world_size)
                metrics = meter.read(recipe.data.batch_size, stream.seconds_waited)
                metrics |= {"train/learning_rate": lr}
                stream.seconds_waited = 0.0
                if gauges is not None:
                    gauges.show(step, metrics)
                    print(
                        progress_line(recipe.name, step, done, settings.steps, started, metrics), flush=True
                    )
                metrics = watch.read(step, metrics, meter.suspect_rows)
            grids.after(step, checkpoints.settle)
        except Diverged:
            checkpoints.settle()  # the last good checkpoint has to be complete before the run ends
            raise

        # Checkpoints: writing begins here, and has long ended when it is reported some steps later. They wait while the
        # run may be turning to noise, so that the last one is always one to go back to.
        if read and due and (watch.good or step == settings.steps):
            due = False
            checkpoints.begin(step, metrics, **watch.state())
            if drained:  # there is no later for this one
                checkpoints.settle()
                if learner.rank == 0:
                    print(f"a node is about to go: the checkpoint of step {step} is complete", flush=True)
        elif step % settings.log_every == 0:
            checkpoints.settle()


def _quiet_reports() -> None:
    """Silence the lines that Ray Train logs for each checkpoint, which would stand between the lines of progress."""
    for module in ("context", "storage"):
        logging.getLogger(f"ray.train.v2._internal.execution.{module}").setLevel(logging.WARNING)
