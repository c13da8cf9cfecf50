#!/usr/bin/env python
"""Train and measure the variants of a grid, each on the same number of operations and with several seeds.

The same as `fewstep ablate`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("ablate")
