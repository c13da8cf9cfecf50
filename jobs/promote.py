#!/usr/bin/env python
"""Give the alias that is served to another version of a registered model.

The same as `fewstep promote`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("promote")
