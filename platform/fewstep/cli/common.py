"""Options and checks that several commands share."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.config import PRECISIONS
from fewstep.errors import UserError

if TYPE_CHECKING:
    from fewstep.train.recipe import Recipe

BUNDLED_STUDENT = "emoji64-student"
"""The student that is taken where a command line names none."""


def add_student_options(parser: argparse.ArgumentParser) -> None:
    """Declare `--model` and `--tracking-uri`: which student a command takes."""
    parser.add_argument(
        "--model", default=BUNDLED_STUDENT,
        help="a registered model (models:/name@alias), a folder or s3:// address that a distillation wrote, a hub id, "
        "or a bundled one: emoji64-student (default), emoji-student (of 16x16 pixels), fashion-student",
    )  # fmt: skip
    parser.add_argument(
        "--tracking-uri", help="where models:/… is looked up; default: MLFLOW_TRACKING_URI or ./mlflow.db"
    )


def add_precision_option(
    parser: argparse.ArgumentParser, flag: str = "--precision", of: str = "its weights"
) -> None:
    """Declare `--precision`, or another option for the precision of a model.

    Args:
        parser: the command's.
        flag: name of the option.
        of: what it is the precision of, for the help page.
    """
    parser.add_argument(
        flag, choices=PRECISIONS, default="float32",
        help=f"of {of}; int8 and int4 need the extra quantization; default: %(default)s",
    )  # fmt: skip


def number(kind: type[float], least: float, most: float | None = None) -> Callable[[str], float]:
    """What reads an option's number (argparse's `type`), and refuses those out of range in one sentence.

    Args:
        kind: int for whole numbers, or float.
        least: smallest one.
        most: largest one; None for no limit.
    """

    def read(text: str) -> float:
        what = "a whole number" if kind is int else "a number"
        wanted = f"{what} from {least} to {most}" if most is not None else f"{what} of at least {least}"
        try:
            value = kind(text)
            # NaN fails every comparison; infinity is no number of anything.
            fits = least <= value < math.inf and (most is None or value <= most)
        except ValueError:
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


def make_folder(folder: Path, option: str) -> None:
    """Make the folder that a command is going to write to, before it has worked for minutes.

    Args:
        folder: which one.
        option: that named it, for the message.

    Raises:
        UserError: it can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option}: can't write to the folder {folder} ({error.strerror}).") from error


def add_recipe_options(parser: argparse.ArgumentParser, kind: type[Recipe], default: str) -> None:
    """Declare `--recipe`, `--set` and `--resume`, and document every field of the recipe below the examples.

    Args:
        parser: of a command that takes a recipe; its epilog grows.
        kind: the recipe's type.
        default: name of the recipe that is run where none is given.
    """
    from fewstep.config import document

    fields = "\n".join(f"  {key} = {value}\n      {text}" for key, value, text in document(kind))
    parser.epilog = (
        f"{parser.epilog}\n\n"
        f"recipe fields (--set key=value), with the values they have where a recipe is silent:\n{fields}"
    )
    parser.set_defaults(default_recipe=default)
    parser.add_argument(
        "--recipe", metavar="NAME|FILE",
        help=f"a bundled recipe's name, or a YAML file; default: {default}, or that of the run to resume",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one field; may be repeated"
    )
    parser.add_argument("--resume", metavar="RUN", help="name of an interrupted run to continue")


def chosen_recipe(kind: type[Recipe], options: argparse.Namespace, default: str) -> Recipe:
    """The recipe that a command line means: the named one, or else that of the run to resume, or the default.

    Args:
        kind: the recipe's type.
        options: what a parser with `add_recipe_options` parsed.
        default: name of the recipe where none is named.

    Raises:
        UserError: there is no such recipe, a key of it is unknown or ill-typed, or there is no such run.
    """
    from fewstep.train.recipe import load_recipe
    from fewstep.train.runs import check_resumable, recipe_of

    recipe, run = load_recipe(kind, options.recipe or default, options.set), options.resume
    if run is None:
        return recipe
    if options.recipe is None and (own := recipe_of(run, recipe.train.storage)) is not None:
        recipe = load_recipe(kind, own, options.set)
    check_resumable(recipe, run)
    return recipe
