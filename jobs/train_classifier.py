#!/usr/bin/env python
"""Train the classifier that judges the samples of a class-conditional student.

The same as `fewstep train-classifier`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("train-classifier")
