#!/usr/bin/env python
"""Time the policies' integration against its plain port and its floor.

The same as `fewstep benchmark rollout`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("benchmark rollout")
