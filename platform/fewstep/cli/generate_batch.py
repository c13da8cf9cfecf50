"""`fewstep generate-batch`: images of many prompts, on the whole Ray cluster."""

from __future__ import annotations

import argparse

from fewstep.cli.common import add_precision_option, add_student_options, number

DESCRIPTION = """\
Write an image of every prompt of a file (one a line, or a table with a column caption, text or prompt) to a folder or
bucket, on all CPUs or GPUs of the Ray cluster, with a manifest. A job that was ended goes on with the same command;
each image is there once."""
EXAMPLES = """\
examples
  {program} --prompts prompts.txt --out out/images
  {program} --model models:/emoji64-4step@champion --prompts prompts.parquet --images-per-prompt 4 --out s3://bucket/images
  ray job submit -- {program} --model models:/qwen-4step@champion --prompts s3://bucket/prompts.jsonl --gpu \\
      --precision bfloat16 --batch-size 8 --out s3://bucket/images"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--prompts", required=True, metavar="FILE", help="local or s3://")
    add_student_options(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="local or s3://")
    parser.add_argument(
        "--images-per-prompt", type=number(int, 1), default=1, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of image 0; image n has seed + n; default: 0")
    parser.add_argument(
        "--nfe", "--steps", type=number(int, 1), metavar="N", help="network evaluations; default: as trained"
    )
    parser.add_argument("--height", type=number(int, 1), metavar="PIXELS", help="default: as trained")
    parser.add_argument("--width", type=number(int, 1), metavar="PIXELS", help="default: as trained")
    parser.add_argument(
        "--format", choices=("png", "webp", "jpeg"), default="png", help="default: %(default)s"
    )
    parser.add_argument(
        "--batch-size",
        type=number(int, 1),
        default=16,
        metavar="N",
        help="images at a time; default: %(default)s",
    )
    parser.add_argument(
        "--unit", type=number(int, 1), default=256, metavar="N",
        help="images of a unit of work, which is repeated whole if it is ended; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--gpu", action="store_true", help="generate on GPUs")
    add_precision_option(parser)


def run(options: argparse.Namespace) -> None:
    """Generate what is missing.

    Raises:
        UserError: there is no such student or file, or the folder has another job.
    """
    from fewstep.cluster import connect_ray
    from fewstep.data.sources import prompt_list
    from fewstep.student import resolve_student
    from fewstep.workflow.batch_generation import BatchConfig, generate_batch

    prompts = prompt_list(options.prompts, print)
    student = resolve_student(options.model, tracking_uri=options.tracking_uri).folder
    config = BatchConfig(**{name: getattr(options, name) for name in BatchConfig.model_fields})
    connect_ray()
    result = generate_batch(student, prompts, config, options.out, gpu=options.gpu)
    refused = f", {result.refused} refused (the manifest has the reasons)" if result.refused else ""
    print(f"{result.images:,} images in {options.out}, {result.made:,} of them now{refused}")
