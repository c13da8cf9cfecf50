"""`fewstep distill`: from a recipe to a distilled, measured and registered student."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fewstep.cli.common import add_recipe_options, chosen_recipe, number
from fewstep.cli.dry_run import add_machine_options, add_references_option, plan_only, refuse_unread

if TYPE_CHECKING:
    from fewstep.plan import Machine
    from fewstep.train.recipe import DistillRecipe

DESCRIPTION = """\
Distil a frozen text-to-image teacher into a student that generates in a few network evaluations (π-Flow), on the
connected Ray cluster. Tracks to MLflow; ends with a comparison against the teacher, a picture and a registered model.
Without options it distils the bundled teacher of 64x64 emoji to 4 evaluations, in 8 to 20 minutes on two CPU cores."""
EXAMPLES = """\
examples
  ray job submit -- {program}
  ray job submit -- {program} --recipe emoji64_qwen_4nfe_full
  ray job submit -- {program} --set train.steps=200 --set optimizer.lr=5e-4
  {program} --recipe qwen_image_4nfe --dry-run --gpus 8 --gpu-memory 80
  {program} --recipe qwen_image_4nfe --dry-run --scaling 8 32 128 --infiniband 12.5
  {program} --resume emoji64_qwen_4nfe-20260101-120000"""


def add_arguments(parser: argparse.ArgumentParser, *, recipe: str = "emoji64_qwen_4nfe") -> None:
    """Declare the options.

    Args:
        parser: the command's.
        recipe: name of the recipe that is run where none is given.
    """
    from fewstep.train.recipe import DistillRecipe

    add_recipe_options(parser, DistillRecipe, recipe)
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry-run", action="store_true",
        help="print parameters, memory by part, operations, storage and hours, and stop; needs no weights and no Ray",
    )  # fmt: skip
    group.add_argument(
        "--gpus", type=number(int, 1), metavar="N", help="how many; default: the fewest of train.workers"
    )
    add_machine_options(group)
    group.add_argument(
        "--latent-size", type=number(int, 1), metavar="CELLS",
        help="latent height and width; default: of the data, if it is prepared, or of the teacher's card, or 128",
    )  # fmt: skip
    group.add_argument(
        "--tokens", type=number(int, 1), default=256, metavar="N", help="per caption; default: %(default)s"
    )
    add_references_option(group)
    many = parser.add_argument_group("dry run on many GPUs")
    _add_scaling_options(many)
    plan_only(parser, group, many)


def _add_scaling_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scaling", type=number(int, 1), nargs="*", metavar="N",
        help="print instead the time of a step on these numbers of GPUs, whole nodes, with their messages; default: "
        "8 16 32 64 128 256",
    )  # fmt: skip
    group.add_argument(
        "--gpus-per-node",
        type=number(int, 1),
        default=8,
        metavar="N",
        help="joined by NVLink; default: %(default)s",
    )
    group.add_argument(
        "--nvlink", type=number(float, 0.001), default=450.0, metavar="GB",
        help="that each GPU sends, and receives, per second in its node; default: %(default)s, an H100",
    )  # fmt: skip
    group.add_argument(
        "--infiniband", type=number(float, 0.001), default=50.0, metavar="GB",
        help="likewise between nodes, for each GPU; default: %(default)s, which are 400 Gbit/s",
    )  # fmt: skip
    group.add_argument(
        "--link-utilisation", type=number(float, 0.001, 1), default=0.8, metavar="F",
        help="share of these rates that messages reach; default: %(default)s",
    )  # fmt: skip
    group.add_argument("--plot", metavar="FILE", help="also draw the steps of --scaling into this picture")


def needs_extra(options: argparse.Namespace) -> bool:
    """Whether the extra must be installed: a dry run computes without Ray and MLflow, unless it draws."""
    return not options.dry_run or options.plot is not None


def run(options: argparse.Namespace) -> None:
    """Distil, measure and register; or only tell what it would cost.

    Raises:
        UserError: what the recipe asks for can't work; see `fewstep.train.trainer.fit`.
    """
    from fewstep.train.recipe import DistillRecipe

    recipe = chosen_recipe(DistillRecipe, options, options.default_recipe)
    if options.dry_run:
        (_print_plan if options.scaling is None else _print_scaling)(recipe, options)
        return
    refuse_unread(options)

    from fewstep.cluster import connect_ray
    from fewstep.workflow.distil import distil

    connect_ray()
    distil(recipe, options.resume)


def _print_plan(recipe: DistillRecipe, options: argparse.Namespace) -> None:
    """Print what the recipe costs on the machine that the options of the dry run describe."""
    from fewstep.plan import make_plan, plan_table

    plan = make_plan(recipe, _machine(recipe, options), **_sizes(options))
    print(plan_table(plan), flush=True)


def _print_scaling(recipe: DistillRecipe, options: argparse.Namespace) -> None:
    """Print, and draw if asked to, how long the recipe's step takes on several numbers of GPUs."""
    from fewstep.plan.scaling import GPUS, Links, Scaling, scaling_table

    links = Links(
        options.gpus_per_node, options.nvlink, options.infiniband, options.link_utilisation,
        options.gpu_bandwidth,
    )  # fmt: skip
    machine = _machine(recipe, options)
    scaling = Scaling(recipe, machine, **_sizes(options))
    numbers = options.scaling or GPUS
    print(scaling_table(scaling, links, numbers), flush=True)
    if options.plot is not None:
        from fewstep.plan.scaling_plot import scaling_plot

        scaling_plot(scaling, links, numbers).savefig(options.plot)


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    """Those of a caption's images and text, as plans take them."""
    return {"side": options.latent_size, "tokens": options.tokens, "references": options.references}


def _machine(recipe: DistillRecipe, options: argparse.Namespace) -> Machine:
    from fewstep.plan import Machine

    gpus = options.gpus or recipe.train.fewest_workers
    return Machine(gpus, options.gpu_memory, options.gpu_tflops, options.utilisation)
