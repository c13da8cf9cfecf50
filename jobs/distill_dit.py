#!/usr/bin/env python
"""Distil a class-conditional DiT teacher into a one- or two-step policy student: `fewstep distill` with a recipe."""

from fewstep.cli import run_job

DESCRIPTION = """\
Distil a frozen class-conditional teacher of diffusers' DiT layout into a student that generates in one or two network
evaluations (π-Flow), on the connected Ray cluster. Tracks to MLflow; ends with a comparison against the teacher, a
picture and a registered model. Without options it distils the bundled Fashion-MNIST teacher to one evaluation; the
set's pictures come with the Debian package dataset-fashion-mnist, or from a folder of its four idx files that
jobs/prepare_data.py --source fashion-mnist was given."""
EXAMPLES = """\
examples
  ray job submit {program}
  ray job submit --working-dir . -- python {program} --recipe fashion_dit_2nfe
  python {program} --recipe imagenet_1nfe --set teacher.path=./models/dit-xl-2-flow --set train.workers=16"""

if __name__ == "__main__":
    run_job("distill", description=DESCRIPTION, examples=EXAMPLES, recipe="fashion_dit_1nfe")
