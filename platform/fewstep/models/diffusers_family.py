"""The base of the families of diffusers' transformers: how all of them are loaded and built."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fewstep.models.ending import TokenCatch
from fewstep.models.family import Family, Transformer
from fewstep.models.pretrained import from_pretrained, network_folder, skeleton


class DiffusersFamily(Family):
    """Base of the families of diffusers' flow transformers that are conditioned on texts."""

    network: ClassVar[str]
    """Name of the network's class in diffusers."""

    pipeline: ClassVar[str]
    """Name of its pipeline's class in diffusers."""

    time_embedding: ClassVar[str]
    """Name of the module that embeds the time."""

    time_scale: ClassVar[float] = 1000.0
    """Factor on t in [0, 1] in what that module is called with."""

    late_time: ClassVar[bool] = False
    """Whether the network gives its last norm no time embedding, but scales and shifts what the norm gives; the
    embedding is then the first result of the module that embeds the time."""

    def embedded_time(self, t: Tensor) -> Tensor:
        """What the module that embeds the time is called with for σ = t, (B,) float32."""
        return self.time_scale * t.float()

    def tokens_of(self, transformer: Transformer, *inputs: Any, **named: Any) -> Tensor:
        """Call a network that would rearrange its tokens to images itself, and return the tokens, (B, L, ·)."""
        width = self.latent_channels(transformer) * self.patch(transformer) ** 2
        catch = TokenCatch.of(transformer, self.last_layers[-1], width)
        return catch.during(lambda: transformer(*inputs, return_dict=False, **named))

    def load(self, path: str) -> Transformer:
        """The network of a diffusers folder or hub id, in float32."""
        return self._checked(from_pretrained(self.network_class, path))

    def skeleton(self, path: str) -> tuple[Transformer, Path | None]:
        """The network with its parameters on the meta device, and the folder of safetensors that has them."""
        folder = network_folder(path)
        if not any(folder.glob("*.safetensors")):
            return self.load(
                path
            ), None  # older repositories have only pickled weights, which diffusers reads
        network, folder = skeleton(self.network_class, path)
        return self._checked(network), folder

    def build(self, config: dict[str, Any]) -> Transformer:
        """A new network, from the keyword arguments of its class."""
        return self._checked(self.network_class(**config))

    def unsupported(self, transformer: Transformer) -> str | None:
        """What a network of the class takes that the family does not give it; None for nothing."""
        return None

    def _checked(self, transformer: Transformer) -> Transformer:
        """The network.

        Raises:
            ValueError: it takes inputs that the family does not give.
        """
        if (what := self.unsupported(transformer)) is not None:
            raise ValueError(f"the network takes {what}, which the family {self.name} does not give it")
        return transformer

    @property
    def network_class(self) -> type[Any]:
        """The network's class in diffusers."""
        return _of_diffusers(self.network)


def bare_pipeline(name: str, **parts: Any) -> Any:
    """A pipeline of diffusers with some of its parts, and without the others.

    Args:
        name: of the class.
        parts: by name, and settings; those that the class does not take are left out.
    """
    kind = _of_diffusers(name)
    taken = inspect.signature(kind).parameters
    required = [key for key, parameter in taken.items() if parameter.default is parameter.empty]
    return kind(**dict.fromkeys(required) | {key: part for key, part in parts.items() if key in taken})


def _of_diffusers(name: str) -> type[Any]:
    # Imported when needed: diffusers takes seconds to import.
    return getattr(import_module("diffusers"), name)
