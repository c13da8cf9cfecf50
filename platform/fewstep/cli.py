"""What all jobs share at their command line: help pages, errors without tracebacks, and where outputs go."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from fewstep.errors import UserError

if TYPE_CHECKING:
    from fewstep.train.recipe import DistillRecipe, Recipe

HOME = "FEWSTEP_HOME"
"""Environment variable: the folder that relative paths (data, runs, mlflow.db) are relative to."""


def run_job(main: Callable[[], None]) -> None:
    """Run a job's main function; a `UserError` becomes one line on stderr and exit status 2."""
    enter_home()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def enter_home() -> None:
    """Change to the folder of relative paths.

    That is `FEWSTEP_HOME`, or where the job was started. A job submitted with --working-dir starts in a
    throw-away copy inside Ray's own files; its outputs go to ~/fewstep instead.
    """
    home = os.environ.get(HOME)
    if home is None and "working_dir_files" in Path.cwd().parts:
        home = str(Path.home() / "fewstep")
        print(f"outputs go to {home} (set {HOME} to choose)", flush=True)
    if home is not None:
        Path(home).mkdir(parents=True, exist_ok=True)
        os.chdir(home)


def connect_ray(*, show_logs: bool = True) -> None:
    """Join the running Ray cluster, or start a local one for this job.

    Two logical CPUs more than there are: the data pipeline needs slots beside workers that hold all CPUs.

    Args:
        show_logs: repeat what workers print.
    """
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", log_to_driver=show_logs)
    except ConnectionError:
        # On loopback alone, and so without the token that Ray would otherwise leave in ~/.ray: `ray start` would
        # find it there, demand it, and `ray job submit` would not send it.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(num_cpus=(os.cpu_count() or 1) + 2, _node_ip_address="127.0.0.1", log_to_driver=show_logs)


def recipe_parser(
    description: str, kind: type[BaseModel], examples: str, recipe: str
) -> argparse.ArgumentParser:
    """A parser for jobs that take a recipe; its help page documents every field.

    Args:
        description: what the job does, one paragraph.
        kind: the recipe's type.
        examples: command lines, shown below the options.
        recipe: name of the recipe that is run when none is given.
    """
    from fewstep.train.recipe import document

    fields = "\n".join(f"  {key} = {default}\n      {text}" for key, default, text in document(kind))
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}\n\n"
        f"recipe fields (--set key=value), with the values they have where a recipe is silent:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe", metavar="NAME|FILE",
        help=f"a recipe of jobs/recipes, or a YAML file; default: {recipe}, or that of the run to resume",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one field; may be repeated"
    )
    parser.add_argument("--resume", metavar="RUN", help="name of an interrupted run to continue")
    return parser


def add_student_options(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--tracking-uri`: which student a job takes."""
    parser.add_argument(
        "--model", default="emoji-student",
        help="a registered model (models:/name@alias), an exported folder, or a bundled one: emoji-student (default), "
        "fashion-student",
    )  # fmt: skip
    parser.add_argument(
        "--tracking-uri", help="where models:/… is looked up; default: MLFLOW_TRACKING_URI or ./mlflow.db"
    )


def chosen_recipe(kind: type[Recipe], options: argparse.Namespace, recipes: Path, default: str) -> Recipe:
    """The recipe that a command line means: the named one, or else that of the run to resume, or the default.

    Args:
        kind: the recipe's type.
        options: what `recipe_parser` parsed.
        recipes: folder of the recipes that `--recipe` names.
        default: name of the recipe where none is named.

    Raises:
        UserError: there is no such recipe, a key of it is unknown or ill-typed, or there is no such run.
    """
    from fewstep.train.recipe import load_recipe
    from fewstep.train.runs import check_resumable, recipe_of

    recipe, run = load_recipe(kind, options.recipe or default, options.set, recipes), options.resume
    if run is None:
        return recipe
    if options.recipe is None and (own := recipe_of(run, recipe.train.storage)) is not None:
        recipe = load_recipe(kind, own, options.set, recipes)
    check_resumable(recipe, run)
    return recipe


def distill(description: str, examples: str, recipes: Path, recipe: str) -> None:
    """The whole of a distillation job, from its command line to the registered model.

    Args:
        description: what the job does, for its help page.
        examples: command lines, shown below the options.
        recipes: folder of the recipes that `--recipe` names.
        recipe: the one that is run when none is named.

    Raises:
        UserError: what the recipe asks for can't work; see `fit`.
    """
    from fewstep.evaluate.job import evaluate_and_register
    from fewstep.train.recipe import DistillRecipe
    from fewstep.train.trainer import fit

    parser = recipe_parser(description, DistillRecipe, examples, recipe)
    _add_plan_options(parser)
    options = parser.parse_args()
    chosen = chosen_recipe(DistillRecipe, options, recipes, default=recipe)
    if options.dry_run:
        _print_plan(chosen, options)
        return
    connect_ray()
    evaluate_and_register(chosen, fit(chosen, options.resume))


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    """`--dry-run` and what it is told of the machine; see `_print_plan`."""
    group = parser.add_argument_group("dry run")
    group.add_argument(
        "--dry-run", action="store_true",
        help="print parameters, memory by part, operations, storage and hours, and stop; needs no weights and no Ray",
    )  # fmt: skip
    group.add_argument("--gpus", type=int, metavar="N", help="how many; default: train.workers")
    group.add_argument(
        "--gpu-memory", type=float, default=80, metavar="GB", help="of each; default: %(default)s"
    )
    group.add_argument(
        "--gpu-tflops",
        type=float,
        default=989,
        metavar="T",
        help="peak of each; default: %(default)s, an H100",
    )
    group.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        metavar="F",
        help="share of the peak reached; default: %(default)s",
    )
    group.add_argument(
        "--latent-size", type=int, metavar="CELLS",
        help="latent height and width; default: of the data, if it is prepared, or of the teacher's card, or 128",
    )  # fmt: skip
    group.add_argument(
        "--tokens", type=int, default=256, metavar="N", help="per caption; default: %(default)s"
    )


def _print_plan(recipe: DistillRecipe, options: argparse.Namespace) -> None:
    """Print what the recipe costs on the machine that the options of `_add_plan_options` describe."""
    from fewstep.train.plan import Machine, make_plan

    gpus = options.gpus or recipe.train.workers
    machine = Machine(gpus, options.gpu_memory, options.gpu_tflops, options.utilisation)
    print(make_plan(recipe, machine, side=options.latent_size, tokens=options.tokens).table(), flush=True)
