#!/usr/bin/env python
"""One distillation step: how much of it is rollouts, data and Ray."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from fewstep.benchmark import aligned, interleaved, log_to_mlflow, machine
from fewstep.cli import connect_ray, run_job
from fewstep.data.stream import Batch, read_split
from fewstep.models.conditioning import TextConditioning
from fewstep.train.recipe import DistillRecipe, load_recipe

RECIPES = Path(__file__).resolve().parent / "recipes"
BATCHES = 8
"""Batches that the bare process cycles through; it holds them in memory."""

DESCRIPTION = """\
Take the steps of a distillation recipe (by default the main job's) in two ways, in turns:

  bare   in as many processes with torch alone: no Ray, no sharding, batches in memory, the environment of a worker;
         several average their gradients
  Ray    as the job does: Ray Train's workers, FSDP or replicas, batches streamed by Ray Data, metrics to MLflow

and in the bare processes also, in turns with the whole step,

  network    the step's very calls of the network: student forward and backward, teacher's guided queries, then
             optimizer and weight average; no rollouts
  rollouts   all the rest of π-ID: the policies' rollouts to the visited states, the micro windows and their
             gradient to the head's output; no network"""

EPILOG = """\
reading the table
  Times are seconds per optimizer step. The first half of each run warms up and is not counted. What is promised
  of the main job on a CPU: rollouts under 15 % of a step, Ray at most 1.03 times the bare processes, waiting for
  data under 2 %. Ray's own processes, idle, take a seventh of one core whatever the model: 7 % of two cores, less
  than 1 % of sixteen.

examples
  jobs/benchmark_train.py                                    two rounds of 40 steps each, some 6 minutes
  jobs/benchmark_train.py --rounds 4 --steps 60 --tracking sqlite:///mlflow.db
  jobs/benchmark_train.py --recipe fashion_dit_1nfe --set imitation.intermediate_states=4
  jobs/benchmark_train.py --set train.gpu=true --set train.workers=1"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        default="emoji_qwen_4nfe",
        help="a recipe of jobs/recipes, or a YAML file; default: %(default)s",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    parser.add_argument("--steps", type=int, default=40, help="of each run; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind; default: %(default)s")
    parser.add_argument("--tracking", metavar="URI", help="also log the table to this MLflow address")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    recipe = load_recipe(DistillRecipe, options.recipe, options.set, RECIPES)
    if options.bare:
        seconds = bare_run(recipe, options.steps)
        if int(os.environ.get("RANK", 0)) == 0:
            options.bare.write_text(json.dumps(seconds))
        return

    from fewstep.data.shipped import open_data

    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"path": open_data(recipe.data.path).root})}
    )
    torch.set_num_threads(recipe.train.threads)
    connect_ray()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            bare = in_bare_process(recipe, options.steps, Path(folder) / f"bare-{number}.json")
            rounds.append(bare | ray_run(recipe, options.steps, Path(folder), number))
    seconds = {name: mean(one[name] for one in rounds) for name in rounds[0]}
    description = machine(torch.device("cuda" if recipe.train.gpu else "cpu"))
    table = f"{description}; {recipe.name}, batch {recipe.data.batch_size}\n\n{step_table(seconds)}"
    print(f"\n{table}")
    if options.tracking:
        log_to_mlflow(options.tracking, "train-step", description, table, ratios(seconds) | seconds)


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """What the table promises something about."""
    return {
        "rollouts_share": seconds["rollouts"] / seconds["step"],
        "network_share": seconds["network"] / seconds["step"],
        "ray_over_bare": seconds["ray"] / seconds["bare"],
        "waiting_share": seconds["waiting"] / seconds["ray"],
    }


def step_table(seconds: dict[str, float]) -> str:
    """Seconds and ratios, one line each."""
    of = ratios(seconds)
    rows = [
        ("bare, steps in a row", f"{seconds['bare']:.3f}", "1.000", ""),
        ("inside Ray Train", f"{seconds['ray']:.3f}", f"{of['ray_over_bare']:.3f} of bare", "≤ 1.03"),
        (
            "  of that waiting for data",
            f"{seconds['waiting']:.4f}",
            f"{of['waiting_share']:.2%} of Ray's",
            "< 2 %",
        ),
        ("bare, in turns with parts", f"{seconds['step']:.3f}", "100 %", ""),
        ("  network alone", f"{seconds['network']:.3f}", f"{of['network_share']:.1%}", ""),
        ("  rollouts alone", f"{seconds['rollouts']:.4f}", f"{of['rollouts_share']:.1%}", "< 15 %"),
    ]
    return aligned(("one optimizer step", "seconds", "ratio", "promise"), rows)


def ray_run(recipe: DistillRecipe, steps: int, folder: Path, number: int) -> dict[str, float]:
    """Seconds per step, and of waiting for data in one, of a short real run's second half."""
    from fewstep.train.trainer import fit

    train = {"steps": steps, "log_every": steps // 2, "checkpoint_every": steps, "sample_every": 0}
    short = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=train | {"storage": str(folder / "runs")}),
            "tracking": recipe.tracking.model_copy(update={"uri": f"sqlite:///{folder / 'mlflow.db'}"}),
        }
    )
    metrics = fit(short, f"benchmark-train-{os.getpid()}-{number}").metrics
    return {
        "ray": metrics["train/seconds_per_step"],
        "waiting": metrics["train/seconds_waiting_for_data"],
    }


