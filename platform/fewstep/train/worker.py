"""The training loop, which every Ray Train worker runs: sample grids, metrics and checkpoints around a learner."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.config import Shape
from fewstep.data.encode import EncoderPool
from fewstep.data.stream import ShardStream
from fewstep.encoders import load_autoencoder
from fewstep.evaluate.grid import sample_grid
from fewstep.flow import gaussian_noise
from fewstep.models.conditioning import Conditioning
from fewstep.models.family_code import FamilyCode
from fewstep.models.sharded import whole
from fewstep.tracking.run import TrackedRun, Tracker
from fewstep.train import checkpoint as ckpt
from fewstep.train.drain import DrainNotice
from fewstep.train.learner import Learner
from fewstep.train.parallel import drop_gathered
from fewstep.train.progress import LossMeter, progress_line
from fewstep.train.recipe import DistillRecipe, TeacherRecipe

EXPORT = "export"
"""Name of the folder in the final checkpoint that holds the trained model."""


@dataclass(frozen=True)
class SamplePlan:
    """What a run's sample grids show."""

    conditioning: Conditioning
    """The conditions, one per image."""
    shape: Shape
    """(C, H, W) of the latents."""
    autoencoder: str
    """Name of the autoencoder that decodes them."""


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


class TrainingStopped(Exception):
    """Training can't go on; the message is for the user."""


def train_worker(job: WorkerJob) -> str | None:
    """Train to the recipe's last step, from Ray Train's latest checkpoint if there is one.

    Returns:
        None, or the reason why training stopped early. It is returned rather than raised, because after an exception
        Ray Train would restart from the last checkpoint and come to the same numbers.
    """
    try:
        _train(job)
    except TrainingStopped as reason:
        return str(reason)
    return None


def _train(job: WorkerJob) -> None:
    import ray.train
    import torch.distributed as dist

    recipe, settings = job.recipe, job.recipe.train
    device = _prepare_process(job)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    learner = Learner(recipe, job.null, device, rank, world_size)

    origin = ckpt.TrainState(0, settings.seed, job.tracking.run_id, recipe.model_dump(mode="json"))
    # A process group of its own: writing in the background must not wait for the training's collectives.
    group = dist.new_group(backend="gloo")
    checkpoints = ckpt.Checkpoints(learner.tensors, origin, group)
    done = _resume(learner, group)

    tracker = None
    if rank == 0:  # only one worker reports to MLflow
        tracker = Tracker.join(job.tracking)
        if done:
            tracker.set_tags({"resumed_from_step": done})

    stream = ShardStream(
        recipe.data.path,
        "train",
        batch_size=recipe.data.batch_size,
        seed=settings.seed,
        parts=learner.share.parts,
        open_shards=recipe.data.open_shards,
        reading=recipe.data.reading,
        start_batch=done,
        reader=job.reader,
        stored=device.type != "cpu",  # half as much to copy; on CPUs the reading thread converts
    )
    _loop(job, learner, stream, checkpoints, DrainNotice(dist.new_group(backend="gloo")), tracker, done)

    # The end: the trained model, with the EMA's weights, goes into the last checkpoint. `whole` gathers shards, so all
    # ranks take part, although only rank 0 writes. They send shards from their GPUs, also where the host keeps the EMA.
    weights = {name: whole(ema.to(device)).cpu() for name, ema in learner.ema.state_dict().items()}
    export = (lambda folder: learner.objective.export(folder / EXPORT, weights)) if rank == 0 else None
    checkpoints.finish(settings.steps, export)
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


def _resume(learner: Learner, group: Any) -> int:
    """Load Ray Train's latest checkpoint, if there is one; returns the optimizer steps that are done.

    Args:
        learner: gets the checkpoint's tensors.
        group: a process group of all ranks, on CPUs.

    Raises:
        TrainingStopped: a file of the checkpoint is not what was written.
    """
    import ray.train

    if (latest := ray.train.get_checkpoint()) is None:
        return 0
    with latest.as_directory() as folder:
        if (file := ckpt.altered_file(Path(folder), group)) is not None:
            raise TrainingStopped(
                f"{file} in its last checkpoint is not what was written there: delete the folder {latest.path}, and "
                "--resume goes on from the checkpoint before."
            )
        done = ckpt.read_state(Path(folder)).step
        ckpt.load_tensors(learner.tensors(), Path(folder))
    if learner.rank == 0:
        print(f"resumed from the checkpoint of step {done}", flush=True)
    return done


