#!/usr/bin/env python
"""Check the planned step of several processes against a real one.

The same as `fewstep benchmark scaling`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("benchmark scaling")
