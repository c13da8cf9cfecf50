"""The application: HTTP in front, generators behind.

    serve run serve/config.yaml          serve deploy serve/config.yaml          make serve

The ingress checks requests against the limits and speaks HTTP; it has no torch, so a malformed request never
costs a generator anything.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve.generator import Generator
from serve.http import build_api
from serve.settings import Settings
from serve.stages import Decoder, Encoder


@serve.deployment(
    max_ongoing_requests=1000,
    max_surge_percent=100,  # a new one takes over before the old one leaves
    health_check_period_s=2,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=90,
    max_constructor_retry_count=3,
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Ingress:
    """HTTP: requests are checked here, drawn by the generators, and answered here.

    Args:
        settings: a `Settings` as plain data.
        generator: handle of the generators.
    """

    def __init__(self, settings: dict[str, Any], generator: DeploymentHandle) -> None:
        self._settings, self._generator = Settings.model_validate(settings), generator

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._settings, self._generator)


def build(settings: Settings) -> Application:
    """The application from its settings: `import_path` of `serve/config.yaml`, which also says how it scales."""
    return assemble(settings)


def assemble(settings: Settings, **generator_options: Any) -> Application:
    """The same for Python: `serve.run(assemble(Settings(), num_replicas=2))`."""
    offer, engine = settings.offer.model_dump(mode="json"), settings.engine.model_dump(mode="json")
    threads, apart = settings.engine.threads, settings.engine.stages == "apart"
    stages = [Encoder.bind(threads), Decoder.bind(threads)] if apart else []
    generator = Generator.options(user_config=offer, **generator_options).bind(engine, *stages)
    return Ingress.bind(settings.model_dump(mode="json", exclude={"offer"}), generator)
