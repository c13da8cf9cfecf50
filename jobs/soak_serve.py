#!/usr/bin/env python
"""Try the service for long: mixed and malformed requests, replicas killed, an alias moved; every image is checked."""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from fewstep.cli import connect_ray, run_job

EXAMPLES = """\
examples
  jobs/soak_serve.py --requests 10000                    # the promise: replicas killed every 20 s, alias moved half-way
  jobs/soak_serve.py --requests 300 --kill-every 5       # a minute

Deploys two versions of the bundled student from an MLflow registry of its own, on a port of its own. Every image is
compared with one drawn in this process by the version that its response names; it may differ by one 8-bit level.
Exit status 1 where a promise does not hold."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--kill-every", type=float, default=20, help="seconds; default: %(default)s")
    parser.add_argument("--clients", type=int, default=16, help="that never pause; default: %(default)s")
    parser.add_argument("--replicas", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the mixture; default: %(default)s")
    parser.add_argument("--port", type=int, default=8766, help="of the deployment; default: %(default)s")
    options = parser.parse_args()

    from fewstep.tracking.address import connect
    from serve.running import deployment
    from serve.soak import MODEL, soak
    from serve.versions import register_variants

    connect_ray(show_logs=False)
    with tempfile.TemporaryDirectory(prefix="fewstep-soak-") as scratch:
        folder = Path(scratch)
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        variants = register_variants(MODEL, uri, folder, (1.0, 0.5))
        connect(uri).set_registered_model_alias(MODEL, "champion", "1")
        settings = {
            "offer": {
                "models": [{"name": MODEL, "source": f"models:/{MODEL}@champion"}], "follow_alias_every_s": 1,
            },
            "limits": {"max_pixels": 1024},
            "engine": {"tracking_uri": uri},
        }  # fmt: skip
        with deployment(settings, port=options.port, replicas=options.replicas) as address:
            tally = asyncio.run(
                soak(
                    address, requests=options.requests, tracking_uri=uri, kill_every_s=options.kill_every,
                    folders={f"models:/{MODEL}/{number}": path for number, path in enumerate(variants, 1)},
                    clients=options.clients, seed=options.seed,
                )
            )  # fmt: skip
    print(tally.report())
    sys.exit(0 if tally.passed else 1)


if __name__ == "__main__":
    run_job(main)
