#!/usr/bin/env python
"""Read samples of real sizes as a training worker does.

The same as `fewstep benchmark stream`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("benchmark stream")
