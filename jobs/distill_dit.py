#!/usr/bin/env python
"""Distil a class-conditional DiT teacher into a one- or two-step policy student."""

from pathlib import Path

from fewstep.cli import connect_ray, recipe_parser, run_job

RECIPES = Path(__file__).resolve().parent / "recipes"
EXAMPLES = """\
  ray job submit jobs/distill_dit.py
  ray job submit --working-dir . -- python jobs/distill_dit.py --recipe fashion_dit_2nfe
  python jobs/distill_dit.py --recipe imagenet_1nfe --set teacher.path=./models/dit-xl-2-flow --set train.workers=16"""


def main() -> None:
    from fewstep.evaluate.job import evaluate_and_register
    from fewstep.train.recipe import DistillRecipe, load_recipe
    from fewstep.train.trainer import fit

    parser = recipe_parser(
        "Distil a frozen class-conditional teacher of diffusers' DiT layout into a student that draws in one or two "
        "network evaluations (π-Flow), on the connected Ray cluster. Tracks to MLflow; ends with a comparison against "
        "the teacher, a picture and a registered model. Without options it distils the bundled Fashion-MNIST teacher "
        "to one evaluation (its pictures come with the Debian package dataset-fashion-mnist).",
        DistillRecipe,
        EXAMPLES,
        recipe="fashion_dit_1nfe",
    )
    options = parser.parse_args()
    recipe = load_recipe(DistillRecipe, options.recipe, options.set, RECIPES)
    connect_ray()
    trained = fit(recipe, options.resume)
    evaluate_and_register(recipe, trained)


if __name__ == "__main__":
    run_job(main)
