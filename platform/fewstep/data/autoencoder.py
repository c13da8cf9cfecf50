"""Images ↔ latents: pixels as they are, or a diffusers AutoencoderKL."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.data.schema import Shape
from fewstep.errors import UserError

PIXEL = "pixel"
"""Name of the autoencoder that takes pixels as latents."""

GREY = "grey"
"""Name of the one that takes their brightness, a single channel."""


class Autoencoder(Protocol):
    """What the data path needs of an autoencoder."""

    name: str

    def latent_shape(self, height: int, width: int) -> Shape:
        """(C, h, w) of an image of that many pixels."""

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (H, W) of a latent of (h, w) cells."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, C, h, w) float32 on the CPU."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) → (B, H, W, 3) uint8 on the CPU."""


class PixelAutoencoder:
    """Pixels as latents: x = pixel / 127.5 − 1, C = 3; or their channels' mean, C = 1, for grey images."""

    def __init__(self, name: str = PIXEL) -> None:
        self.name, self._channels = name, 1 if name == GREY else 3

    def latent_shape(self, height: int, width: int) -> Shape:
        return (self._channels, height, width)

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        return (height, width)

    def encode(self, images: Tensor) -> Tensor:
        signed = _signed(images)
        return signed.mean(1, keepdim=True) if self._channels == 1 else signed

    def decode(self, latents: Tensor) -> Tensor:
        return _pixels(latents.expand(-1, 3, -1, -1))


class KLAutoencoder:
    """A diffusers AutoencoderKL, latents in the teacher's units: (mode − shift_factor) · scaling_factor."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self._model = name, model
        self._factor = 2 ** (len(model.config.block_out_channels) - 1)
        self._shift = model.config.shift_factor or 0.0
        self._scale = model.config.scaling_factor

    def latent_shape(self, height: int, width: int) -> Shape:
        """Raises UserError where a side isn't divisible by the model's reduction."""
        if height % self._factor or width % self._factor:
            raise UserError(
                f"an image of {width}x{height} pixels doesn't fit the autoencoder {self.name!r}: "
                f"both sides must be multiples of {self._factor}."
            )
        return (self._model.config.latent_channels, height // self._factor, width // self._factor)

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        return (height * self._factor, width * self._factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        pixels = _signed(images).to(self._model.device, self._model.dtype)
        mode = self._model.encode(pixels).latent_dist.mode()
        return ((mode.float() - self._shift) * self._scale).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents.float() / self._scale + self._shift
        return _pixels(self._model.decode(scaled.to(self._model.device, self._model.dtype)).sample)


def load_autoencoder(name: str = PIXEL, *, device: torch.device | str = "cpu") -> Autoencoder:
    """Load "pixel", "grey", or an AutoencoderKL from a local folder or a hub id (`folder:vae` for a pipeline's part).

    Raises:
        UserError: nothing loads under that name.
    """
    if name in (PIXEL, GREY):
        return PixelAutoencoder(name)
    from diffusers import AutoencoderKL

    location, _, subfolder = name.partition(":")
    folder = Path(location).expanduser()
    try:
        model = AutoencoderKL.from_pretrained(
            str(folder) if folder.is_dir() else location,
            subfolder=subfolder or None,
            local_files_only=folder.is_dir(),
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the autoencoder {name!r} can't be loaded ({str(error).splitlines()[0][:200]}): give {PIXEL!r}, {GREY!r}, "
            "a folder of a diffusers AutoencoderKL (`folder:vae` for a pipeline's), or a hub id."
        ) from error
    return KLAutoencoder(name, model.eval().requires_grad_(False).to(device))


def _signed(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 in [−1, 1]."""
    return images.movedim(-1, 1).float() / 127.5 - 1


def _pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, H, W, 3) uint8, clamped; inverts `_signed` exactly."""
    return (
        ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().contiguous()
    )