def in_bare_process(recipe: DistillRecipe, steps: int, result: Path) -> dict[str, float]:
    """`bare_run` in processes of their own, as many as workers, with a worker's environment."""
    from fewstep.train.trainer import worker_environment

    file = result.with_suffix(".yaml")
    file.write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
    command = [sys.executable, __file__, "--recipe", str(file), "--steps", str(steps), "--bare", str(result)]
    if recipe.train.workers > 1:
        command[1:1] = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={recipe.train.workers}",
        ]
    subprocess.run(command, env=os.environ | worker_environment(recipe.train), check=True)
    return json.loads(result.read_text())


def bare_run(recipe: DistillRecipe, steps: int) -> dict[str, float]:
    """Seconds of steps in a row, and of a step and its parts in turns, in a lone process or each of torchrun's."""
    import torch.distributed as dist

    from fewstep.data.encoder import load_encoder
    from fewstep.data.schema import DatasetInfo
    from fewstep.distill import PowerEMA
    from fewstep.train.objectives import Distillation
    from fewstep.train.optimizers import build_optimizers
    from fewstep.train.parallel import average_gradients, shard
    from fewstep.train.worker import seed_step, to_device

    rank, workers = 0, recipe.train.workers
    if workers > 1:
        dist.init_process_group("nccl" if recipe.train.gpu else "gloo")
        rank = dist.get_rank()
    device = torch.device(f"cuda:{rank}" if recipe.train.gpu else "cpu")
    if recipe.train.gpu:
        torch.cuda.set_device(device)
    replicas = recipe.train.model_copy(update={"parallel": "ddp"})
    torch.set_num_threads(recipe.train.threads)
    torch.set_flush_denormal(True)
    info, size = DatasetInfo.open(recipe.data.path), recipe.data.batch_size // workers
    null = load_encoder(info.encoding.text_encoder).null()
    objective = Distillation(recipe, null, device)
    shard(objective, replicas, workers)
    model, parameters = objective.model, objective.parameters()
    blocks = objective.family.blocks(objective.transformer)
    optimizers = build_optimizers(parameters.values(), blocks, recipe.optimizer)
    average, generator = PowerEMA(parameters, recipe.optimizer.ema_gamma), torch.Generator()

    rows = read_split(recipe.data.path, "train", BATCHES * size, shape=next(iter(info.buckets("train"))))
    order = torch.randperm(len(rows), generator=generator.manual_seed(rank)).split(size)
    batches = [rows_of(rows, index.tolist()) for index in order]
    taken = 0

    def update(backward: Callable[[Batch], None]) -> None:
        nonlocal taken
        taken += 1
        seed_step(generator, recipe.train.seed, rank, taken)
        backward(to_device(batches[taken % len(batches)], device))
        average_gradients(parameters.values(), replicas, workers)
        torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.optimizer.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(taken)

    def whole(batch: Batch) -> None:
        for result in objective.losses(batch, generator, step=1):
            result.loss.backward()

    forward, calls = model.forward, []

    def remembering(*args: Any, student: bool) -> Tensor:
        packed = forward(*args, student=student)
        calls.append((args, student, packed.detach()))
        return packed

    model.forward = remembering
    seed_step(generator, recipe.train.seed, rank, 0)
    first = to_device(batches[0], device)
    whole(first)
    model.forward = forward

    def network(_: Batch) -> None:
        for args, student, _ in calls:
            with torch.set_grad_enabled(student):
                packed = model(*args, student=student)
            if student:
                packed.square().mean().backward()

    def rollouts() -> None:
        answers = iter(calls)
        model.forward = lambda *_, student: next(answers)[2].detach().requires_grad_(student)
        seed_step(generator, recipe.train.seed, rank, 0)
        whole(first)
        model.forward = forward

    def in_a_row(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            update(whole)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count

    in_a_row(steps // 2)
    bare = in_a_row(steps - steps // 2)
    runs = {"step": lambda: update(whole), "network": lambda: update(network), "rollouts": rollouts}
    return {"bare": bare} | interleaved(runs, max(3, steps // 4), device)


def rows_of(batch: Batch, index: list[int]) -> Batch:
    """Some rows of a batch as one of their own, padded to its own longest caption."""
    states = [batch.conditioning.states[i][batch.conditioning.mask[i]] for i in index]
    captions, keys = [batch.captions[i] for i in index], [batch.keys[i] for i in index]
    latent = None if batch.latent is None else batch.latent[index]
    return Batch(latent, TextConditioning.collate(states), captions, keys, batch.shape)


if __name__ == "__main__":
    run_job(main)
