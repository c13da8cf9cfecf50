#!/usr/bin/env python
"""Time one distillation step: how much of it is rollouts, data and Ray.

The same as `fewstep benchmark train-step`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("benchmark train-step")
