"""`fewstep evaluate`: a student against its teacher's own sampler."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.cli.common import BUNDLED_STUDENT, add_precision_option

if TYPE_CHECKING:
    from fewstep.evaluate.report import Report
    from fewstep.train.recipe import DistillRecipe

DESCRIPTION = """\
Generate held-out captions with students and with their teachers' guided samplers at several numbers of steps, from the
same noise, on the whole Ray cluster. Prints a table of KID, paired feature distance, pixel error and diversity, and
writes pictures and a report. Whatever is left out is as in the first student's own recipe. What a teacher generates is
kept in .fewstep/teacher_images for its other students; an evaluation that was ended goes on where it was."""
EXAMPLES = """\
examples
  {program} --model emoji64-student
  {program} --model models:/fashion-1step@champion
  {program} --model .fewstep/models/RUN --captions 512 --criteria full --out out/evaluation
  {program} --model emoji64-student --model .fewstep/models/RUN --out out/both
  {program} --model emoji64-student --prompts prompts.txt
  {program} --model models:/qwen-4step@champion --features inception:inception-v3-2015-12-05.pt --captions 10000
  {program} --model models:/qwen-4step@champion --clip openai/clip-vit-large-patch14 --images-per-caption 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model", action="append",
        help=f"registered model, folder, or bundled name; may be repeated; default: {BUNDLED_STUDENT}",
    )  # fmt: skip
    parser.add_argument("--data", help="prepared dataset")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts of your own, one a line or a table, in place of a dataset",
    )
    parser.add_argument("--captions", type=int, metavar="N", help="held-out captions to generate")
    parser.add_argument(
        "--criteria",
        "--promise",
        choices=("quick", "full", "classes"),
        help="which acceptance criteria to check",
    )
    parser.add_argument(
        "--solver",
        action="append",
        choices=("heun", "dpmpp", "unipc"),
        help="compare with this solver of the teacher's ODE, too; may be repeated",
    )
    parser.add_argument(
        "--features", metavar="NETWORK", help="efficientnet, inception:FILE, clip:MODEL or dinov2:MODEL"
    )
    parser.add_argument("--clip", metavar="MODEL", help="measure CLIP scores and retrieval with this model")
    parser.add_argument("--lpips", metavar="FILE", help="measure LPIPS with this TorchScript file")
    parser.add_argument(
        "--score", action="append", metavar="MODULE:FUNCTION", help="a score of your own; may be repeated"
    )
    parser.add_argument(
        "--images-per-caption", type=int, metavar="N", help="measure the diversity per prompt with so many"
    )
    parser.add_argument(
        "--training-images", type=int, metavar="N",
        help="look for what is generated among so many training images; writes nearest.png",
    )  # fmt: skip
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
    from fewstep.errors import UserError
    from fewstep.evaluate.generation import Precisions
    from fewstep.student import read_student_card, resolve_student
    from fewstep.workflow.evaluation import (
        evaluate,
        held_out,
        of_prompts,
        summary,
        training_images,
        write_page,
    )

    names = options.model or [BUNDLED_STUDENT]
    if len(set(names)) < len(names):
        raise UserError("--model: a student is named twice: give each once.")
    students = {name: resolve_student(name, tracking_uri=options.tracking_uri).folder for name in names}
    cards = {name: read_student_card(folder) for name, folder in students.items()}
    recipe, prompts = _recipe(options, cards[names[0]].recipe), _prompts(options)
    config, reports = recipe.evaluation, {}
    connect_ray()
    data = None if prompts is not None else open_data(recipe.data.path).root
    precisions = Precisions(options.precision, options.teacher_precision)
    for name, student in students.items():
        card = cards[name]
        batch = of_prompts(card, prompts or ()) if data is None else held_out(card, data, config.captions)
        training = None if data is None else training_images(card, data, config)
        out = options.out if len(names) == 1 else options.out / re.sub(r"[^\w.@-]+", "-", name).strip("-")
        reports[name] = evaluate(
            student, batch, config, out, training=training, gpu=options.gpu, precisions=precisions
        )
        page = write_page(reports[name], config, out, name)
        print(
            f"\n{summary(reports[name], config.criteria)}\nreport   {page.absolute()}\n"
            f"picture  {(out / 'comparison.png').absolute()}",
            flush=True,
        )
    if len(names) > 1:
        _together(reports, options.out)


def _recipe(options: argparse.Namespace, trained: Mapping[str, Any]) -> DistillRecipe:
    """A student's recipe with what the options change of its evaluation."""
    from fewstep.train.recipe import DistillRecipe, load_recipe

    given = {
        "data.path": options.data,
        "evaluation.captions": options.captions,
        "evaluation.criteria": options.criteria,
        "evaluation.solvers": options.solver and f"[{', '.join(options.solver)}]",
        "evaluation.features": options.features,
        "evaluation.clip": options.clip,
        "evaluation.lpips": options.lpips,
        "evaluation.scores": options.score and f"[{', '.join(options.score)}]",
        "evaluation.images_per_caption": options.images_per_caption,
        "evaluation.training_images": options.training_images,
    }
    return load_recipe(
        DistillRecipe,
        {section: trained[section] for section in ("data", "evaluation") if section in trained},
        [f"{key}={value}" for key, value in given.items() if value is not None],
    )


def _prompts(options: argparse.Namespace) -> list[str] | None:
    """The user's own prompts; None if the captions of a dataset are evaluated.

    Raises:
        UserError: a dataset is given, too, or the file can't be read.
    """
    from fewstep.data.sources import prompt_list
    from fewstep.errors import UserError

    if options.prompts is None:
        return None
    if options.data is not None:
        raise UserError("--prompts takes the place of --data: give one of them.")
    return prompt_list(options.prompts, print)[: options.captions]


def _together(reports: Mapping[str, Report], out: Path) -> None:
    """Write the report of several students side by side."""
    from fewstep.evaluate.report import side_by_side
    from fewstep.workflow.evaluation import write_page

    together = side_by_side(reports)
    (out / "report.json").write_text(together.to_json())
    print(f"together {write_page(together, None, out, ' and '.join(reports)).absolute()}")
