#!/usr/bin/env python
"""Measure the service: open-loop load at several rates and batch limits.

The same as `fewstep benchmark serve`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("benchmark serve")