def _loop(
    job: WorkerJob,
    learner: Learner,
    stream: ShardStream,
    checkpoints: ckpt.Checkpoints,
    notice: DrainNotice,
    tracker: Tracker | None,
    done: int,
) -> None:
    """Take the optimizer steps after the `done` ones, with sample grids, metrics and checkpoints.

    Raises:
        TrainingStopped: a loss or gradient is not finite.
    """
    recipe, settings = job.recipe, job.recipe.train
    source, meter = iter(stream), LossMeter(learner.device)
    started = time.perf_counter()
    for step in range(done + 1, settings.steps + 1):
        # Sample grids: by all ranks if the model is sharded, as each holds a part of it; otherwise by rank 0
        samplers = learner.sharded or learner.rank == 0
        if job.samples and samplers and (step - 1) % settings.sample_every == 0 and step > 1:
            latents = sample(learner, job.samples)
            if tracker is not None:
                pixels = load_autoencoder(job.samples.autoencoder).decode(latents).numpy()
                tracker.log_image(sample_grid(pixels, columns=8), f"samples/step-{step - 1:06d}.png")

        lr = recipe.optimizer.lr * learner.set_lr(step)
        learner.step(step, source, meter)

        # Progress and metrics: the only place where the host waits for the device
        drained = notice.arrived()
        save = step % settings.checkpoint_every == 0 or step == settings.steps or drained
        if step % settings.log_every == 0 or save or step == 1:
            meter.sum_over_workers(learner.world_size)
            metrics = meter.read(recipe.data.batch_size, stream.seconds_waited) | {"train/learning_rate": lr}
            stream.seconds_waited = 0.0
            if metrics["train/non_finite"]:
                checkpoints.settle()  # the last good checkpoint has to be complete before the run ends
                raise TrainingStopped(_non_finite(step, metrics))
            if tracker is not None:
                print(progress_line(recipe.name, step, done, settings.steps, started, metrics), flush=True)
                tracker.log_metrics(metrics, step)

        # Checkpoints: writing begins here, and has long ended when it is reported some steps later
        if save:
            checkpoints.begin(step, metrics)
            if drained:  # there is no later for this one
                checkpoints.settle()
                if learner.rank == 0:
                    print(f"a node is about to go: the checkpoint of step {step} is complete", flush=True)
        elif step % settings.log_every == 0:
            checkpoints.settle()


@torch.no_grad()
def sample(learner: Learner, plan: SamplePlan) -> Tensor:
    """Latents (B, C, H, W) of the plan's conditions, with the EMA's weights, from noise that is the same in every call.

    Args:
        learner: has the model, and samples it.
        plan: conditions and shape.
    """
    objective, device, conditioning = learner.objective, learner.device, plan.conditioning
    generator = torch.Generator().manual_seed(learner.recipe.train.seed)
    noise = gaussian_noise((len(conditioning), *plan.shape), generator)
    objective.model.eval()
    latents = []
    with learner.ema.swapped():
        drop_gathered(objective.model)  # FSDP may still hold the weights from before the swap
        for first in range(
            0, len(noise), learner.share.largest
        ):  # so that it takes no more memory than training
            part = slice(first, first + learner.share.largest)
            latents.append(objective.sample(noise[part].to(device), conditioning[part].to(device)).cpu())
    drop_gathered(objective.model)
    objective.model.train()
    return torch.cat(latents)


def _non_finite(step: int, metrics: dict[str, float]) -> str:
    """The message about a loss or gradient that is not finite."""
    return (
        f"loss or gradient became infinite or NaN at or before step {step} (last loss {metrics['train/loss']:.4g}, "
        f"gradient norm {metrics['train/gradient_norm']:.4g}): lower optimizer.lr or optimizer.max_grad_norm; the last "
        "good checkpoint is kept."
    )


def _quiet_reports() -> None:
    """Silence the lines that Ray Train logs for each checkpoint, which would stand between the lines of progress."""
    for module in ("context", "storage"):
        logging.getLogger(f"ray.train.v2._internal.execution.{module}").setLevel(logging.WARNING)
