"""`fewstep benchmark cached-conditions`: distillation steps with and without texts that are computed once."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.benchmarks.measure import aligned, interleaved, log_to_mlflow, machine
from fewstep.flow import gaussian_noise
from fewstep.models.conditioning import Conditioning, TextConditioning
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.train.recipe import DistillRecipe, load_recipe

if TYPE_CHECKING:
    from fewstep.data.stream import Batch
    from fewstep.train.objectives import Distillation

HEAD = 128
"""Width of an attention head, as in Qwen-Image 2.1."""

CHANNELS = 64
"""Latent channels, as there."""

WEIGHT_STD = 0.02
"""Standard deviation of the random weights."""

DESCRIPTION = """\
Take steps of π-ID of a small network of Qwen-Image 2.1's class with random weights, once with texts whose keys and
values are computed at every call of the network, as everything is in other networks, and once with texts that are
computed once. The steps are those of the training itself: a student with LoRA, two visited states, a guided teacher.

  from data   one segment per step: the student's one evaluation computes its text itself, with a gradient
  data-free   a segment per evaluation of the student, which share its text
  images      no step, but the student's sampler"""

EXAMPLES = """\
reading the table
  Operations are counted by torch, without those of activation functions; times are medians of turns. The error is the
  largest difference of the gradients, or of the images, relative to the largest value.

  Of a step from data, a third as many text tokens as all tokens can save a sixth and no more: the student's evaluation
  costs two calls' work (the backward pass included) and saves nothing, and of the teacher's four calls' texts one
  remains, so (2 + 4 · 2/3 + 1/3) / 6 = 0.83. A full-size network is nearer to that than a small one, whose attention
  from image to text takes a larger share.

examples
  {program}
  {program} --width 256 --image 16 --text 128      less than a minute on one core"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--width", type=int, default=512, help="of the network; default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--image", type=int, default=32, help="side in tokens; default: %(default)s")
    parser.add_argument("--text", type=int, default=512, help="tokens of a caption; default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="samples of a step; default: %(default)s")
    parser.add_argument("--nfe", type=int, default=4, help="evaluations of the student; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="turns; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--tracking", metavar="URI", help="also log the table to this MLflow address")


def run(options: argparse.Namespace) -> None:
    """Measure, and print the table.

    Raises:
        UserError: a size that the network can't take.
    """
    device = torch.device(options.device)
    rows = {name: measured(kind, options, device) for name, kind in KINDS.items()}
    description = (
        f"{machine(device)}; {options.layers} blocks of width {options.width}, {options.image**2} image and "
        f"{options.text} text tokens, batch {options.batch}"
    )
    table = f"{description}\n\n{cache_table(rows)}"
    print(f"\n{table}")
    if options.tracking:
        metrics = {
            f"{name}/{key}".replace(" ", "_"): value
            for name, row in rows.items()
            for key, value in row.items()
        }
        log_to_mlflow(options.tracking, "cached-conditions", description, table, metrics)


Work: TypeAlias = "Callable[[Distillation, Batch], list[Tensor]]"
"""What is measured: a student's work on a batch, which gives tensors that must not depend on how texts are computed."""


def measured(
    work: Work, options: argparse.Namespace, device: torch.device, *, timed: bool = True
) -> dict[str, float]:
    """Operations, seconds and difference of one kind of work, by name (see `cache_table`).

    Args:
        work: one of `KINDS`.
        options: sizes, and how often.
        device: where.
        timed: whether seconds are measured, too.
    """
    batch = random_batch(options, device)
    # An objective each: a teacher keeps what it has computed of the null condition.
    plain, cached = (student_of(options, batch.conditioning, device) for _ in range(2))

    def without() -> list[Tensor]:
        with patch.object(PolicyNetwork, "prepare", _as_it_is):
            return work(plain, batch)

    runs: Mapping[str, Callable[[], list[Tensor]]] = {"plain": without, "cached": lambda: work(cached, batch)}
    results = {name: run() for name, run in runs.items()}
    error = max(
        ((one - other).abs().max() / one.abs().max()).item()
        for one, other in zip(results["plain"], results["cached"], strict=True)
        if one.any()
    )
    operations = {name: _operations(run) for name, run in runs.items()}
    seconds = interleaved(runs, options.repeats, device) if timed else {}
    counted = {f"{name}_operations": float(value) for name, value in operations.items()}
    return counted | {f"{name}_s": value for name, value in seconds.items()} | {"error": error}


