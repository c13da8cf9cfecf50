#!/usr/bin/env python
"""Train a small autoencoder, for teachers of one's own that work on latents.

The same as `fewstep train-autoencoder`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("train-autoencoder")
