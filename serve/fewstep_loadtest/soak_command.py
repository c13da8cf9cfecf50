"""`fewstep benchmark soak`: mixed and malformed requests for long, replicas killed, an alias moved; images checked."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

DESCRIPTION = """\
Try the service for long: mixed and malformed requests, replicas killed, an alias moved; every image is checked."""
"""For the help page."""
EXAMPLES = """\
examples
  {program} --requests 10000               # all criteria: replicas killed every 20 s, alias moved half-way
  {program} --requests 300 --kill-every 5  # a minute

Deploys two versions of the bundled student from an MLflow registry of its own, on a port of its own. Every image is
compared with one generated in this process by the version that its response names; it may differ by one 8-bit level.
Exit status 1 where a criterion is not met."""
"""For the help page; `{program}` stands for the command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--requests", type=int, default=1000, help="default: %(default)s")
    add("--kill-every", type=float, default=20, help="seconds; default: %(default)s")
    add("--clients", type=int, default=16, help="that never pause; default: %(default)s")
    add("--replicas", type=int, default=2, help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the mixture; default: %(default)s")
    add("--port", type=int, default=8766, help="of the deployment; default: %(default)s")


def run(options: argparse.Namespace) -> None:
    """Deploy, try, print a report, and exit with status 0 if all criteria are met, else 1.

    Raises:
        UserError: Serve already runs on this cluster, or the deployment did not become ready.
    """
    # Imported here, so that the help page does not wait for torch and Ray.
    from fewstep.cluster import connect_ray
    from fewstep.tracking.address import connect
    from fewstep_loadtest.running import deployment
    from fewstep_loadtest.soak import MODEL, soak
    from fewstep_loadtest.versions import register_variants

    connect_ray(show_logs=False)
    with tempfile.TemporaryDirectory(prefix="fewstep-soak-") as scratch:
        folder = Path(scratch)
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        variants = register_variants(MODEL, uri, folder, (1.0, 0.5))
        connect(uri).set_registered_model_alias(MODEL, "champion", "1")
        config = {
            "offer": {
                "models": [{"name": MODEL, "source": f"models:/{MODEL}@champion"}], "follow_alias_every_s": 1,
            },
            "limits": {"max_pixels": 1024},
            "engine": {"tracking_uri": uri},
        }  # fmt: skip
        with deployment(config, port=options.port, replicas=options.replicas) as address:
            tally = asyncio.run(
                soak(
                    address, requests=options.requests, tracking_uri=uri, kill_every_s=options.kill_every,
                    folders={f"models:/{MODEL}/{number}": path for number, path in enumerate(variants, 1)},
                    clients=options.clients, seed=options.seed,
                )
            )  # fmt: skip
    print(tally.report())
    sys.exit(0 if tally.passed else 1)
