"""A *family*: what fewstep must know of one kind of teacher network.

One file per family, deriving from `Family` for the answers that most of them share. A teacher of one's own is a short
one: see `own.py`, whose defaults fit any network that maps (x, t, conditioning) to a velocity.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Family(Protocol):
    """How to load, call, adapt and split one kind of transformer."""

    name: str

    def load(self, path: str) -> nn.Module:
        """The pretrained network from a diffusers folder or hub id, in float32."""
        ...

    def skeleton(self, path: str) -> tuple[nn.Module, Path | None]:
        """The network with its parameters on the meta device, and the folder of safetensors that has them by name.

        So that every rank reads its own shards alone. Where only `load` can read them: what it gives, and None.
        """
        return self.load(path), None

    def build(self, config: dict[str, Any]) -> nn.Module:
        """A new network with random weights, from the keyword arguments of its class."""
        ...

    def published(self, transformer: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict under the names that `load` reads from a folder; most networks' own."""
        return dict(weights)

    def latent_channels(self, transformer: nn.Module) -> int:
        """Latent channels C."""
        ...

    def condition_width(self, transformer: nn.Module) -> int:
        """Width D of the token states (B, L, D) that it is conditioned on; 0 if it takes no condition."""
        ...

    def pooled_width(self, transformer: nn.Module) -> int | None:
        """Width of the vector of a whole caption that it takes beside the token states; None where it takes none."""
        return None

    def takes_guidance(self, transformer: nn.Module) -> bool:
        """Whether the network is guidance-distilled: told the guidance scale beside the time."""
        return False

    def classes(self, transformer: nn.Module) -> int | None:
        """Number of classes of a class-conditional network; None where it is conditioned on text."""
        return None

    def patch(self, transformer: nn.Module) -> int:
        """Side p of a patch; latent height and width must be multiples of it."""
        ...

    def denoise(self, transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        """Call the network: (B, C, H, W), (B,) shifted time → packed output tokens (B, L, ·)."""
        ...

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Packed tokens (B, L, n·c·p²) → n latents per sample, (B, n, c, H, W)."""
        ...

    def lora_targets(self, transformer: nn.Module) -> list[str]:
        """The paper's layers to adapt, as module-name suffixes."""
        ...

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The modules that FSDP shards one by one."""
        ...

    def unused_parameters(self, transformer: nn.Module) -> list[str]:
        """Names of parameters that never reach the output, and so never get a gradient."""
        ...
