#!/usr/bin/env python
"""Distil a guidance-distilled FLUX teacher into a few-step policy student."""

from pathlib import Path

from fewstep.cli import distill, run_job

DESCRIPTION = """\
Distil a frozen FLUX teacher into a student that draws in a few network evaluations (π-Flow), on the connected Ray
cluster. The teacher takes its guidance scale as an input (teacher.embedded_guidance); in the beginning its own steps
are mixed into the student's trajectories (imitation.mixing_steps). Tracks to MLflow; ends with a comparison against
the teacher, a picture and a registered model. Without options it distils the bundled small network of FLUX's class
to 4 evaluations, on two CPU cores. flux_4nfe and flux_8nfe are the paper's recipes for FLUX.1 dev, on 8 GPUs of 80 GB
and a dataset that jobs/prepare_data.py has prepared in data/flux."""
EXAMPLES = """\
  ray job submit jobs/distill_flux.py
  ray job submit --working-dir . -- python jobs/distill_flux.py --recipe flux_4nfe
  ray job submit --working-dir . -- python jobs/distill_flux.py --recipe flux_8nfe --set teacher.path=models/my-flux
  python jobs/distill_flux.py --resume emoji_flux_4nfe-20260101-120000"""


def main() -> None:
    distill(DESCRIPTION, EXAMPLES, Path(__file__).resolve().parent / "recipes", recipe="emoji_flux_4nfe")


if __name__ == "__main__":
    run_job(main)
