"""`fewstep push`: a student to the Hugging Face hub, with a model card made from its evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.common import add_student_options
from fewstep.errors import UserError

if TYPE_CHECKING:
    from fewstep.student import StudentCard

DESCRIPTION = """\
Push a student's own folder to a repository of the Hugging Face hub: its weights, its card, the picture of its
evaluation if there is one, and a model card with the evaluation's figures. FewStepPipeline.from_pretrained and every
--model then take OWNER/NAME. fewstep export makes a pipeline for diffusers of it; the teacher's weights are not
pushed."""
EXAMPLES = """\
examples
  {program} --model models:/emoji64-4step@champion --repo OWNER/emoji64-4step --dry-run
  {program} --model models:/emoji64-4step@champion --repo OWNER/emoji64-4step --private
  {program} --model .fewstep/models/RUN --repo OWNER/NAME --revision v2         found as OWNER/NAME@v2

Log in with `hf auth login` before, or set HF_TOKEN to a token that may write."""

PUSHED = ("*.safetensors", "config.json", "family.py", "comparison.png")
"""Patterns of the files of a student's folder that are pushed as they are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_student_options(parser)
    parser.add_argument(
        "--repo",
        required=True,
        metavar="OWNER/NAME",
        help="where to; the repository is made if it is not there",
    )
    parser.add_argument(
        "--private", action="store_true", help="make a new repository private; one that exists stays as it is"
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", help="made if it is not there; default: the main branch"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the model card and the names of the files, and stop"
    )


def run(options: argparse.Namespace) -> None:
    """Make the card, and push.

    Raises:
        UserError: there is no such student, or it can't be pushed there.
    """
    from fewstep.hub import check_repository, is_hub_id, push_files

    # Before the slow imports, and before a student is fetched.
    check_repository(options.repo, writing=not options.dry_run)
    address = options.repo if options.revision is None else f"{options.repo}@{options.revision}"
    if not is_hub_id(address):
        raise UserError(
            f"--revision: {options.revision!r} is no name of a branch: give one without spaces and @."
        )

    from fewstep.evaluate.model_card import README, model_card
    from fewstep.student import read_student_card, resolve_student

    folder = resolve_student(options.model, tracking_uri=options.tracking_uri).folder
    card = read_student_card(folder)
    text = str(model_card(folder, card, address))
    files: dict[str, bytes | Path] = {README: text.encode()}
    files |= _own_files(folder, card)
    if options.dry_run:
        print(f"{text}\nfiles  {', '.join(sorted(files))}")
        return
    print(
        push_files(
            options.repo, files, "A student of fewstep", private=options.private, branch=options.revision
        )
    )


def _own_files(folder: Path, card: StudentCard) -> dict[str, bytes | Path]:
    """The student's files by name: what loading it needs, and the picture."""
    from fewstep.student.card import CARD, card_text

    found = {file.name: file for pattern in PUSHED for file in folder.glob(pattern)}
    # Addresses of MLflow and of checkpoints are of no use to others, and may hold passwords.
    recipe = {key: value for key, value in card.recipe.items() if key != "tracking"}
    if isinstance(recipe.get("train"), dict):
        recipe["train"] = {key: value for key, value in recipe["train"].items() if key != "storage"}
    return found | {CARD: card_text(card.model_copy(update={"recipe": recipe})).encode()}
