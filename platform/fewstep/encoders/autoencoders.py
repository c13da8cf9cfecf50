"""Autoencoders between images and latents: pixels as latents, or the autoencoders of diffusers pipelines."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.assets import expanded
from fewstep.config import Shape
from fewstep.errors import UserError

PIXEL = "pixel"
"""Name of the autoencoder whose latents are the pixels."""

GREY = "grey"
"""Name of the autoencoder whose latents are the pixels' brightness, a single channel."""


class Autoencoder(Protocol):
    """Interface of autoencoders."""

    name: str

    def latent_shape(self, height: int, width: int) -> Shape:
        """Shape (C, h, w) of the latent of an image of (height, width) pixels."""

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (H, W) in pixels of the image of a latent of (height, width) cells."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 → latents (B, C, h, w) float32 on the CPU."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → images (B, H, W, 3) uint8 on the CPU."""


class PixelAutoencoder:
    """Pixels as latents, x = pixel / 127.5 − 1: three channels or, for grey images, their mean as a single one."""

    def __init__(self, name: str = PIXEL) -> None:
        self.name, self._channels = name, 1 if name == GREY else 3

    def latent_shape(self, height: int, width: int) -> Shape:
        """(C, height, width): each pixel is a latent cell."""
        return (self._channels, height, width)

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width): each latent cell is a pixel."""
        return (height, width)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 → latents (B, C, H, W) float32 in [−1, 1]."""
        signed = _signed(images)  # (B, 3, H, W)
        return signed.mean(1, keepdim=True) if self._channels == 1 else signed

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) → images (B, H, W, 3) uint8; for C = 3 the exact inverse of `encode`."""
        return _pixels(latents.expand(-1, 3, -1, -1))


