"""The service over real HTTP with the real engine, in one process: without Ray between ingress and generator."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from fewstep.engine.engine import Engine
from fewstep.engine.models import LoadedModel
from fewstep.engine.source import ModelSource
from fewstep.student import FewStepPipeline
from fewstep_serve.config import EngineConfig, ServeConfig
from fewstep_serve.generator import Generator
from fewstep_serve.http import build_api
from fewstep_serve.metrics import EngineMetrics
from fewstep_serve.schema import OfferStatus


class Handle:
    """What the ingress knows of a generator, which lives in the same process."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self.generate = SimpleNamespace(
            remote=lambda *asked: asyncio.ensure_future(generator.generate(*asked))
        )
        self.generate_stream = SimpleNamespace(
            remote=lambda *asked: Stream(generator.generate_stream(*asked))
        )
        self.models = SimpleNamespace(remote=generator.models)
        self.work = SimpleNamespace(remote=generator.work)

    def options(self, **options: Any) -> Handle:
        return self

    def broadcast(self, method: str) -> SimpleNamespace:
        async def results_async(return_exceptions: bool) -> list[Any]:
            return [await getattr(self._generator, method)()]

        return SimpleNamespace(results_async=results_async)


class Stream:
    """Messages of a generator, as Ray hands them on."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages

    async def __anext__(self) -> Any:
        return await anext(self._messages)

    def cancel(self) -> None:
        pass


def generator_of(models: dict[str, FewStepPipeline]) -> Any:
    """A generator that offers these models; the first is the default."""
    loaded = {name: LoadedModel(name, "1", pipeline) for name, pipeline in models.items()}

    async def get(name: str, track: str) -> LoadedModel:
        return loaded[name]

    async def version(name: str, track: str) -> str:
        return loaded[name].version

    generator = object.__new__(Generator.func_or_class)
    generator._config, generator._metrics = EngineConfig(), EngineMetrics()
    sources = {name: ModelSource(name=name, source="nowhere") for name in models}
    generator._store = SimpleNamespace(
        get=get, default=next(iter(models)), sources=sources, in_memory=loaded.get, version=version, stuck={},
        created=1,
    )  # fmt: skip
    generator._max_relative_pixels, generator._other_size = 4.0, "refuse"
    generator._engine, generator._image_check = Engine(), None
    generator._status = OfferStatus(state="current", message=None)
    return generator


@contextmanager
def serving(models: dict[str, FewStepPipeline], prefix: str = "", **settings: Any) -> Iterator[str]:
    """The address of the API in front of these models.

    Args:
        models: that are offered; the first is the default.
        prefix: what its paths begin with, as Ray Serve's `route_prefix`.
        settings: of the application.
    """
    config = ServeConfig.model_validate({"access": {"open_to_all": True}, **settings})
    generator = generator_of(models)
    generator._other_size = config.clients.size
    api = build_api(config, Handle(generator))  # type: ignore[arg-type]

    async def prefixed(scope: Scope, receive: Receive, send: Send) -> None:
        # The path begins with it, as Ray Serve leaves it there.
        await api({**scope, "root_path": prefix}, receive, send)

    server = uvicorn.Server(uvicorn.Config(prefixed, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{prefix}/v1"
    server.should_exit = True
    thread.join()
