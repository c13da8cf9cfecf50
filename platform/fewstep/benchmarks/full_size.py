"""`fewstep benchmark full-size`: students of full-size teachers with random weights, on one GPU."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from fewstep.benchmarks.measure import aligned, interleaved, log_to_mlflow, machine, wait
from fewstep.config import PRECISIONS, Precision, Shape
from fewstep.distill import imitation_loss
from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, gaussian_noise, generate
from fewstep.models.architecture import network_config
from fewstep.models.conditioning import TextConditioning
from fewstep.models.devices import check_device, free_dropped_networks
from fewstep.models.family import Family
from fewstep.models.network import PolicyNetwork
from fewstep.models.precision import check_arithmetic, check_precision
from fewstep.models.registry import get_family
from fewstep.models.teacher import told_guidance
from fewstep.train.optimizers import build_optimizers
from fewstep.train.recipe import DistillRecipe, load_recipe

RECIPES = {"qwen": "qwen_image_4nfe", "flux": "flux_4nfe"}
"""What may be measured → the recipe of its student."""

TOKENS = 256
"""Token states of the caption."""

WEIGHT_STD = 0.02
"""Standard deviation of the random weights."""

SMALL = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 4,
    "joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip
"""Sizes of the networks with --small."""

DESCRIPTION = """\
Build the students of full-size teachers (Qwen-Image, 20 B parameters, and FLUX.1 dev, 12 B) with random weights,
straight on the device in each precision, generate with them, and take one step of their distillation. No weights are
downloaded. On one GPU of 141 GB it takes some eight minutes."""

EXAMPLES = """\
reading the table
  forward        seconds of one bare forward of the network
  image          seconds of one image: as many evaluations as the recipe's, with their rollouts; no text encoder and
                 no decoding
  of the network share of the image's time that the bare forwards take: the goal is 97 %
  peak           most memory at a time, of generating and of the training step

examples
  {program}
  {program} --networks flux --precisions int8 --no-training
  {program} --device cpu --small --size 128          tries everything at a small size, in a minute"""


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    network: str
    """One of `RECIPES`."""
    precision: Precision
    """Of the weights."""
    device: torch.device
    """Where."""
    size: int
    """Side of the image in pixels; a latent cell has eight."""
    small: bool
    """Whether the network has the sizes of `SMALL`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--networks", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: both")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["bfloat16", "int8"],
        help="default: bfloat16 int8",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=1024, help="of images, in pixels; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; default: %(default)s")
    parser.add_argument("--no-training", action="store_true", help="generate only")
    parser.add_argument("--small", action="store_true", help="tiny networks of the same classes")
    parser.add_argument("--tracking", metavar="URI", help="also log the table to this MLflow address")


def run(options: argparse.Namespace) -> None:
    """Measure, and print the table.

    Raises:
        UserError: there is no such device, it or the installed libraries can't do a precision, or a number is too
            small.
    """
    if options.size < 64 or options.repeats < 1:
        raise UserError("--size must be at least 64, and --repeats at least 1.")
    check_device(options.device)
    device = torch.device(options.device)
    for precision in options.precisions:
        check_arithmetic(check_precision(precision, "--precisions"), device, "--precisions")
    rows: dict[str, dict[str, float]] = {}
    for network, precision in itertools.product(options.networks, options.precisions):
        setting = Setting(network, precision, device, options.size, options.small)
        row = measure(setting, options.repeats, training=not options.no_training)
        free_dropped_networks()
        # Each row at once, as the next one may not fit.
        print(json.dumps({"network": network, "precision": precision} | row), flush=True)
        rows[f"{network} {precision}"] = row
    description = f"{machine(device)}; {options.size}x{options.size}, random weights"
    table = f"{description}\n\n{full_size_table(rows)}"
    print(f"\n{table}")
    if options.tracking:
        metrics = {
            f"{name}/{key}".replace(" ", "_"): value
            for name, row in rows.items()
            for key, value in row.items()
        }
        log_to_mlflow(options.tracking, "full-size", description, table, metrics)


