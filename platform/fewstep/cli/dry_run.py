"""The options of dry runs, which several commands share, and the dry run of a service."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fewstep.cli.common import number
from fewstep.config import PRECISIONS, Precision

if TYPE_CHECKING:
    from fewstep.plan import Served


def add_machine_options(group: argparse._ArgumentGroup) -> None:
    """Declare what a run is planned for: memory of each GPU, and its rates."""
    group.add_argument(
        "--gpu-memory",
        type=number(float, 0.01),
        default=80.0,
        metavar="GB",
        help="of each; default: %(default)s",
    )
    group.add_argument(
        "--gpu-tflops", type=number(float, 0.01), default=989.0, metavar="T",
        help="peak of each in bfloat16; default: %(default)s, an H100",
    )  # fmt: skip
    group.add_argument(
        "--gpu-bandwidth", type=number(float, 0.001), default=3.35, metavar="TB",
        help="of its memory, per second; default: %(default)s, an H100",
    )  # fmt: skip
    group.add_argument(
        "--utilisation",
        type=number(float, 0.001, 1),
        default=0.4,
        metavar="F",
        help="share of the peak reached; default: %(default)s",
    )


def add_serving_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the dry run of a command that generates with students; returns the group of its options."""
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
        "--gpu-float32-tflops", type=number(float, 0.01), default=67.0, metavar="T",
        help="peak in float32; default: %(default)s, an H100",
    )  # fmt: skip
    group.add_argument("--cpu", action="store_true", help="plan for a CPU with that memory")
    group.add_argument(
        "--batch",
        type=number(int, 1),
        metavar="N",
        help="images at a time; default: as a service is configured, or 1",
    )
    group.add_argument(
        "--latent-size", type=number(int, 1), metavar="CELLS",
        help="latent height and width; default: as the student was trained, or 128",
    )  # fmt: skip
    group.add_argument(
        "--tokens",
        type=number(int, 1),
        metavar="N",
        help="per caption; default: as many as a caption may have",
    )
    add_references_option(group)
    return group


def add_references_option(group: argparse._ArgumentGroup) -> None:
    """Declare how many reference images are planned for."""
    group.add_argument(
        "--references", type=number(int, 0), metavar="N",
        help="reference images per caption, for editing; default: of the data or the student, if there is one, or 0",
    )  # fmt: skip


def add_parts_options(group: argparse._ActionsContainer) -> None:
    """Declare the precisions of text encoder and autoencoder."""
    group.add_argument(
        "--encoder-precision", choices=PRECISIONS,
        help="of the text encoder's weights; default: float32, or bfloat16 for a large language model on a GPU",
    )  # fmt: skip
    group.add_argument(
        "--autoencoder-precision", choices=PRECISIONS[:2],
        help="of the autoencoder; default: float32",
    )  # fmt: skip


def plan_only(parser: argparse.ArgumentParser, *groups: argparse._ArgumentGroup) -> None:
    """Remember the options of groups as such that only a dry run reads; see `refuse_unread`."""
    actions = [action for group in groups for action in group._group_actions]
    actions = [action for action in actions if action.dest not in {"dry_run", "recipe", "set"}]
    parser.set_defaults(
        plan_only={action.option_strings[0]: action for action in actions}, error=parser.error
    )


def refuse_unread(options: argparse.Namespace, *also: str) -> None:
    """End with the usage line where an option was given that only a dry run reads, and there is to be none.

    Args:
        options: what a parser with `plan_only` parsed.
        also: names of more options that only the dry run reads.
    """
    unread = [
        name for name, action in options.plan_only.items() if getattr(options, action.dest) != action.default
    ]
    unread += [name for name in also if getattr(options, name.strip("-"))]
    if unread:
        options.error(f"{unread[0]} is of dry runs: add --dry-run, or leave it out")


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
        configured: the precision that was chosen, which is marked.

    Raises:
        UserError: there is no such student or recipe, or it can't be planned.
    """
    if options.set and options.recipe is None:
        options.error("--set changes a recipe: name it with --recipe")
    from fewstep.plan import GPU, plan_serving, serving_table

    gpu = GPU(
        options.gpu_memory, options.gpu_tflops, options.gpu_float32_tflops, options.gpu_bandwidth,
        options.utilisation, options.cpu,
    )  # fmt: skip
    tables = []
    for served in _served(options, models, tracking_uri):
        plans = plan_serving(
            served, gpu, side=options.latent_size, batch=options.batch or 1, tokens=options.tokens,
            references=options.references,
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
