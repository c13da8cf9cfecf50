#!/usr/bin/env python
"""Measure a student against its teacher's own sampler, on held-out captions."""

import argparse
from pathlib import Path

from fewstep.cli import connect_ray, run_job

EXAMPLES = """\
examples
  jobs/evaluate.py --model emoji-student
  jobs/evaluate.py --model models:/fashion-1step@champion
  jobs/evaluate.py --model .fewstep/models/RUN --captions 512 --promise full --out out/evaluation"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw held-out captions with a student and with its teacher's guided Euler sampler at several "
        "numbers of steps, from the same noise, on the whole Ray cluster. Prints a table of KID, paired feature "
        "distance, pixel error and diversity, and writes pictures. Whatever is left out is as in the student's own "
        "recipe. What the teacher draws is kept in .fewstep/teacher_images for its other students.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="emoji-student", help="registered model, folder, or bundled name")
    parser.add_argument("--data", help="prepared dataset")
    parser.add_argument("--captions", type=int, help="held-out captions to draw")
    parser.add_argument("--promise", choices=("quick", "full", "classes"), help="which promises to check")
    parser.add_argument("--gpu", action="store_true", help="draw on GPUs")
    parser.add_argument("--tracking-uri", help="where models:/… is looked up")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"), help="default: %(default)s")
    options = parser.parse_args()

    from fewstep.data.shipped import open_data
    from fewstep.evaluate.job import evaluate
    from fewstep.evaluate.report import verdict_table
    from fewstep.export.pipeline import read_student_card, student_folder
    from fewstep.train.recipe import DistillRecipe, load_recipe

    student = student_folder(options.model, options.tracking_uri)
    trained = read_student_card(student).recipe
    given = {"data.path": options.data, "evaluation.captions": options.captions,
             "evaluation.promise": options.promise}  # fmt: skip
    recipe = load_recipe(
        DistillRecipe,
        {section: trained[section] for section in ("data", "evaluation") if section in trained},
        [f"{key}={value}" for key, value in given.items() if value is not None],
        Path(),
    )
    connect_ray()
    data = open_data(recipe.data.path).root
    report = evaluate(student, data, recipe.evaluation, options.out, gpu=options.gpu)
    print(f"\n{report.table()}\n\n{verdict_table(report.verdicts(recipe.evaluation.promise))}\n")
    print(f"picture  {(options.out / 'comparison.png').absolute()}")


if __name__ == "__main__":
    run_job(main)
