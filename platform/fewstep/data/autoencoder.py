"""Images ↔ latents: pixels as they are, or the autoencoders of diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

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
        self.name, self._model, self._config = name, model, model.config
        self._factor = self._reduction()
        self._multiple = self._factor
        """What sides in pixels must be multiples of."""

    def latent_shape(self, height: int, width: int) -> Shape:
        """Raises UserError where a side isn't divisible by the model's reduction."""
        if height % self._multiple or width % self._multiple:
            raise UserError(
                f"an image of {width}x{height} pixels doesn't fit the autoencoder {self.name!r}: "
                f"both sides must be multiples of {self._multiple}."
            )
        return (self._channels(), height // self._factor, width // self._factor)

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        return (height * self._factor, width * self._factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        parts = []
        for part in images.split(_together(images.shape[1] * images.shape[2])):
            pixels = _signed(part).to(self._model.device, self._model.dtype)
            parts.append(self._normalised(self._mode(pixels).float()).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        parts = []
        for part in latents.split(_together(latents[0, 0].numel() * self._factor**2)):
            raw = self._raw(part.to(self._model.device).float())
            parts.append(_pixels(self._picture(raw.to(self._model.dtype))))
        return torch.cat(parts)

    def _reduction(self) -> int:
        return 2 ** (len(self._config.block_out_channels) - 1)

    def _channels(self) -> int:
        return self._config.latent_channels

    def _mode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → the likeliest latents (B, C, h, w), in the model's own units."""
        return self._model.encode(pixels).latent_dist.mode()

    def _picture(self, raw: Tensor) -> Tensor:
        """The way back."""
        return self._model.decode(raw).sample

    def _normalised(self, raw: Tensor) -> Tensor:
        """The model's units → the teacher's."""
        return (raw - (self._config.shift_factor or 0.0)) * self._config.scaling_factor

    def _raw(self, latents: Tensor) -> Tensor:
        """The way back."""
        return latents / self._config.scaling_factor + (self._config.shift_factor or 0.0)


class QwenImageAutoencoder(KLAutoencoder):
    """Qwen-Image's AutoencoderKLQwenImage, made for video: of one frame, each channel by its mean and deviation."""

    def _reduction(self) -> int:
        return 2 ** len(self._config.temperal_downsample)

    def _channels(self) -> int:
        return self._config.z_dim

    def _mode(self, pixels: Tensor) -> Tensor:
        return super()._mode(pixels.unsqueeze(2)).squeeze(2)

    def _picture(self, raw: Tensor) -> Tensor:
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
    """FLUX.2's AutoencoderKLFlux2: each of a patch's 4·C values by the running statistics of a batch norm."""

    def __init__(self, name: str, model: Any) -> None:
        super().__init__(name, model)
        self._multiple = 2 * self._factor

    def _normalised(self, raw: Tensor) -> Tensor:
        mean, std = self._statistics()
        return F.pixel_shuffle((F.pixel_unshuffle(raw, 2) - mean) / std, 2)

    def _raw(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return F.pixel_shuffle(F.pixel_unshuffle(latents, 2) * std + mean, 2)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm = self._model.bn
        std = (norm.running_var + self._config.batch_norm_eps).sqrt()
        return norm.running_mean.view(1, -1, 1, 1).float(), std.view(1, -1, 1, 1).float()


PIXELS_TOGETHER = 4 * 2**20
"""Pixels that go through a model at once: a megapixel takes a GiB in its widest layers."""

KINDS = {
    "AutoencoderKL": KLAutoencoder,
    "AutoencoderKLQwenImage": QwenImageAutoencoder,
    "AutoencoderKLFlux2": Flux2Autoencoder,
}
"""By diffusers' class."""


def load_autoencoder(name: str = PIXEL, *, device: torch.device | str = "cpu") -> Autoencoder:
    """Load "pixel", "grey", or one of `KINDS` from a local folder or a hub id (`folder:vae` for a pipeline's part).

    Raises:
        UserError: nothing loads under that name.
    """
    if name in (PIXEL, GREY):
        return PixelAutoencoder(name)
    import diffusers

    location, _, subfolder = name.partition(":")
    folder = Path(location).expanduser()
    where = {
        "pretrained_model_name_or_path": str(folder) if folder.is_dir() else location,
        "subfolder": subfolder or None,
        "local_files_only": folder.is_dir(),
    }
    try:
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
    """How many images of so many pixels go through a model at once."""
    return max(1, PIXELS_TOGETHER // pixels)


def _signed(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 in [−1, 1]."""
    return images.movedim(-1, 1).float() / 127.5 - 1


def _pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, H, W, 3) uint8, clamped; inverts `_signed` exactly."""
    return (
        ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().contiguous()
    )
