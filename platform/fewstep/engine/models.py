"""Models by name: where they come from, exact versions, a memory limit, and following a registry's aliases."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fewstep.data.storage import Storage
from fewstep.engine.in_flight import InFlight
from fewstep.engine.source import ModelSource
from fewstep.errors import UserError
from fewstep.export.pipeline import FewStepPipeline, registry_uri, student_folder

log = logging.getLogger(__name__)
FAILED_AGAIN_S = 60.0
"""A version that did not load is tried again after this long."""


class UnknownModel(Exception):
    """No model of that name is configured."""


class Stopwatch:
    """Time inside the network during one evaluation, by the module's hooks.

    On a GPU the network's time is what the device spent, measured with events.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self.network_s = 0.0
        module.register_forward_pre_hook(self._mark)
        module.register_forward_hook(self._mark)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what runs inside."""
        self._marks = []
        try:
            yield
            if self._on_gpu:
                torch.cuda.synchronize()
            pairs = zip(self._marks[::2], self._marks[1::2], strict=False)
            self.network_s = sum(
                begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin for begin, end in pairs
            )
        finally:
            self._marks = []

    def _mark(self, *hook_arguments: Any) -> None:
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())


@dataclass(eq=False)
class LoadedModel:
    """A model in memory."""

    name: str
    version: str
    """Exact: `models:/name/3`, or `sha256:…` of weights and card."""
    pipeline: FewStepPipeline
    nbytes: int = field(init=False)
    """Of the network's weights."""
    stopwatch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        network = self.pipeline.network
        self.nbytes = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        self.stopwatch = Stopwatch(self.pipeline.network.transformer, self.pipeline.device)

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, as trained."""
        return self.pipeline.size

    def latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(C, H, W) of the latent of an image of (height, width) pixels; as trained by default.

        Raises:
            UserError: the model can't take that size.
        """
        return self.pipeline.latent_shape(*(size or ()))


