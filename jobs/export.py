#!/usr/bin/env python
"""Write a distilled student as a folder that diffusers loads as a pipeline.

The same as `fewstep export`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("export")
