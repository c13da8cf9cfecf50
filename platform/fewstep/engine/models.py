"""Models by name: loaded when asked for, within a memory limit, kept at the versions that a registry's aliases name."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from fewstep.config import PartsConfig, Precision
from fewstep.engine.in_flight import InFlight
from fewstep.engine.source import ModelSource, Track
from fewstep.errors import UserError
from fewstep.models.devices import free_dropped_networks
from fewstep.models.precision import check_precision, held_bytes, pipeline_arguments
from fewstep.student import FewStepPipeline, current_version, resolve_student
from fewstep.student.resolve import fetch_folder

log = logging.getLogger(__name__)
FAILED_AGAIN_S = 60.0
"""A version that did not load is tried again after this long."""


Compiled = bool | Literal["blocks", "graphs"]
"""How networks are compiled: not at all; as a whole; block by block, in a fraction of the time; or as a whole, with
CUDA graphs of the shapes that repeat."""


COMPILED = "_torchdynamo_orig_callable"
"""Attribute that torch.compile gives to the functions it returns."""


ModelKey = tuple[str, Track]
"""What a store keeps a model by: its name, and which of the versions of that name it is."""


class UnknownModel(Exception):
    """No model of that name is configured, or no canary of it."""


class Stopwatch:
    """Measures the time inside the network during one evaluation, by hooks of its module.

    On a GPU it is the time that the device spent, measured with events.

    Attributes:
        network_s: what was measured last, in seconds.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self.network_s = 0.0
        # Hooks, because rollouts and guidance between the calls are no time of the network's.
        module.register_forward_pre_hook(self._mark)
        module.register_forward_hook(self._mark)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the network's calls inside a `with` block; `network_s` has their time afterwards."""
        self._marks = []
        try:
            yield
            if self._on_gpu:
                torch.cuda.synchronize()  # events have no time before the device has passed them
            # Marks alternate: before a call, after it.
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


class Abandoned(Exception):
    """An evaluation was ended, because nobody wanted it any more."""


class Interruption:
    """Ends an evaluation at the network's next block, by hooks of its blocks.

    Blocks are the elements of its `ModuleList`s, but not what is inside of other blocks, which may be compiled. A
    network without any, or a compiled one, is evaluated to its end.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._over: Callable[[], bool] = lambda: False
        # A hook inside a compiled network would break it into pieces.
        if hasattr(module.forward, COMPILED):
            return
        for block in _outermost_blocks(module):
            block.register_forward_pre_hook(self._check)

    @contextmanager
    def unless(self, over: Callable[[], bool]) -> Iterator[None]:
        """Evaluate the network inside a `with` block, which is left by `Abandoned` once `over` says so."""
        self._over = over
        try:
            yield
        finally:
            self._over = lambda: False

    def _check(self, *hook_arguments: Any) -> None:
        if self._over():
            raise Abandoned


def _outermost_blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _outermost_blocks(child)


@dataclass(eq=False)
class LoadedModel:
    """A model in memory."""

    name: str
    """What requests call it."""
    version: str
    """Exact: `models:/name/3`, or `sha256:…` of weights and card."""
    pipeline: FewStepPipeline
    """The student with all that it needs to generate."""
    nbytes: int = field(init=False)
    """Of the network's weights, and of its style LoRAs."""
    stopwatch: Stopwatch = field(init=False)
    """Of its network."""
    interruption: Interruption = field(init=False)
    """Of its network."""

    def __post_init__(self) -> None:
        network = self.pipeline.network
        self.nbytes = held_bytes(network) + styles_bytes(self.pipeline)
        transformer = _transformer(self.pipeline)
        self.stopwatch = Stopwatch(transformer, self.pipeline.device)
        self.interruption = Interruption(transformer)

    @property
    def id(self) -> str:
        """Name and exact version, for logs."""
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


def styles_bytes(pipeline: FewStepPipeline) -> int:
    """Bytes of a pipeline's style LoRAs."""
    return sum(style.nbytes for style in pipeline.styles.values())


def compile_network(pipeline: FewStepPipeline, how: Compiled) -> None:
    """Compile a pipeline's network, in place; it happens at the first call with each shape."""
    transformer = _transformer(pipeline)
    # Forwards alone: hooks, which measure an evaluation and end it, change from call to call, and stay outside.
    if how == "blocks":
        for block in pipeline.network.family.blocks(transformer):
            block.forward = torch.compile(block.forward)
    elif how:
        mode = "reduce-overhead" if how == "graphs" else None
        transformer.forward = torch.compile(transformer.forward, mode=mode)


def _transformer(pipeline: FewStepPipeline) -> torch.nn.Module:
    return cast(torch.nn.Module, pipeline.network.transformer)


