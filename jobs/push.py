#!/usr/bin/env python
"""Put a student on the Hugging Face hub, with a model card.

The same as `fewstep push`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("push")
