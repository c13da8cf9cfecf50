#!/usr/bin/env python
"""Write images from prompts with a distilled student.

The same as `fewstep generate`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("generate")