class ModelStore:
    """Loads models when they are asked for, keeps them within a memory limit, and follows aliases.

    A new version is loaded beside the old one and then takes its place; batches that hold the old one end
    undisturbed. Belongs to one event loop; loading happens in a thread of its own.

    Args:
        sources: what is offered, in order; the first is the default.
        tracking_uri: where `models:/…` is looked up; MLflow's own setting by default.
        device: where networks run.
        memory_bytes: limit on loaded weights; the least recently used models leave first. None: no limit.
        compile: compile networks.
        whole: also load each model's encoder and autoencoder, and warm up; False where other processes have them.
    """

    def __init__(
        self,
        sources: Mapping[str, ModelSource],
        *,
        tracking_uri: str | None = None,
        device: str = "cpu",
        memory_bytes: int | None = None,
        compile: bool = False,
        whole: bool = True,
    ) -> None:
        self.sources = dict(sources)
        self.created = int(time.time())
        self._tracking_uri, self._device = tracking_uri, device
        self._memory_bytes, self._compile, self._whole = memory_bytes, compile, whole
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading = InFlight(self._load_and_install)
        self._failed: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fewstep-models")

    @property
    def default(self) -> str:
        return next(iter(self.sources))

    @property
    def loaded(self) -> list[LoadedModel]:
        return list(self._loaded.values())

    async def get(self, name: str) -> LoadedModel:
        """The model of that name, loaded if it is not.

        Raises:
            UnknownModel: none is configured.
            UserError: it can't be loaded.
        """
        while name not in self._loaded:
            if name not in self.sources:
                raise UnknownModel(name)
            await self._loading(self.sources[name])
        self._loaded.move_to_end(name)
        return self._loaded[name]

    async def version(self, name: str) -> str | None:
        """The exact version that requests for `name` get now; None where only fetching the weights would tell.

        Raises:
            UserError: the source can't be reached.
        """
        if name in self._loaded:
            return self._loaded[name].version
        return await self._in_thread(self._current_version, self.sources[name])

    async def follow_aliases(self) -> list[LoadedModel]:
        """Look aliases of loaded models up, and replace those that have moved; returns the new ones.

        A registry out of reach, or a version that does not load, leaves the old one in service.
        """
        replaced = []
        for name in list(self._loaded):
            source = self.sources.get(name)
            if source is None or not source.follows_alias:
                continue
            try:
                version = await self._in_thread(self._current_version, source)
                if name not in self._loaded or version == self._loaded[name].version:
                    continue
                if self._failed.get(version, 0) > time.monotonic():
                    continue
                try:
                    model = await self._loading(source)
                except UserError:
                    self._failed[version] = time.monotonic() + FAILED_AGAIN_S
                    raise
            except UserError as error:
                log.warning("model %s stays at the version it has: %s", name, error)
                continue
            if self._loaded.get(name) is model:
                replaced.append(model)
        return replaced

    async def offer(self, sources: Mapping[str, ModelSource]) -> None:
        """Change what is offered; models whose source changed are dropped and loaded again when asked for."""
        for name in list(self._loaded):
            if sources.get(name) != self.sources.get(name):
                del self._loaded[name]
        self.sources = dict(sources)

    async def _load_and_install(self, source: ModelSource) -> LoadedModel:
        """Load a model; it takes its place unless another source was offered under its name meanwhile."""
        model = await self._in_thread(self._load, source)
        if self.sources.get(source.name) == source:
            self._install(model)
        return model

    def _install(self, model: LoadedModel) -> None:
        self._loaded[model.name] = model
        self._loaded.move_to_end(model.name)
        if self._memory_bytes is None:
            return
        while len(self._loaded) > 1 and sum(m.nbytes for m in self.loaded) > self._memory_bytes:
            _, evicted = self._loaded.popitem(last=False)
            log.info("model %s left memory: %d bytes", evicted.id, evicted.nbytes)

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    def _load(self, source: ModelSource) -> LoadedModel:
        with tempfile.TemporaryDirectory(prefix="fewstep-model-") as scratch:
            into = Path(scratch)
            folder, version = locate_version(source.source, into / "student", self._tracking_uri)
            teacher = source.teacher and str(
                local_folder(source.teacher, into / "teacher", self._tracking_uri)
            )
            pipeline = FewStepPipeline.from_pretrained(folder, teacher=teacher, device=self._device)
            if self._compile:
                pipeline.network.transformer.compile()
            if self._whole:
                pipeline("", seed=0, num_inference_steps=1)
        return LoadedModel(source.name, version, pipeline)

    def _current_version(self, source: ModelSource) -> str | None:
        if source.source.startswith("models:"):
            from fewstep.tracking.registry import look_up

            return str(look_up(source.source, registry_uri(self._tracking_uri)).uri)
        if "://" in source.source:
            return None
        return _version_of(local_folder(source.source, Path(), self._tracking_uri))


def locate_version(source: str, into: Path, tracking_uri: str | None = None) -> tuple[Path, str]:
    """A student's local folder and its exact version.

    Args:
        source: as in a `ModelSource`.
        into: where files of object storage are fetched to.
        tracking_uri: where `models:/…` is looked up.

    Raises:
        UserError: nothing is there.
    """
    if source.startswith("models:"):
        from fewstep.tracking.registry import resolve

        into.mkdir(parents=True)
        folder, info = resolve(source, registry_uri(tracking_uri), into)
        return folder, str(info.uri)
    folder = local_folder(source, into, tracking_uri)
    return folder, _version_of(folder)


def _version_of(folder: Path) -> str:
    """Of a local folder: a hash of its weights and card."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    return _hash_of(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=64)
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Read once for as long as sizes and times stay."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def local_folder(source: str, into: Path, tracking_uri: str | None = None) -> Path:
    """The local folder behind a bundled name, a folder, an MLflow address, or object storage (fetched to `into`).

    Raises:
        UserError: nothing is there.
    """
    if "://" not in source:
        return student_folder(source, tracking_uri)
    storage = Storage.at(source)
    if not (names := storage.list()):
        raise UserError(f"no model lies at {source}: give the folder that a distillation job exported.")
    for name in names:
        file = into / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(storage.read(name) or b"")
    return into
