#!/usr/bin/env python
"""Distil a Qwen-Image-class teacher into a few-step policy student; the product's main job."""

from pathlib import Path

from fewstep.cli import add_plan_options, connect_ray, print_plan, recipe_parser, run_job

RECIPES = Path(__file__).resolve().parent / "recipes"
EXAMPLES = """\
  ray job submit jobs/distill_qwen.py
  ray job submit --working-dir . -- python jobs/distill_qwen.py --recipe emoji_qwen_4nfe_full
  ray job submit --working-dir . -- python jobs/distill_qwen.py --set train.steps=200 --set optimizer.rate=5e-4
  python jobs/distill_qwen.py --recipe qwen_image_4nfe --dry-run --gpus 8 --gpu-memory 80
  python jobs/distill_qwen.py --resume emoji_qwen_4nfe-20260101-120000"""


def main() -> None:
    from fewstep.evaluate.job import evaluate_and_register
    from fewstep.train.recipe import DistillRecipe, load_recipe
    from fewstep.train.trainer import fit

    parser = recipe_parser(
        "Distil a frozen text-to-image teacher into a student that draws in a few network evaluations (π-Flow), on "
        "the connected Ray cluster. Tracks to MLflow; ends with a comparison against the teacher, a picture and a "
        "registered model. Without options it distils the bundled emoji teacher to 4 evaluations, in some 20 minutes "
        "on two CPU cores.",
        DistillRecipe,
        EXAMPLES,
        recipe="emoji_qwen_4nfe",
    )
    add_plan_options(parser)
    options = parser.parse_args()
    recipe = load_recipe(DistillRecipe, options.recipe, options.set, RECIPES)
    if options.dry_run:
        print_plan(recipe, options)
        return
    connect_ray()
    trained = fit(recipe, options.resume)
    evaluate_and_register(recipe, trained)


if __name__ == "__main__":
    run_job(main)