class KLAutoencoder:
    """A diffusers AutoencoderKL.

    Latents are in the units that its pipeline's network was trained with, (mode − shift_factor) · scaling_factor, where
    mode is the encoder's likeliest latent.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name, self._model, self._config = name, model, model.config
        self._factor = self._reduction()
        self._multiple = self._factor
        """Number that both sides, in pixels, must be multiples of."""

    def latent_shape(self, height: int, width: int) -> Shape:
        """Shape (C, h, w) of the latent of an image of (height, width) pixels.

        Raises:
            UserError: a side is not a multiple of what the model needs.
        """
        if height % self._multiple or width % self._multiple:
            raise UserError(
                f"an image of {width}x{height} pixels doesn't fit the autoencoder {self.name!r}: "
                f"both sides must be multiples of {self._multiple}."
            )
        return (self._channels(), height // self._factor, width // self._factor)

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (H, W) in pixels of the image of a latent of (height, width) cells."""
        return (height * self._factor, width * self._factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 → latents (B, C, h, w) float32 on the CPU, in the network's units."""
        parts = []
        for part in images.split(_together(images.shape[1] * images.shape[2])):
            pixels = _signed(part).to(self._model.device, self._model.dtype)
            parts.append(self._normalised(self._mode(pixels).float()).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) in the network's units → images (B, H, W, 3) uint8 on the CPU."""
        parts = []
        for part in latents.split(_together(latents[0, 0].numel() * self._factor**2)):
            # Units are converted in float32, also where the model computes in bfloat16.
            raw = self._raw(part.to(self._model.device).float())
            parts.append(_pixels(self._picture(raw.to(self._model.dtype))))
        return torch.cat(parts)

    def _reduction(self) -> int:
        """Pixels per latent cell, along each side."""
        # Every level but the last halves the sides.
        return 2 ** (len(self._config.block_out_channels) - 1)

    def _channels(self) -> int:
        return self._config.latent_channels

    def _mode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → the likeliest latents (B, C, h, w), in the autoencoder's own units."""
        return self._model.encode(pixels).latent_dist.mode()

    def _picture(self, raw: Tensor) -> Tensor:
        """Latents (B, C, h, w) in the autoencoder's own units → pixels (B, 3, H, W) in [−1, 1]."""
        return self._model.decode(raw).sample

    def _normalised(self, raw: Tensor) -> Tensor:
        """Latents in the autoencoder's own units → in the network's."""
        return (raw - (self._config.shift_factor or 0.0)) * self._config.scaling_factor

    def _raw(self, latents: Tensor) -> Tensor:
        """Latents in the network's units → in the autoencoder's own; the inverse of `_normalised`."""
        return latents / self._config.scaling_factor + (self._config.shift_factor or 0.0)


class QwenImageAutoencoder(KLAutoencoder):
    """Qwen-Image's AutoencoderKLQwenImage, which is made for video; an image is one frame.

    Each latent channel is normalised by its own mean and standard deviation.
    """

    def _reduction(self) -> int:
        return 2 ** len(self._config.temperal_downsample)

    def _channels(self) -> int:
        return self._config.z_dim

    def _mode(self, pixels: Tensor) -> Tensor:
        # (B, 3, 1, H, W): one frame
        return super()._mode(pixels.unsqueeze(2)).squeeze(2)

    def _picture(self, raw: Tensor) -> Tensor:
        # (B, C, 1, h, w) → (B, 3, 1, H, W) → (B, 3, H, W)
        return super()._picture(raw.unsqueeze(2)).squeeze(2)

    def _normalised(self, raw: Tensor) -> Tensor:
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def _raw(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> list[Tensor]:
        values = (self._config.latents_mean, self._config.latents_std)
        return [like.new_tensor(value).view(1, -1, 1, 1) for value in values]


class Flux2Autoencoder(KLAutoencoder):
    """FLUX.2's AutoencoderKLFlux2.

    Each of the 4·C values of a 2×2 patch is normalised by its own running statistics of a batch norm.
    """

    def __init__(self, name: str, model: Any) -> None:
        super().__init__(name, model)
        self._multiple = 2 * self._factor  # latents have to divide into patches of 2×2

    def _normalised(self, raw: Tensor) -> Tensor:
        mean, std = self._statistics()
        # A patch's values as channels, and back: latents keep the autoencoder's C channels (see `models/flux2.py`).
        return F.pixel_shuffle((F.pixel_unshuffle(raw, 2) - mean) / std, 2)

    def _raw(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return F.pixel_shuffle(F.pixel_unshuffle(latents, 2) * std + mean, 2)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm = self._model.bn
        std = (norm.running_var + self._config.batch_norm_eps).sqrt()
        return norm.running_mean.view(1, -1, 1, 1).float(), std.view(1, -1, 1, 1).float()


PIXELS_TOGETHER = 4 * 2**20
"""Most pixels that go through a model at once: each megapixel takes about a GiB in its widest layers."""

KINDS = {
    "AutoencoderKL": KLAutoencoder,
    "AutoencoderKLQwenImage": QwenImageAutoencoder,
    "AutoencoderKLFlux2": Flux2Autoencoder,
}
"""Name of diffusers' class → ours."""


def load_autoencoder(name: str = PIXEL, *, device: torch.device | str = "cpu") -> Autoencoder:
    """Load an autoencoder.

    Args:
        name: "pixel", "grey", or the folder or hub id of one of `KINDS`; with `:vae` behind it, that of a pipeline.
        device: where it runs.

    Raises:
        UserError: nothing loads under that name.
    """
    if name in (PIXEL, GREY):
        return PixelAutoencoder(name)
    import diffusers

    location, _, subfolder = name.partition(":")
    folder = expanded(location)
    # A folder is never looked up on the hub, so that a missing file in it is named as such.
    where = {
        "pretrained_model_name_or_path": str(folder) if folder.is_dir() else location,
        "subfolder": subfolder or None,
        "local_files_only": folder.is_dir(),
    }
    try:
        # Any of diffusers' classes reads the configuration, which names the right one.
        kind = diffusers.AutoencoderKL.load_config(**where).get("_class_name")
        if kind not in KINDS:
            raise ValueError(f"it is {kind}, and known are {', '.join(KINDS)}")
        model = getattr(diffusers, kind).from_pretrained(**where, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the autoencoder {name!r} can't be loaded ({str(error).splitlines()[0][:200]}): give {PIXEL!r}, {GREY!r}, "
            "a folder of a diffusers AutoencoderKL (`folder:vae` for a pipeline's), or a hub id."
        ) from error
    return KINDS[kind](name, model.eval().requires_grad_(False).to(device))


def _together(pixels: int) -> int:
    """Number of images of `pixels` pixels each that go through a model at once."""
    return max(1, PIXELS_TOGETHER // pixels)


def _signed(images: Tensor) -> Tensor:
    """Images (B, H, W, 3) uint8 → (B, 3, H, W) float32 in [−1, 1]."""
    return images.movedim(-1, 1).float() / 127.5 - 1


def _pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [−1, 1] → images (B, H, W, 3) uint8, clamped; the exact inverse of `_signed`."""
    return (
        ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().contiguous()
    )
