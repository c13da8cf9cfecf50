"""`fewstep evaluate`: a student against its teacher's own sampler."""

from __future__ import annotations

import argparse
from pathlib import Path

from fewstep.cli.common import BUNDLED_STUDENT, add_precision_option

DESCRIPTION = """\
Generate held-out captions with a student and with its teacher's guided Euler sampler at several numbers of steps, from
the same noise, on the whole Ray cluster. Prints a table of KID, paired feature distance, pixel error and diversity, and
writes pictures. Whatever is left out is as in the student's own recipe. What the teacher generates is kept in
.fewstep/teacher_images for its other students."""
EXAMPLES = """\
examples
  {program} --model emoji-student
  {program} --model models:/fashion-1step@champion
  {program} --model .fewstep/models/RUN --captions 512 --criteria full --out out/evaluation"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", default=BUNDLED_STUDENT, help="registered model, folder, or bundled name")
    parser.add_argument("--data", help="prepared dataset")
    parser.add_argument("--captions", type=int, metavar="N", help="held-out captions to generate")
    parser.add_argument(
        "--criteria",
        "--promise",
        choices=("quick", "full", "classes"),
        help="which acceptance criteria to check",
    )
    parser.add_argument("--gpu", action="store_true", help="generate on GPUs")
    add_precision_option(parser, of="the student's weights")
    add_precision_option(parser, "--teacher-precision", "the teacher's weights")
    parser.add_argument("--tracking-uri", help="where models:/… is looked up")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"), help="default: %(default)s")


def run(options: argparse.Namespace) -> None:
    """Generate, measure, print the table and write the pictures.

    Raises:
        UserError: there is no such student or dataset, or the two don't go together.
    """
    from fewstep.cluster import connect_ray
    from fewstep.data.datasets.bundled import open_data
    from fewstep.evaluate.generation import Precisions
    from fewstep.student import read_student_card, resolve_student
    from fewstep.train.recipe import DistillRecipe, load_recipe
    from fewstep.workflow.evaluation import evaluate, summary

    student = resolve_student(options.model, tracking_uri=options.tracking_uri).folder
    trained = read_student_card(student).recipe
    given = {
        "data.path": options.data,
        "evaluation.captions": options.captions,
        "evaluation.criteria": options.criteria,
    }
    recipe = load_recipe(
        DistillRecipe,
        {section: trained[section] for section in ("data", "evaluation") if section in trained},
        [f"{key}={value}" for key, value in given.items() if value is not None],
    )
    connect_ray()
    data = open_data(recipe.data.path).root
    precisions = Precisions(options.precision, options.teacher_precision)
    report = evaluate(student, data, recipe.evaluation, options.out, gpu=options.gpu, precisions=precisions)
    print(f"\n{summary(report, recipe.evaluation.criteria)}")
    print(f"picture  {(options.out / 'comparison.png').absolute()}")
