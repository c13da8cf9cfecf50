"""The training loop that every Ray Train worker runs, top to bottom.

A step's draws come from generators seeded by (seed, rank, micro-batch), so a resumed run is the
uninterrupted run: bit for bit in float32 on a CPU.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.autoencoder import load_autoencoder
from fewstep.data.schema import Shape
from fewstep.data.stream import Batch, ShardStream
from fewstep.distill import PowerEMA
from fewstep.evaluate.grid import sample_grid
from fewstep.flow import gaussian_noise
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family_code import FamilyCode
from fewstep.models.sharded import whole
from fewstep.tracking.run import TrackedRun, Tracker
from fewstep.train import checkpoint as ckpt
from fewstep.train.objectives import Objective, build_objective
from fewstep.train.optimizers import build_optimizers, rate_share
from fewstep.train.parallel import average_gradients, drop_gathered, is_sharded, shard
from fewstep.train.progress import Meter, progress_line
from fewstep.train.recipe import DistillRecipe, TeacherRecipe

EXPORT = "export"
"""Folder of the trained model inside the final checkpoint."""


@dataclass(frozen=True)
class Preview:
    """The samples that a run draws now and then."""

    conditioning: TextConditioning
    shape: Shape
    """Of the latents, (C, H, W)."""
    autoencoder: str


@dataclass(frozen=True)
class WorkerJob:
    """What the driver hands to every worker."""

    recipe: DistillRecipe | TeacherRecipe
    null: TextConditioning
    """The empty caption (B = 1)."""
    preview: Preview | None
    """What the sample grids show; None for none."""
    tracking: TrackedRun
    """The run's place in MLflow."""
    home: str
    """The driver's folder, which the recipe's relative paths start from."""
    code: FamilyCode | None = None
    """The user's file that registers the network's family, if it came as one."""


