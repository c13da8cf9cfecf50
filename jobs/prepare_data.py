#!/usr/bin/env python
"""Prepare a dataset: captions (and images) become Parquet shards that training jobs read.

The same as `fewstep prepare-data`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("prepare-data")
