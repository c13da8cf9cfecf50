#!/usr/bin/env python
"""Generate with students of full-size teachers on one GPU, and take one step of their distillation.

The same as `fewstep benchmark full-size`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("benchmark full-size")
