#!/usr/bin/env python
"""Distil a Qwen-Image-class teacher into a few-step policy student; the product's main job.

The same as `fewstep distill`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("distill", recipe="emoji64_qwen_4nfe")
