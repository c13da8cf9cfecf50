#!/usr/bin/env python
"""Write an image of every prompt of a file to a folder or bucket, on the whole Ray cluster.

The same as `fewstep generate-batch`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("generate-batch")
