#!/usr/bin/env python
"""Measure a student against its teacher's own sampler, on held-out captions.

The same as `fewstep evaluate`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("evaluate")