class ModelStore:
    """Loads models when they are asked for, keeps them within a memory limit, and follows aliases.

    A new version is loaded beside the old one and then takes its place; batches that hold the old one end
    undisturbed. Belongs to one event loop; loading happens in a thread of its own.

    Args:
        sources: what is offered, in order; the first is the default.
        tracking_uri: where `models:/…` is looked up; MLflow's own setting by default.
        device: where networks run.
        memory_bytes: limit on loaded weights; the least recently used models leave first. None: no limit.
        compile: how networks are compiled, as in `compile_network`.
        precision: in which networks are held.
        parts: how encoders and autoencoders are loaded.
        whole: also load each model's encoder and autoencoder, and warm up; False where other processes have them.
    """

    def __init__(
        self,
        sources: Mapping[str, ModelSource],
        *,
        tracking_uri: str | None = None,
        device: str = "cpu",
        memory_bytes: int | None = None,
        compile: Compiled = False,
        precision: Precision = "float32",
        parts: PartsConfig | None = None,
        whole: bool = True,
    ) -> None:
        self.sources = dict(sources)
        self.created = int(time.time())
        self._tracking_uri, self._device = tracking_uri, device
        self._memory_bytes, self._compile, self._whole = memory_bytes, compile, whole
        self._precision, self._parts = check_precision(precision), parts or PartsConfig()
        self._tracks = _tracks(self.sources)
        self._loaded: OrderedDict[ModelKey, LoadedModel] = OrderedDict()
        self.stuck: dict[ModelKey, str] = {}
        """Key of a model that could not follow its alias when it was last looked up → why."""
        self._loading = InFlight(self._load_and_install)
        self._failed: dict[str, float] = {}
        # One thread: two models that load at once would need the memory of both before one could leave.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fewstep-models")

    @property
    def default(self) -> str:
        """Name of the model that requests without one get."""
        return next(iter(self.sources))

    @property
    def loaded(self) -> list[LoadedModel]:
        """Models in memory, the least recently used first."""
        return list(self._loaded.values())

    def in_memory(self, name: str, track: Track = "stable") -> LoadedModel | None:
        """The model of that name; None where it is not loaded."""
        return self._loaded.get((name, track))

    async def get(self, name: str, track: Track = "stable") -> LoadedModel:
        """The model of that name, loaded if it is not.

        Args:
            name: of the model.
            track: which of its versions.

        Raises:
            UnknownModel: none is configured.
            UserError: it can't be loaded.
        """
        key = name, track
        # A loop, because another source may have been offered under the name while the old one loaded.
        while key not in self._loaded:
            if key not in self._tracks:
                raise UnknownModel(name)
            await self._loading((key, self._tracks[key]))
        self._loaded.move_to_end(key)
        return self._loaded[key]

    async def version(self, name: str, track: Track = "stable") -> str | None:
        """The exact version that requests for `name` get now; None where only fetching the weights would tell.

        Args:
            name: of the model.
            track: which of its versions.

        Raises:
            UserError: the source can't be reached.
        """
        if (model := self.in_memory(name, track)) is not None:
            return model.version
        # Not in the thread that loads: who asks what is on offer need not wait until another model is in memory.
        source = self._tracks[name, track].source
        return await asyncio.to_thread(current_version, source, self._tracking_uri)

    async def follow_aliases(self) -> list[LoadedModel]:
        """Look aliases of loaded models up, and replace those that have moved; returns the new ones.

        A registry out of reach, or a version that does not load, leaves the old one in service.
        """
        replaced = []
        for key in list(self._loaded):  # a copy: requests may load models between two look-ups
            source = self._tracks.get(key)
            if source is None or not source.follows_alias:
                continue
            try:
                model = await self._follow(key, source)
            except UserError as error:
                log.warning("model %s (%s) stays at the version it has: %s", *key, error)
                self.stuck[key] = str(error)
                continue
            self.stuck.pop(key, None)
            if model is not None and self._loaded.get(key) is model:
                replaced.append(model)
        if replaced:
            await self._in_thread(free_dropped_networks)
        return replaced

    async def offer(self, sources: Mapping[str, ModelSource]) -> None:
        """Change what is offered, all at once: until what is needed of it has been loaded, nothing changes.

        That is the default, and what is in memory and gets another source, with their canaries; these take their places
        at once. Models that are no longer offered are dropped, others are loaded when asked for.

        Raises:
            UserError: one of them can't be loaded; what was offered remains.
        """
        tracks = _tracks(sources)
        used = {next(iter(sources)), *(name for name, _ in self._loaded)}
        needed = {
            key: source
            for key, source in tracks.items()
            if key[0] in used and (key not in self._loaded or source != self._tracks[key])
        }
        # A canary that takes the place of the first version is in memory already.
        there = {self._tracks[key]: model for key, model in self._loaded.items()}
        models = {
            key: there.get(source) or await self._in_thread(self._load, source)
            for key, source in needed.items()
        }
        for key in list(self._loaded):
            if tracks.get(key) != self._tracks.get(key):
                del self._loaded[key]
        self.sources, self._tracks = dict(sources), tracks
        for key, model in reversed(models.items()):  # the default last: it leaves a full memory last
            self._install(key, model)
        del models, there
        await self._in_thread(free_dropped_networks)

    async def _follow(self, key: ModelKey, source: ModelSource) -> LoadedModel | None:
        """Load the version that a source's alias names now; None where it is in memory, or failed a moment ago."""
        version = await self._in_thread(current_version, source.source, self._tracking_uri)
        # While that was looked up, the model may have left memory: then the next request loads it anyway.
        if key not in self._loaded or version == self._loaded[key].version:
            return None
        if self._failed.get(version, 0) > time.monotonic():
            return None
        try:
            return await self._loading((key, source))
        except UserError:
            self._failed[version] = time.monotonic() + FAILED_AGAIN_S
            raise

    async def _load_and_install(self, wanted: tuple[ModelKey, ModelSource]) -> LoadedModel:
        """Load a model; it takes its place unless another source was offered under its name meanwhile."""
        key, source = wanted
        model = await self._in_thread(self._load, source)
        if self._tracks.get(key) == source:
            self._install(key, model)
        return model

    def _install(self, key: ModelKey, model: LoadedModel) -> None:
        self._loaded[key] = model
        self._loaded.move_to_end(key)
        if self._memory_bytes is None:
            return
        while len(self._loaded) > 1 and sum(m.nbytes for m in self.loaded) > self._memory_bytes:
            _, evicted = self._loaded.popitem(last=False)  # batches that run hold it until they end
            log.info("model %s left memory: %d bytes", evicted.id, evicted.nbytes)

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    def _load(self, source: ModelSource) -> LoadedModel:
        # Models that batches held when they were replaced have their memory still.
        free_dropped_networks()
        # What is fetched is only needed until it is in memory, so it is deleted then.
        with tempfile.TemporaryDirectory(prefix="fewstep-model-") as scratch:
            into = Path(scratch)
            student = resolve_student(source.source, tracking_uri=self._tracking_uri, into=into / "student")
            teacher = source.teacher
            if teacher is not None and "://" in teacher:  # folders and hub ids the pipeline finds by itself
                teacher = str(fetch_folder(teacher, into / "teacher", "teacher", {}))
            # Refused where it does not fit beside what is in memory, such as the model that it is to replace.
            pipeline = FewStepPipeline.from_pretrained(
                student.folder,
                teacher=teacher,
                device=self._device,
                parts=self._parts,
                **pipeline_arguments(self._precision),
            )
            self._load_loras(pipeline, source)
            compile_network(pipeline, self._compile)
            if self._whole:
                # Loads encoder and autoencoder, and warms up: in the mode of the engine's evaluations, as what was
                # compiled in another one would be compiled once more.
                with torch.inference_mode():
                    blank = [np.zeros((*pipeline.size, 3), np.uint8)] * pipeline.card.references
                    pipeline("", image=blank, seed=0, num_inference_steps=1)
        return LoadedModel(source.name, student.version, pipeline)

    def _load_loras(self, pipeline: FewStepPipeline, source: ModelSource) -> None:
        """Load a model's style LoRAs.

        Raises:
            UserError: one of them can't be used, they take too much memory, or the network is to be compiled.
        """
        if source.loras and self._compile:
            raise UserError(
                f"the model {source.name!r} has loras, which a compiled network can't take: set engine.compile to "
                "false, or leave them out."
            )
        for lora in source.loras:
            try:
                pipeline.load_lora_weights(lora.source, lora.name, tracking_uri=self._tracking_uri)
            except UserError as error:
                raise UserError(f"the style {lora.name!r} of the model {source.name!r}: {error}") from None
            if styles_bytes(pipeline) > source.max_lora_memory_mb * 2**20:
                raise UserError(
                    f"the style {lora.name!r} of the model {source.name!r}: with it they take "
                    f"{styles_bytes(pipeline) / 2**20:.1f} MB, more than max_lora_memory_mb: raise it, or offer fewer."
                )


def _tracks(sources: Mapping[str, ModelSource]) -> dict[ModelKey, ModelSource]:
    """All versions that are offered, in order."""
    return {(name, track): one for name, source in sources.items() for track, one in source.tracks.items()}