def train_worker(job: WorkerJob) -> str | None:
    """Train until the recipe's last step, resuming from Ray Train's latest checkpoint if there is one.

    Returns None, or why training stopped early for good: an exception would make Ray Train restart from the
    last checkpoint, into the same numbers.
    """
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    _quiet_reports()
    # Ray Train has moved to a folder of the run's; other machines may not have the driver's.
    if Path(job.home).is_dir():
        os.chdir(job.home)
    recipe, settings = job.recipe, job.recipe.train
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(settings.threads)
    torch.set_flush_denormal(True)
    device = ray.train.torch.get_device() if settings.gpu else torch.device("cpu")

    # Model, optimizer, average
    if job.code is not None:
        job.code.use()
    sharded = is_sharded(settings, world_size)
    objective = build_objective(recipe, job.null, device, sharded)
    shard(objective, settings, world_size)
    objective.read_weights(device)
    parameters = objective.parameters()
    blocks = objective.family.blocks(objective.transformer)
    optimizers = build_optimizers(parameters.values(), blocks, recipe.optimizer)
    average = PowerEMA(parameters, recipe.optimizer.ema_gamma)

    def tensors() -> dict[str, Any]:
        slots = ckpt.optimizer_tensors(optimizers, parameters)
        return {"model": parameters, "average": average.state_dict(), "optimizer": slots}

    origin = ckpt.TrainState(0, settings.seed, job.tracking.run_id, recipe.model_dump(mode="json"))
    checkpoints = ckpt.Checkpoints(tensors, origin, dist.new_group(backend="gloo"))

    # Resume
    done = 0
    if (latest := ray.train.get_checkpoint()) is not None:
        with latest.as_directory() as folder:
            done = ckpt.read_state(Path(folder)).step
            if done > settings.steps:
                return f"its last checkpoint is of step {done}: set train.steps to that or more."
            ckpt.load_tensors(tensors(), Path(folder))
        if rank == 0:
            print(f"resumed from the checkpoint of step {done}", flush=True)
    # Exact for the same number of workers; otherwise the stream goes on at about the same place.
    batches = done * settings.accumulate

    tracker = None
    if rank == 0:
        tracker = Tracker.join(job.tracking)
        if done:
            tracker.set_tags({"resumed_from_step": done})

    batch_size = recipe.data.batch_size // (world_size * settings.accumulate)
    stream = ShardStream(
        recipe.data.path,
        "train",
        batch_size=batch_size,
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
        start_batch=batches,
    )
    source = iter(stream)
    meter = Meter(device)
    generator = torch.Generator()  # on the CPU: draws are then the same on every device
    started = time.perf_counter()

    for step in range(done + 1, settings.steps + 1):
        # Now and then: samples, by all ranks where they hold the model together
        if job.preview and (step - 1) % settings.sample_every == 0 and step > 1 and (sharded or rank == 0):
            latents = sample(objective, average, job.preview, settings.seed, device, batch_size)
            if tracker is not None:
                pixels = load_autoencoder(job.preview.autoencoder).decode(latents).numpy()
                tracker.log_image(sample_grid(pixels, columns=8), f"samples/step-{step - 1:06d}.png")

        # The step
        share = rate_share(recipe.optimizer, step, settings.steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak_rate"]
        for _ in range(settings.accumulate):
            seed_step(generator, settings.seed, rank, batches)
            batch = to_device(next(source), device)
            for result in objective.losses(batch, generator, step):
                (result.loss / settings.accumulate).backward()
                meter.add(result)
            batches += 1
        average_gradients(parameters.values(), settings, world_size)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.optimizer.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(step)
        meter.norm(whole(norm))

        # Now and then: progress and metrics (the one place where the host waits for the device)
        save = step % settings.checkpoint_every == 0 or step == settings.steps
        if step % settings.log_every == 0 or save or step == 1:
            metrics = meter.read(recipe.data.batch_size, stream.seconds_waited)
            stream.seconds_waited = 0.0
            metrics["train/learning_rate"] = share * recipe.optimizer.rate
            if metrics["train/non_finite"]:
                checkpoints.settle()
                return _non_finite(step, metrics)
            if rank == 0:
                print(progress_line(recipe.name, step, done, settings.steps, started, metrics), flush=True)
            if tracker is not None:
                tracker.log_metrics(metrics, step)

        # Now and then: a checkpoint begins here, and is reported some steps later, long written
        if save:
            checkpoints.begin(step, metrics)
        elif step % settings.log_every == 0:
            checkpoints.settle()

    # The end: the trained model goes into the last checkpoint
    weights = {name: whole(tensor).cpu() for name, tensor in average.state_dict().items()}
    export = (lambda folder: objective.export(folder / EXPORT, weights)) if rank == 0 else None
    checkpoints.finish(settings.steps, export)
    if tracker is not None:
        tracker.flush(timeout=30)
    return None


def seed_step(generator: torch.Generator, seed: int, rank: int, batch: int) -> None:
    """Seed all draws of one micro-batch: the loss's generator, and torch's own (adapter dropout)."""
    mixed = hash((seed, rank, batch)) & (2**63 - 1)  # integers hash the same in every process
    generator.manual_seed(mixed)
    torch.manual_seed(mixed + 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch's tensors without waiting."""
    if device.type == "cpu":
        return batch
    from dataclasses import replace

    latent = None if batch.latent is None else batch.latent.to(device, non_blocking=True)
    return replace(batch, latent=latent, conditioning=batch.conditioning.to(device))


@torch.no_grad()
def sample(
    objective: Objective,
    average: PowerEMA,
    preview: Preview,
    seed: int,
    device: torch.device,
    batch_size: int,
) -> Tensor:
    """Latents (B, C, H, W) of the preview's captions from fixed noise, with averaged weights, some at a time."""
    conditioning = preview.conditioning
    noise = gaussian_noise((len(conditioning), *preview.shape), torch.Generator().manual_seed(seed))
    objective.model.eval()
    latents = []
    with average.swapped():
        drop_gathered(objective.model)
        for first in range(0, len(noise), batch_size):
            part = slice(first, first + batch_size)
            latents.append(objective.sample(noise[part].to(device), conditioning[part].to(device)).cpu())
    drop_gathered(objective.model)
    objective.model.train()
    return torch.cat(latents)


def _non_finite(step: int, metrics: dict[str, float]) -> str:
    return (
        f"loss or gradient became infinite or NaN at or before step {step} (last loss {metrics['train/loss']:.4g}, "
        f"gradient norm {metrics['train/gradient_norm']:.4g}): lower optimizer.rate or optimizer.clip_norm; the last "
        "good checkpoint is kept."
    )


def _quiet_reports() -> None:
    """Silence Ray Train's several lines per checkpoint, between the lines of progress and below the result."""
    from ray.train.v2._internal.execution import context, storage

    for module in (context, storage):
        module.logger.setLevel(logging.WARNING)
