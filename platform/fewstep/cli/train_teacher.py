"""`fewstep train-teacher`: a flow-matching teacher, trained with the same machinery that distils it."""

from __future__ import annotations

import argparse
from shlex import quote

from fewstep.cli.common import add_recipe_options, chosen_recipe

DESCRIPTION = """\
Train a small flow-matching teacher on a prepared dataset, with captions (or classes) dropped now and then so that
classifier-free guidance works. Writes a diffusers folder with a card. Without options it is the teacher of 64x64
emoji, a QwenImageTransformer2DModel."""
EXAMPLES = """\
examples
  ray job submit -- {program}
  ray job submit -- {program} --recipe fashion_teacher
  {program} --recipe emoji_edit_teacher
  {program} --set network.start=emoji64 --set train.steps=2000"""

_RECIPES = {
    "dit": "fashion_dit_1nfe",
    "flux": "emoji_flux_4nfe",
}  # that distil a family; the default takes all others


def add_arguments(parser: argparse.ArgumentParser, *, recipe: str = "emoji64_teacher") -> None:
    """Declare the options.

    Args:
        parser: the command's.
        recipe: name of the recipe that is run where none is given.
    """
    from fewstep.train.recipe import TeacherRecipe

    add_recipe_options(parser, TeacherRecipe, recipe)


def run(options: argparse.Namespace) -> None:
    """Train, and print the command that distils the result.

    Raises:
        UserError: what the recipe asks for can't work; see `fewstep.train.trainer.fit`.
    """
    from fewstep.cluster import connect_ray
    from fewstep.data.datasets import EMOJI_EDITS_DATA
    from fewstep.train.recipe import TeacherRecipe
    from fewstep.train.trainer import fit

    recipe = chosen_recipe(TeacherRecipe, options, options.default_recipe)
    connect_ray()
    trained = fit(recipe, options.resume)
    print(f"\nteacher     {trained.folder}\nMLflow run  {trained.mlflow_run}", flush=True)
    network = recipe.network
    settings = [
        f"teacher.path={trained.folder}",
        f"teacher.family={network.family}",
        f"data.path={recipe.data.path}",
    ]
    if network.module:
        settings.append(f"teacher.module={network.module}")
    if network.family not in {"qwen_image", *_RECIPES}:  # the default recipe adapts Qwen-Image's layers
        settings.append("student.lora={rank: 48}")
    words = ["fewstep distill", *(f"--set {quote(setting)}" for setting in settings)]
    name = "emoji_edit_4nfe" if recipe.data.path == EMOJI_EDITS_DATA else _RECIPES.get(network.family)
    if name is not None:
        words.insert(1, f"--recipe {name}")
    print(f"distil it   {' '.join(words)}")
