"""The training loop, which every Ray Train worker runs.

Random numbers come from generators seeded by (seed, rank, micro-batch), so that a resumed run gives what the
uninterrupted run would have given: bit for bit in float32 on a CPU.
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

from fewstep.config import Shape
from fewstep.data.stream import Batch, ShardStream
from fewstep.distill import PowerEMA
from fewstep.encoders import load_autoencoder
from fewstep.evaluate.grid import sample_grid
from fewstep.flow import gaussian_noise
from fewstep.models.conditioning import Conditioning
from fewstep.models.family_code import FamilyCode
from fewstep.models.sharded import whole
from fewstep.tracking.run import TrackedRun, Tracker
from fewstep.train import checkpoint as ckpt
from fewstep.train.objectives import Objective, build_objective
from fewstep.train.optimizers import build_optimizers, lr_share
from fewstep.train.parallel import average_gradients, drop_gathered, is_sharded, shard
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
    code: FamilyCode | None = None
    """The user's file that registers the network's family, if there is one."""


def train_worker(job: WorkerJob) -> str | None:
    """Train to the recipe's last step, from Ray Train's latest checkpoint if there is one.

    Returns:
        None, or the reason why training stopped early. It is returned rather than raised, because after an exception
        Ray Train would restart from the last checkpoint and come to the same numbers.
    """
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    _quiet_reports()
    # Ray Train starts workers in a folder of its own. On other machines the driver's may not exist.
    if Path(job.home).is_dir():
        os.chdir(job.home)
    recipe, settings = job.recipe, job.recipe.train
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(settings.threads)
    # Adam's second moments decay to denormal numbers, with which CPUs compute a hundred times slower.
    torch.set_flush_denormal(True)
    device = ray.train.torch.get_device() if settings.gpu else torch.device("cpu")

    # Model, optimizer, EMA
    if job.code is not None:
        job.code.use()  # registers the user's family in this process
    sharded = is_sharded(settings, world_size)
    objective = build_objective(recipe, job.null, device, sharded)
    shard(objective, settings, world_size)
    objective.read_weights(device)  # after sharding: each rank reads its own part of the files
    parameters = objective.parameters()
    blocks = objective.family.blocks(objective.transformer)
    optimizers = build_optimizers(parameters.values(), blocks, recipe.optimizer)
    ema = PowerEMA(parameters, recipe.optimizer.ema_gamma)

    def tensors() -> dict[str, Any]:
        slots = ckpt.optimizer_tensors(optimizers, parameters)
        # The EMA is called "average" in checkpoints since the first version: under another name, those would not load.
        return {"model": parameters, "average": ema.state_dict(), "optimizer": slots}

    origin = ckpt.TrainState(0, settings.seed, job.tracking.run_id, recipe.model_dump(mode="json"))
    # A process group of its own: writing in the background must not wait for the training's collectives.
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
    # Micro-batches of this rank so far. With the same number of workers, the stream goes on exactly where it was;
    # with another number, at about the same place.
    batches = done * settings.accumulate

    tracker = None
    if rank == 0:
        tracker = Tracker.join(job.tracking)
        if done:
            tracker.set_tags({"resumed_from_step": done})

    # Of this rank's micro-batches.
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
    meter = LossMeter(device)
    generator = torch.Generator()  # on the CPU, so that random numbers are the same on every device
    started = time.perf_counter()

    for step in range(done + 1, settings.steps + 1):
        # Sample grids: by all ranks if the model is sharded, as each holds a part of it; otherwise by rank 0
        if job.samples and (step - 1) % settings.sample_every == 0 and step > 1 and (sharded or rank == 0):
            latents = sample(objective, ema, job.samples, settings.seed, device, batch_size)
            if tracker is not None:
                pixels = load_autoencoder(job.samples.autoencoder).decode(latents).numpy()
                tracker.log_image(sample_grid(pixels, columns=8), f"samples/step-{step - 1:06d}.png")

        # The optimizer step
        share = lr_share(recipe.optimizer, step, settings.steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak_lr"]
        for _ in range(settings.accumulate):
            # Seeded anew for each micro-batch, so that a resumed run draws what the uninterrupted one would have drawn.
            seed_step(generator, settings.seed, rank, batches)
            batch = to_device(next(source), device)
            for result in objective.losses(batch, generator, step):
                # Before the next loss is computed: data-free losses keep the graph of one segment at a time.
                (result.loss / settings.accumulate).backward()
                meter.add(result)  # on the device: reading values here would make the host wait for them
            batches += 1
        average_gradients(parameters.values(), settings, world_size)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.optimizer.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # frees the gradients' memory for the next forward
        ema.update(step)
        meter.norm(whole(norm))

        # Progress and metrics: the only place where the host waits for the device
        save = step % settings.checkpoint_every == 0 or step == settings.steps
        if step % settings.log_every == 0 or save or step == 1:
            metrics = meter.read(recipe.data.batch_size, stream.seconds_waited)
            stream.seconds_waited = 0.0
            metrics["train/learning_rate"] = share * recipe.optimizer.lr
            if metrics["train/non_finite"]:
                checkpoints.settle()  # the last good checkpoint has to be complete before the run ends
                return _non_finite(step, metrics)
            if rank == 0:
                print(progress_line(recipe.name, step, done, settings.steps, started, metrics), flush=True)
            if tracker is not None:
                tracker.log_metrics(metrics, step)

        # Checkpoints: writing begins here, and has long ended when it is reported some steps later
        if save:
            checkpoints.begin(step, metrics)
        elif step % settings.log_every == 0:
            checkpoints.settle()

    # The end: the trained model, with the EMA's weights, goes into the last checkpoint. `whole` gathers shards, so all
    # ranks take part, although only rank 0 writes.
    weights = {name: whole(tensor).cpu() for name, tensor in ema.state_dict().items()}
    export = (lambda folder: objective.export(folder / EXPORT, weights)) if rank == 0 else None
    checkpoints.finish(settings.steps, export)
    if tracker is not None:
        tracker.flush(timeout=30)
    return None


def seed_step(generator: torch.Generator, seed: int, rank: int, batch: int) -> None:
    """Seed the random numbers of one micro-batch: the loss's generator, and torch's own (for dropout of adapters)."""
    # For integers, Python's hash is the same in every process.
    mixed = hash((seed, rank, batch)) & (2**63 - 1)
    generator.manual_seed(mixed)
    torch.manual_seed(mixed + 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on a device, without waiting for the copies."""
    if device.type == "cpu":
        return batch
    from dataclasses import replace

    latent = None if batch.latent is None else batch.latent.to(device, non_blocking=True)
    return replace(batch, latent=latent, conditioning=batch.conditioning.to(device))


@torch.no_grad()
def sample(
    objective: Objective,
    ema: PowerEMA,
    plan: SamplePlan,
    seed: int,
    device: torch.device,
    batch_size: int,
) -> Tensor:
    """Latents (B, C, H, W) of the plan's conditions, with the EMA's weights, from noise that is the same in every call.

    Args:
        objective: has the model, and samples it.
        ema: of the model's parameters.
        plan: conditions and shape.
        seed: of the noise.
        device: of the model.
        batch_size: most samples at a time.
    """
    conditioning = plan.conditioning
    noise = gaussian_noise((len(conditioning), *plan.shape), torch.Generator().manual_seed(seed))
    objective.model.eval()
    latents = []
    with ema.swapped():
        drop_gathered(objective.model)  # FSDP may still hold the weights from before the swap
        for first in range(0, len(noise), batch_size):
            part = slice(first, first + batch_size)
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
