"""The interface of a *family*: what fewstep has to know of one kind of teacher network.

Each family is a class derived from `Family`, in a file of its own. A family for your own network is short: see
`module_family.py`, whose defaults suit any network that maps (x, t, conditioning) to a velocity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.ending import Ending, last_modules

Transformer = Any
"""An nn.Module of a family's class. The type is Any because torch types every attribute of a module as a tensor or a
module, and families use others, such as `config`."""


class Family(ABC):
    """How to load, call, adapt and split one kind of transformer.

    Methods that every family must have are abstract, so that an instance of an incomplete family can't be made.
    """

    name: Any  # a str; a field of some families, a constant of others
    """Name in recipes and cards."""

    last_layers: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out")
    """Names of the transformer's last modules, whose place a student's head takes: norm and projection, or one layer
    that is both."""

    joint_layers: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of layers that are called with the tokens of all samples in a row, not per sample."""

    frames: Any = 1  # an int; a field of families of videos
    """Latent frames of a video, which stand under each other in a latent; 1 for images."""

    takes_references: ClassVar[bool] = False
    """Whether `denoise` gives the network the reference images of a conditioning, for editing."""

    passes_sigmas: ClassVar[bool] = True
    """Whether its own pipeline gives its scheduler σ from 1 to 1/n in n equal steps to shift, or leaves σ to it."""

    def schedule_mu(self, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
        """log of the shift of its own pipeline's schedule, where the scheduler's configuration makes it dynamic.

        Linear in the number of image tokens, as in FLUX.1's pipeline.

        Args:
            scheduler: configuration of the scheduler.
            tokens: image tokens.
            steps: number of Euler steps.
        """
        few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        return low + (tokens - few) / (many - few) * (high - low)

    @abstractmethod
    def load(self, path: str) -> Transformer:
        """The pretrained network of a diffusers folder or hub id, in float32."""

    def skeleton(self, path: str) -> tuple[Transformer, Path | None]:
        """The network with its parameters on the meta device, and the folder of safetensors that has them by name.

        Each rank of a sharded network then reads only its own rows of them. Families whose weights only `load` can
        read return the loaded network, and None.
        """
        return self.load(path), None

    @abstractmethod
    def build(self, config: dict[str, Any]) -> Transformer:
        """A new network with random weights, from the keyword arguments of its class."""

    def published(self, transformer: Transformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights`, a state dict, under the names that `load` reads from a folder; by default the network's own."""
        return dict(weights)

    @abstractmethod
    def latent_channels(self, transformer: Transformer) -> int:
        """Latent channels C."""

    @abstractmethod
    def condition_width(self, transformer: Transformer) -> int:
        """Width D of the token states (B, L, D) that the network is conditioned on; 0 if it takes no text."""

    def pooled_width(self, transformer: Transformer) -> int | None:
        """Width of the whole caption's vector that the network takes beside token states; None if it takes none."""
        return None

    def takes_guidance(self, transformer: Transformer) -> bool:
        """Whether the network is guidance-distilled, that is, takes the guidance scale as an input."""
        return False

    def classes(self, transformer: Transformer) -> int | None:
        """Number of classes of a class-conditional network; None if it is not conditioned on classes."""
        return None

    def is_conditional(self, transformer: Transformer) -> bool:
        """Whether the network takes a condition, text or class, that guidance can leave out."""
        return self.condition_width(transformer) > 0 or self.classes(transformer) is not None

    @abstractmethod
    def patch(self, transformer: Transformer) -> int:
        """Side p of a patch; each frame's latent height and width must be multiples of it."""

    def multiples(self, transformer: Transformer) -> tuple[int, int]:
        """Numbers of which latent height and width must be multiples."""
        patch = self.patch(transformer)
        return self.frames * patch, patch

    def of_frames(self, frames: int) -> Family:
        """The family of videos of so many latent frames.

        Raises:
            UserError: it is a family of images.
        """
        raise UserError(
            f"teacher.family: {self.name!r} makes images and takes no number of frames: leave it out."
        )

    def tokens(self, transformer: Transformer, height: int, width: int) -> int:
        """Number of image tokens of a latent of this height and width."""
        patch = self.patch(transformer)
        return (height // patch) * (width // patch)

    def largest_side(self, transformer: Transformer) -> int | None:
        """Most latent height and width of a frame that the network has positions for; None if it has no such limit."""
        return None

    def prepare(self, transformer: Transformer, conditioning: Any) -> Any:
        """What of a `Conditioning` depends on neither latents nor time, computed once for many calls of `denoise`.

        By default nothing, and the conditioning is returned as it is; so is one that is prepared already. It holds as
        long as the network's weights, adapters included, stay as they are, and has a gradient if autograd is enabled.
        """
        return conditioning

    @abstractmethod
    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: Any,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network.

        Args:
            transformer: of this family.
            x: latents, (B, C, H, W).
            t: σ of the latents, in [0, 1], (B,).
            conditioning: a `Conditioning` of B samples, of the kind that the network takes, or what `prepare` made of
                it.
            guidance_scale: input of a guidance-distilled network, one number or one per sample (B,); None for all
                others.

        Returns:
            Packed output tokens, (B, L, ·), as the last of `last_layers` gives them.
        """

    @property
    def output_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the names of the last layers' parameters."""
        return tuple(f"{name}." for name in self.last_layers)

    def ending(self, transformer: Transformer) -> Ending:
        """What a head is grown from: the last norm and projection, and how the projection's output is to be read."""
        norm, projection = last_modules(transformer, self.last_layers)
        return Ending(norm, cast(nn.Linear, projection))

    def velocity(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """The velocity (B, C, H, W), float32, that the teacher's packed tokens (B, L, C·p²) are."""
        # `unpack` gives n latents per sample, (B, n, C, H, W); a velocity is one.
        return self.unpack(tokens.float(), channels, height, width)[:, 0]

    @abstractmethod
    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Packed tokens (B, L, n·c·p²) → n latents per sample, (B, n, c, H, W)."""

    @abstractmethod
    def lora_targets(self, transformer: Transformer) -> list[str]:
        """The layers that the paper's LoRA adapts (METHOD.md section 5), as ends of module names."""

    def shared_matrices(self, transformer: Transformer) -> list[str]:
        """Those of `lora_targets` in which an FFN shares one matrix with the attention; none in most families."""
        return []

    @abstractmethod
    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """The modules that FSDP shards one by one, and gathers only while they run."""

    def trunk(self, transformer: Transformer) -> list[nn.Module]:
        """The modules with nearly all weights, whose linear layers may be held and computed in a lower precision.

        What is outside stays in float32: input layers, embeddings of time and position, and what follows the blocks.
        """
        return self.blocks(transformer)

    @abstractmethod
    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """Names of parameters that never reach the output, and so never get a gradient."""
