"""`fewstep export`: a student as a folder that diffusers loads as a pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path

from fewstep.cli.common import add_student_options, make_folder
from fewstep.errors import UserError

DESCRIPTION = "Write a distilled student as a folder that diffusers loads as a pipeline."
EXAMPLES = """\
examples
  {program} --out emoji                                     the bundled student
  {program} --model models:/emoji64-4step@champion --out emoji --merged --dtype bfloat16

The folder holds the student's adapters and head. Where it is loaded, the adapters are merged into the teacher that the
student's card names; with --merged the folder holds the whole transformer instead, and needs no teacher:

  pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
  pipe("red heart, noto style", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
  pipe.load_lora_weights(STYLE)          # a style LoRA of the same base, on top

fewstep must be installed where it is loaded; `trust_remote_code` lets diffusers run the two lines that import it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_student_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write it")
    parser.add_argument("--merged", action="store_true", help="write the whole transformer, adapters merged")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of a merged transformer on disk; default: float32",
    )


def run(options: argparse.Namespace) -> None:
    """Write the folder.

    Raises:
        UserError: there is no such student, or its family has no pipeline in diffusers.
    """
    if options.dtype and not options.merged:
        raise UserError(
            "--dtype is of a merged transformer: add --merged, or give torch_dtype where it is loaded."
        )
    make_folder(options.out, "--out")

    import torch

    from fewstep.student import FewStepPipeline
    from fewstep.student.diffusers import save_diffusers

    student = FewStepPipeline.from_pretrained(options.model, tracking_uri=options.tracking_uri)
    dtype = getattr(torch, options.dtype or "float32")
    save_diffusers(student, options.out, merged=options.merged, dtype=dtype)
    print(options.out.absolute())
