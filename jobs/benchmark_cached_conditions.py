#!/usr/bin/env python
"""Count and time what texts that are computed once save a distillation step.

The same as `fewstep benchmark cached-conditions`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("benchmark cached-conditions")
