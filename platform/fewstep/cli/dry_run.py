"""The options of dry runs, which several commands share, and the dry run of a service."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep.config import PRECISIONS, Precision

if TYPE_CHECKING:
    from fewstep.plan import Served


def add_machine_options(group: argparse._ArgumentGroup) -> None:
    """Declare what a run is planned for: memory and rate of each GPU, and sizes of images and captions."""
    group.add_argument(
        "--gpu-memory", type=float, default=80, metavar="GB", help="of each; default: %(default)s"
    )
    group.add_argument(
        "--gpu-tflops", type=float, default=989, metavar="T",
        help="peak of each in bfloat16; default: %(default)s, an H100",
    )  # fmt: skip
    group.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        metavar="F",
        help="share of the peak reached; default: %(default)s",
    )


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """Declare the dry run of a command that generates with students."""
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry-run", action="store_true",
        help="print memory by part and time per image in each precision, and stop; needs no weights and no Ray",
    )  # fmt: skip
    group.add_argument(
        "--recipe", metavar="NAME|FILE", help="plan the student of a recipe, which need not exist yet"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one field of the recipe"
    )
    add_machine_options(group)
    group.add_argument(
        "--gpu-float32-tflops", type=float, default=67, metavar="T",
        help="peak in float32; default: %(default)s, an H100",
    )  # fmt: skip
    group.add_argument(
        "--gpu-bandwidth", type=float, default=3.35, metavar="TB",
        help="of its memory, per second; default: %(default)s, an H100",
    )  # fmt: skip
    group.add_argument("--cpu", action="store_true", help="plan for a CPU with that memory")
    group.add_argument(
        "--batch", type=int, metavar="N", help="images at a time; default: as a service is configured, or 1"
    )
    group.add_argument(
        "--latent-size", type=int, metavar="CELLS",
        help="latent height and width; default: as the student was trained, or 128",
    )  # fmt: skip
    group.add_argument(
        "--tokens", type=int, metavar="N", help="per caption; default: as many as a caption may have"
    )
    group.add_argument(
        "--encoder-precision", choices=PRECISIONS,
        help="of the text encoder's weights; default: as it is loaded",
    )  # fmt: skip
    group.add_argument(
        "--autoencoder-precision", choices=PRECISIONS[:2],
        help="of the autoencoder; default: float32",
    )  # fmt: skip


def print_serving_plans(
    options: argparse.Namespace,
    models: Sequence[str],
    tracking_uri: str | None = None,
    configured: Precision | None = None,
) -> None:
    """Print what serving takes on the device that the options describe: the recipe's student, or each of `models`.

    Args:
        options: what a parser with `add_serving_options` parsed.
        models: names or addresses of students (`resolve_student`).
        tracking_uri: address of MLflow, for students that it holds.
        configured: the precision that a service has now, which is marked.

    Raises:
        UserError: there is no such student or recipe, or it can't be planned.
    """
    from fewstep.plan import GPU, plan_serving, serving_table

    gpu = GPU(
        options.gpu_memory, options.gpu_tflops, options.gpu_float32_tflops, options.gpu_bandwidth,
        options.utilisation, options.cpu,
    )  # fmt: skip
    tables = []
    for served in _served(options, models, tracking_uri):
        plans = plan_serving(
            served, gpu, side=options.latent_size, batch=options.batch or 1, tokens=options.tokens,
            encoder_precision=options.encoder_precision,
            autoencoder_precision=options.autoencoder_precision or "float32",
        )  # fmt: skip
        tables.append(serving_table(plans, configured))
    print("\n\n".join(tables), flush=True)


def _served(options: argparse.Namespace, models: Sequence[str], tracking_uri: str | None) -> Sequence[Served]:
    from fewstep.plan import Served
    from fewstep.student import resolve_student
    from fewstep.train.recipe import DistillRecipe, load_recipe

    if options.recipe is not None:
        return [Served.recipe(load_recipe(DistillRecipe, options.recipe, options.set))]
    return [
        Served.student(resolve_student(model, tracking_uri=tracking_uri).folder, model) for model in models
    ]
