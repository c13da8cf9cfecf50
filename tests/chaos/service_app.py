"""Deploys the service on a Ray cluster, and leaves it running: `python service_app.py ADDRESS PORT CONFIG`."""

from __future__ import annotations

import json
import sys

import ray
from ray import serve

from fewstep_loadtest.running import deploy

ADDRESS, PORT, CONFIG = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])

ray.init(address=ADDRESS)
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
# 1.5 of a node's two CPUs: each replica has a node of its own.
deploy(
    f"http://127.0.0.1:{PORT}", CONFIG,
    ingress_replicas=2, num_replicas=2, ray_actor_options={"num_cpus": 1.5},
)  # fmt: skip
