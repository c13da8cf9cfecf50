#!/usr/bin/env python
"""Train a flow-matching teacher with the same machinery that distils it.

The same as `fewstep train-teacher`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("train-teacher")