def measure(setting: Setting, repeats: int, *, training: bool = True) -> dict[str, float]:
    """Seconds and bytes of one setting, by name (see `full_size_table`)."""
    device = setting.device
    recipe = load_recipe(DistillRecipe, RECIPES[setting.network], [f"train.precision={setting.precision}"])
    begun = time.perf_counter()
    network = random_student(recipe, setting)
    wait(device)
    result = {"built_s": time.perf_counter() - begun, "weights_gb": network.nbytes / 1e9}
    family, transformer = network.family, network.transformer
    shape = (family.latent_channels(transformer), setting.size // 8, setting.size // 8)
    tokens = (shape[1] // family.patch(transformer)) * (shape[2] // family.patch(transformer))
    sampler, conditioning = recipe.sampler.at_size(tokens), random_text(family, transformer, device)
    noise = gaussian_noise((1, *shape), torch.Generator().manual_seed(0)).to(device)
    policy = partial(network.policy, conditioning=conditioning)

    @torch.inference_mode()
    def forward() -> None:
        network(noise, torch.ones(1, device=device), conditioning, student=True)

    @torch.inference_mode()
    def image() -> None:
        generate(policy, noise, sampler, generator=torch.Generator().manual_seed(0))

    network.eval()
    _begin_peak(device)
    times = interleaved({"forward": forward, "image": image}, repeats, device)
    result |= {
        "forward_s": times["forward"],
        "image_s": times["image"],
        "network_share": sampler.nfe * times["forward"] / times["image"],
    }
    result |= _peak("image_peak_gb", device)
    if training:
        result |= _training_step(network, recipe, conditioning, shape, sampler, device)
    return result


def _training_step(
    network: PolicyNetwork,
    recipe: DistillRecipe,
    conditioning: TextConditioning,
    shape: Shape,
    sampler: SamplerConfig,
    device: torch.device,
) -> dict[str, float]:
    """One optimizer step of one sample, without guidance, with activation checkpointing: the second of two."""
    network.train()
    network.transformer.enable_gradient_checkpointing()
    blocks = network.family.blocks(network.transformer)
    optimizers = build_optimizers(network.trainable().values(), blocks, recipe.optimizer)
    generator = torch.Generator().manual_seed(0)
    latent = gaussian_noise((1, *shape), generator).to(device)

    def step() -> None:
        loss = imitation_loss(
            partial(network.policy, conditioning=conditioning),
            lambda x, sigma: network.velocity(x, sigma, conditioning.repeat(len(x))),
            latent,
            generator,
            sampler,
            recipe.imitation,
            1.0,
        )
        loss.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step()
    _begin_peak(device)
    begun = time.perf_counter()
    step()
    wait(device)
    return {"step_s": time.perf_counter() - begun} | _peak("step_peak_gb", device)


def random_student(recipe: DistillRecipe, setting: Setting) -> PolicyNetwork:
    """The recipe's student with random weights, made on the device one after the other."""
    teacher, student = recipe.teacher, recipe.student
    config = network_config(teacher.path)
    if setting.small:
        config |= {key: value for key, value in SMALL.items() if key in config}
    family = get_family(teacher.family)
    # Rotary tables, which constructors compute, have their values.
    with init_empty_weights(include_buffers=False):
        transformer = family.build(config)
    family = told_guidance(family, transformer, teacher.embedded_guidance_scale, teacher.path)
    network = PolicyNetwork(transformer, family, student.policy, student.lora)
    network.lower(setting.precision)
    generator = torch.Generator(setting.device).manual_seed(0)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in network.base_shapes.items():
            value = torch.empty(shape, device=setting.device).normal_(std=WEIGHT_STD, generator=generator)
            yield name, value + 1 if len(shape) == 1 and "norm" in name else value

    network.fill_from(weights(), setting.device)
    return network


def random_text(family: Family, transformer: Any, device: torch.device) -> TextConditioning:
    """A caption of `TOKENS` random token states, B = 1."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, TOKENS, family.condition_width(transformer), generator=generator)
    width = family.pooled_width(transformer)
    pooled = None if width is None else torch.randn(1, width, generator=generator)
    return TextConditioning(states, torch.ones(1, TOKENS, dtype=torch.bool), pooled).to(device)


def full_size_table(rows: dict[str, dict[str, float]]) -> str:
    """The measurements as text, one line per network and precision."""
    header = ["", "weights", "forward", "image", "of the network", "peak", "training step", "peak"]
    lines = [
        [
            name,
            f"{row['weights_gb']:.2f} GB",
            f"{row['forward_s']:.3f} s",
            f"{row['image_s']:.3f} s",
            f"{row['network_share']:.1%}",
            f"{row['image_peak_gb']:.2f} GB" if "image_peak_gb" in row else "-",
            f"{row['step_s']:.2f} s" if "step_s" in row else "-",
            f"{row['step_peak_gb']:.2f} GB" if "step_peak_gb" in row else "-",
        ]
        for name, row in rows.items()
    ]
    return aligned(header, lines)


def _begin_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(name: str, device: torch.device) -> dict[str, float]:
    """Most GB since `_begin_peak`, under that name; nothing on a CPU, of which torch keeps no statistics."""
    return {name: torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}
