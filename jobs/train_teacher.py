#!/usr/bin/env python
"""Train a flow-matching teacher with the same machinery that distils it."""

from pathlib import Path
from shlex import quote

from fewstep.cli import chosen_recipe, connect_ray, recipe_parser, run_job

RECIPES = Path(__file__).resolve().parent / "recipes"
DEFAULT = "emoji_teacher"
DISTILLERS = {"dit": "distill_dit", "flux": "distill_flux"}
"""Jobs by family; distill_qwen takes all others."""
EXAMPLES = """\
  ray job submit jobs/train_teacher.py
  ray job submit --working-dir . -- python jobs/train_teacher.py --recipe fashion_teacher
  python jobs/train_teacher.py --set network.start=emoji --set train.steps=2000"""


def main() -> None:
    from fewstep.train.recipe import TeacherRecipe
    from fewstep.train.trainer import fit

    parser = recipe_parser(
        "Train a small flow-matching teacher on a prepared dataset, with captions (or classes) dropped now and then so "
        "that classifier-free guidance works. Writes a diffusers folder with a card. Without options it is the emoji "
        "teacher, a QwenImageTransformer2DModel.",
        TeacherRecipe,
        EXAMPLES,
        recipe=DEFAULT,
    )
    options = parser.parse_args()
    recipe = chosen_recipe(TeacherRecipe, options, RECIPES, default=DEFAULT)
    connect_ray()
    trained = fit(recipe, options.resume)
    print(f"\nteacher     {trained.folder}\nMLflow run  {trained.mlflow_run}", flush=True)
    job = DISTILLERS.get(recipe.network.family, "distill_qwen")
    network = recipe.network
    settings = [
        f"teacher.path={trained.folder}",
        f"teacher.family={network.family}",
        f"data.path={recipe.data.path}",
    ]
    if network.module:
        settings.append(f"teacher.module={network.module}")
    if network.family not in {"qwen_image", *DISTILLERS}:  # the default recipe adapts Qwen-Image's layers
        settings.append("student.lora={rank: 48}")
    print(f"distil it   jobs/{job}.py " + " ".join(f"--set {quote(setting)}" for setting in settings))


if __name__ == "__main__":
    run_job(main)
