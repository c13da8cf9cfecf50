"""The base of the families of diffusers' transformers: how all of them are loaded and built."""

from __future__ import annotations

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

    time_embedding: ClassVar[str]
    """Name of the module that embeds the time."""

    time_scale: ClassVar[float] = 1000.0
    """Factor on t in [0, 1] in what that module is called with."""

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
        return from_pretrained(self._class(), path)

    def skeleton(self, path: str) -> tuple[Transformer, Path | None]:
        """The network with its parameters on the meta device, and the folder of safetensors that has them."""
        folder = network_folder(path)
        # Older repositories have only pickled weights, which diffusers reads.
        return skeleton(self._class(), path) if any(folder.glob("*.safetensors")) else (self.load(path), None)

    def build(self, config: dict[str, Any]) -> Transformer:
        """A new network, from the keyword arguments of its class."""
        return self._class()(**config)

    def _class(self) -> type[Any]:
        # Imported when needed: diffusers takes seconds to import.
        return getattr(import_module("diffusers"), self.network)
