#!/usr/bin/env python
"""Distil a guidance-distilled FLUX teacher into a few-step policy student: `fewstep distill` with a recipe."""

from fewstep.cli import run_job

DESCRIPTION = """\
Distil a frozen FLUX teacher into a student that generates in a few network evaluations (π-Flow), on the connected Ray
cluster. The teacher takes its guidance scale as an input (teacher.embedded_guidance_scale); in the beginning its own
steps are mixed into the student's trajectories (imitation.mixing_steps). Tracks to MLflow; ends with a comparison
against the teacher, a picture and a registered model. Without options it distils the bundled small network of FLUX's
class to 4 evaluations, on two CPU cores. flux_4nfe and flux_8nfe are the paper's recipes for FLUX.1 dev, on 8 GPUs of
80 GB and a dataset that jobs/prepare_data.py has prepared in data/flux."""
EXAMPLES = """\
examples
  ray job submit {program}
  ray job submit --working-dir . -- python {program} --recipe flux_4nfe
  ray job submit --working-dir . -- python {program} --recipe flux_8nfe --set teacher.path=models/my-flux
  python {program} --resume emoji_flux_4nfe-20260101-120000"""

if __name__ == "__main__":
    run_job("distill", description=DESCRIPTION, examples=EXAMPLES, recipe="emoji_flux_4nfe")
