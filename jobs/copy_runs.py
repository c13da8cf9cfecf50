#!/usr/bin/env python
"""Copy the runs and models of an sqlite file to PostgreSQL, and their files to a bucket.

The same as `fewstep copy-runs`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("copy-runs")