def _as_it_is(network: PolicyNetwork, conditioning: Any, **role: bool) -> Any:
    return conditioning


def _operations(run: Callable[[], object]) -> int:
    # torch counts matrix products, but no fused attention on CPUs, and not oneDNN's.
    onednn = {torch.ops.mkldnn._linear_pointwise: _linear_operations}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        run()
    return counter.get_total_flops()


def _linear_operations(x: torch.Size, weight: torch.Size, *others: object, **named: object) -> int:
    """Operations of oneDNN's linear layer by the shapes of its arguments, a multiply-add being two."""
    return 2 * math.prod(x) * weight[0]


def step_from_data(objective: Distillation, batch: Batch) -> list[Tensor]:
    """One step whose segments start from noised data; gives the gradients."""
    return _gradients(objective, batch)


def data_free_step(objective: Distillation, batch: Batch) -> list[Tensor]:
    """One step along the student's own trajectories; gives the gradients."""
    with _data_free(objective):
        return _gradients(objective, batch)


def student_images(objective: Distillation, batch: Batch) -> list[Tensor]:
    """Latents of the student's sampler."""
    assert batch.latent is not None
    with torch.no_grad():
        return [objective.sample(batch.latent, batch.conditioning)]


KINDS: dict[str, Work] = {
    "step from data": step_from_data,
    "data-free step": data_free_step,
    "images": student_images,
}
"""What is measured, by its name in the table."""


@contextmanager
def _data_free(objective: Distillation) -> Iterator[None]:
    recipe = objective.recipe
    imitation = recipe.imitation.model_copy(update={"data_free": True})
    objective.recipe = recipe.model_copy(update={"imitation": imitation})
    try:
        yield
    finally:
        objective.recipe = recipe


def _gradients(objective: Distillation, batch: Batch) -> list[Tensor]:
    parameters = list(objective.parameters().values())
    for parameter in parameters:
        parameter.grad = None
    for result in objective.losses(batch, torch.Generator().manual_seed(0), step=1):
        result.loss.backward()
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def random_batch(options: argparse.Namespace, device: torch.device) -> Batch:
    """Random latents and captions of the asked sizes."""
    from fewstep.data.stream import Batch

    generator = torch.Generator().manual_seed(0)
    shape = (CHANNELS, options.image, options.image)
    latent = gaussian_noise((options.batch, *shape), generator).to(device)
    states = torch.randn(options.batch, options.text, options.width, generator=generator)
    names = [str(index) for index in range(options.batch)]
    return Batch(latent, TextConditioning.collate(list(states)).to(device), names, names, shape)


def student_of(options: argparse.Namespace, conditioning: Conditioning, device: torch.device) -> Distillation:
    """A student of a teacher with random weights, as a training run would have it.

    Args:
        options: sizes.
        conditioning: of which the first is taken as the null condition, which has as many tokens then.
        device: where.
    """
    from fewstep.train.objectives import Distillation

    config = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": options.layers,
        "attention_head_dim": HEAD, "num_attention_heads": options.width // HEAD, "context_in_dim": options.width,
    }  # fmt: skip
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformer = get_family("qwen_image21").build(config)
        for parameter in transformer.parameters():
            torch.nn.init.normal_(parameter, std=WEIGHT_STD * math.sqrt(4096 / options.width))
        transformer.save_pretrained(folder)
        settings = [
            f"teacher.path={folder}", "teacher.family=qwen_image21", "student.lora.rank=64",
            "student.lora.dropout=0", "train.precision=float32", f"sampler.nfe={options.nfe}",
        ]  # fmt: skip
        recipe = load_recipe(DistillRecipe, "qwen_image_4nfe", settings)
        objective = Distillation(recipe, conditioning[:1], device)
        objective.read_weights(device)
    return objective


def cache_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The measurements as text, one line per kind of work.

    Args:
        rows: by kind; operations and seconds of "plain" and "cached", and the error.
    """
    header = ["", "GFLOP", "cached", "ratio", "seconds", "cached", "ratio", "error"]
    lines = [
        [
            name,
            f"{row['plain_operations'] / 1e9:.0f}",
            f"{row['cached_operations'] / 1e9:.0f}",
            f"{row['cached_operations'] / row['plain_operations']:.3f}",
            f"{row['plain_s']:.2f}",
            f"{row['cached_s']:.2f}",
            f"{row['cached_s'] / row['plain_s']:.3f}",
            f"{row['error']:.0e}",
        ]
        for name, row in rows.items()
    ]
    return aligned(header, lines)
