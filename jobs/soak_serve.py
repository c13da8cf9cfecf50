#!/usr/bin/env python
"""Try the service for long: malformed requests, replicas killed, an alias moved.

The same as `fewstep benchmark soak`.
"""

from fewstep.cli import run_job

if __name__ == "__main__":
    run_job("benchmark soak")
