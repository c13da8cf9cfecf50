"""The application: HTTP in front, generators behind.

    serve run serve/config.yaml          serve deploy serve/config.yaml          make serve

The ingress checks requests against the limits and speaks HTTP. It does not load torch, and a malformed request never
reaches a generator.
"""

from typing import Any, cast

from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.handle import DeploymentHandle

from fewstep_serve.config import MAX_ONGOING_REQUESTS, ServeConfig
from fewstep_serve.generator import Generator
from fewstep_serve.http import build_api
from fewstep_serve.stages import Decoder, Encoder


@serve.deployment(
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    max_surge_percent=100,  # a new one takes over before the old one leaves
    health_check_period_s=2,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=90,
    max_constructor_retry_count=3,
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Ingress:
    """HTTP: checks requests, passes them to the generators, and answers them.

    Args:
        config: a `ServeConfig` as plain data.
        generator: handle of the generators.
    """

    def __init__(self, config: dict[str, Any], generator: DeploymentHandle) -> None:
        self._config, self._generator = ServeConfig.model_validate(config), generator

    # Serve calls this once per replica, for the application that answers its HTTP.
    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._config, self._generator)


def build(config: ServeConfig) -> Application:
    """The application from its settings: `import_path` of `serve/config.yaml`, which also says how it scales."""
    return assemble(config)


def assemble(config: ServeConfig, *, ingress_replicas: int = 1, **generator_options: Any) -> Application:
    """The application for Python: `serve.run(assemble(ServeConfig(), num_replicas=2))`.

    Args:
        config: all settings.
        ingress_replicas: of the HTTP ingress; the requests that are with one when it is killed are lost.
        generator_options: of the generators' deployment, as Ray Serve documents them.
    """
    # A type checker sees classes here; at run time the decorator has made deployments of them.
    ingress, generator, encoder, decoder = (
        cast(Deployment, one) for one in (Ingress, Generator, Encoder, Decoder)
    )
    # Deployments get plain data: Serve tells a change of settings by comparing them.
    offer, engine = config.offer.model_dump(mode="json"), config.engine.model_dump(mode="json")
    threads, apart = config.engine.threads, config.engine.stages == "apart"
    parts = config.engine.parts.model_dump(mode="json")
    stages = [encoder.bind(threads, parts), decoder.bind(threads, parts)] if apart else []
    generators = generator.options(user_config=offer, **generator_options).bind(
        engine,
        config.limits.max_relative_pixels,
        config.clients.size,
        *stages,
        image_check=config.safety.image,
    )
    return ingress.options(num_replicas=ingress_replicas).bind(
        config.model_dump(mode="json", exclude={"offer"}), generators
    )
