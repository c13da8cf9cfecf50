#!/usr/bin/env python
"""Distil a Qwen-Image-class teacher into a few-step policy student; the product's main job."""

from pathlib import Path

from fewstep.cli import distill, run_job

DESCRIPTION = """\
Distil a frozen text-to-image teacher into a student that draws in a few network evaluations (π-Flow), on the connected
Ray cluster. Tracks to MLflow; ends with a comparison against the teacher, a picture and a registered model. Without
options it distils the bundled emoji teacher to 4 evaluations, in some 20 minutes on two CPU cores."""
EXAMPLES = """\
  ray job submit jobs/distill_qwen.py
  ray job submit --working-dir . -- python jobs/distill_qwen.py --recipe emoji_qwen_4nfe_full
  ray job submit --working-dir . -- python jobs/distill_qwen.py --set train.steps=200 --set optimizer.rate=5e-4
  python jobs/distill_qwen.py --recipe qwen_image_4nfe --dry-run --gpus 8 --gpu-memory 80
  python jobs/distill_qwen.py --resume emoji_qwen_4nfe-20260101-120000"""


def main() -> None:
    distill(DESCRIPTION, EXAMPLES, Path(__file__).resolve().parent / "recipes", recipe="emoji_qwen_4nfe")


if __name__ == "__main__":
    run_job(main)
