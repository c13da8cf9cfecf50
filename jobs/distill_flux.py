#!/usr/bin/env python
"""Distil a guidance-distilled FLUX teacher into a few-step policy student."""

from pathlib import Path

from fewstep.cli import distill, run_job

DESCRIPTION = """\
Distil a frozen FLUX teacher into a student that draws in a few network evaluations (π-Flow), on the connected Ray
cluster. The teacher takes its guidance scale as an input (teacher.embedded_guidance); in the beginning its own steps
are mixed into the student's trajectories (imitation.mixing_steps). Tracks to MLflow; ends with a comparison against
the teacher, a picture and a registered model. Without options it runs the paper's recipe: FLUX.1 dev to 4
evaluations, on 8 GPUs of 80 GB and a dataset that jobs/prepare_data.py has prepared in data/flux."""
EXAMPLES = """\
  ray job submit --working-dir . -- python jobs/distill_flux.py
  ray job submit --working-dir . -- python jobs/distill_flux.py --recipe flux_8nfe
  ray job submit --working-dir . -- python jobs/distill_flux.py --set teacher.path=models/my-flux
  python jobs/distill_flux.py --resume flux_4nfe-20260101-120000"""


def main() -> None:
    distill(DESCRIPTION, EXAMPLES, Path(__file__).resolve().parent / "recipes", recipe="flux_4nfe")


if __name__ == "__main__":
    run_job(main)
