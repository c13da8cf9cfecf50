"""Autoencoders between images and latents: pixels as latents, or the autoencoders of diffusers pipelines."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.assets import bundled_folder, expanded
from fewstep.config import Precision, Shape
from fewstep.errors import UserError
from fewstep.models.devices import free_bytes
from fewstep.models.precision import LIBRARIES, check_precision

log = logging.getLogger(__name__)

PIXEL = "pixel"
"""Name of the autoencoder whose latents are the pixels."""

GREY = "grey"
"""Name of the autoencoder whose latents are the pixels' brightness, a single channel."""


BUNDLED_AUTOENCODERS = {"emoji64": "emoji64_autoencoder"}
"""Names of the bundled autoencoders → their folders in the assets."""


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


def encode_each(autoencoder: Autoencoder, images: np.ndarray) -> Tensor:
    """Images (N, H, W, 3) uint8 → latents (N, C, h, w) float32 on the CPU.

    Each is encoded by itself, so that its latent does not depend on the others.
    """
    return torch.cat([autoencoder.encode(torch.tensor(image[None])) for image in images])


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
        signed = signed_pixels(images)  # (B, 3, H, W)
        return signed.mean(1, keepdim=True) if self._channels == 1 else signed

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) → images (B, H, W, 3) uint8; for C = 3 the exact inverse of `encode`."""
        return _pixels(latents.expand(-1, 3, -1, -1))


class KLAutoencoder:
    """A diffusers AutoencoderKL.

    Latents are in the units that its pipeline's network was trained with, (mode − shift_factor) · scaling_factor, where
    mode is the encoder's likeliest latent.

    Args:
        name: as `load_autoencoder` was given it.
        model: diffusers' model.
        tiling: as for `load_autoencoder`.
    """

    _tile = 512
    """Largest side of a tile in pixels; a tile takes 0.8 GiB in float32."""

    def __init__(self, name: str, model: Any, tiling: bool | None = None) -> None:
        self.name, self._model, self._config, self._tiling = name, model, model.config, tiling
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
        for part in images.split(max(1, PIXELS_ENCODED // images[0, ..., 0].numel())):
            pixels = signed_pixels(part).to(self._model.device, self._model.dtype)
            parts.append(self._normalised(self._mode(pixels).float()).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) in the network's units → images (B, H, W, 3) uint8 on the CPU.

        Images of more than `PIXELS_DECODED` are decoded one by one, and in tiles where `tiling` asks for it.
        """
        parts = []
        for part in latents.split(max(1, PIXELS_DECODED // (latents[0, 0].numel() * self._factor**2))):
            # Units are converted in float32, also where the model computes in bfloat16.
            raw = self._raw(part.to(self._model.device).float())
            parts.append(_pixels(self._whole_or_tiled(raw.to(self._model.dtype))))
        return torch.cat(parts)

    def decoding_bytes(self, height: int, width: int) -> int:
        """About the most memory that decoding a whole image of (height, width) pixels takes, beside the weights."""
        return int(SPARE * height * width * self._live_channels() * self._model.dtype.itemsize)

    def tiles(self, height: int, width: int, free: int | None) -> bool:
        """Whether an image is decoded in tiles.

        Args:
            height: in pixels.
            width: in pixels.
            free: bytes that are free on the device; None on a CPU.
        """
        if height * width <= PIXELS_DECODED:
            return False
        if self._tiling is None:
            return free is not None and free < self.decoding_bytes(height, width)
        return self._tiling

    def _whole_or_tiled(self, raw: Tensor) -> Tensor:
        """Latents (B, C, h, w) in the autoencoder's own units → pixels (B, 3, H, W) in [−1, 1]."""
        rows, columns = raw.shape[2:]
        height, width = self.image_size(rows, columns)
        if self.tiles(height, width, free_bytes(self._model.device)):
            if self._tiling is None:
                log.warning(
                    "an image of %dx%d pixels is decoded in tiles, whose contrast may differ: decoding it whole takes "
                    "%.1f GB (in bfloat16 half of what it takes in float32)",
                    width,
                    height,
                    self.decoding_bytes(height, width) / 1e9,
                )
            self._set_tiles(_tile_side(rows, columns, self._tile // self._factor))
            return self._tiled_picture(raw)
        return self._picture(raw)

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

    def _tiled_picture(self, raw: Tensor) -> Tensor:
        """As `_picture`, in tiles that overlap by a quarter."""
        # Not by `enable_tiling`, which would tile images that are encoded, too.
        return self._model.tiled_decode(raw).sample

    def _set_tiles(self, side: int) -> None:
        """Set the side of tiles, in latent cells."""
        self._model.tile_latent_min_size, self._model.tile_sample_min_size = side, side * self._factor

    def _live_channels(self) -> int:
        """Values per pixel that decoding holds at its peak, which is in the first block at full size."""
        widths = getattr(self._config, "decoder_block_out_channels", None) or self._config.block_out_channels
        return 3 * widths[:2][-1]  # what the block is given, this normalised, and activated

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

    _tile = 256
    """A tile takes 0.4 GiB in float32. Norms are of each place by itself: tiles differ by what attention sees."""

    def _reduction(self) -> int:
        return 2 ** len(self._config.temperal_downsample)

    def _channels(self) -> int:
        return self._config.z_dim

    def _mode(self, pixels: Tensor) -> Tensor:
        # (B, 3, 1, H, W): one frame
        return super()._mode(pixels.unsqueeze(2)).squeeze(2)

    def _picture(self, raw: Tensor) -> Tensor:
        # (B, C, 1, h, w) → (B, 3, 1, H, W) → (B, 3, H, W). As `decode` does for a first frame, but without keeping the
        # inputs of all layers for a second one, which would take 2.6 times the memory.
        return self._model.decoder(self._model.post_quant_conv(raw.unsqueeze(2))).squeeze(2)

    def _tiled_picture(self, raw: Tensor) -> Tensor:
        return super()._tiled_picture(raw.unsqueeze(2)).squeeze(2)

    def _set_tiles(self, side: int) -> None:
        model = self._model
        model.tile_sample_min_height = model.tile_sample_min_width = side * self._factor
        model.tile_sample_stride_height = model.tile_sample_stride_width = side * self._factor * 3 // 4

    def _live_channels(self) -> int:
        return 7 * self._config.base_dim  # measured; convolutions pad an image to three frames

    def _normalised(self, raw: Tensor) -> Tensor:
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def _raw(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> list[Tensor]:
        values = (self._config.latents_mean, self._config.latents_std)
        return [like.new_tensor(value).view(1, -1, 1, 1) for value in values]


class QwenImage21Autoencoder(QwenImageAutoencoder):
    """Qwen-Image 2.1's AutoencoderKLQwenImage21, of images with an alpha channel.

    Images are encoded as opaque ones, and decoded images are laid on white.
    """

    _tile = 384
    """A tile takes 1.8 GB in float32. It is larger than Qwen-Image's, as it has a quarter of the cells."""

    def __init__(self, name: str, model: Any, tiling: bool | None = None) -> None:
        super().__init__(name, model, tiling)
        self._multiple = 2 * self._factor  # to which its pipeline rounds sizes

    def _mode(self, pixels: Tensor) -> Tensor:
        # (B, 3, H, W) → (B, 4, H, W); 1 is opaque
        return super()._mode(F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0))

    def _picture(self, raw: Tensor) -> Tensor:
        # As Qwen-Image's. The first frame is told, as levels of the decoder make several frames of others.
        frame = self._model.post_quant_conv(raw.unsqueeze(2))
        return _on_white(self._model.decoder(frame, first_chunk=True).squeeze(2))

    def _tiled_picture(self, raw: Tensor) -> Tensor:
        return _on_white(super()._tiled_picture(raw))

    def _live_channels(self) -> int:
        return 11 * (self._config.decoder_base_dim or self._config.base_dim)  # measured


class WanAutoencoder(QwenImageAutoencoder):
    """Wan's AutoencoderKLWan, of videos whose frames stand under each other, as a film strip does.

    Of the first latent frame one picture is made, and of each further one four. So a video of T latent frames of (h, w)
    cells is a latent (C, T·h, w), and an image of (4·(T − 1) + 1)·8·h rows and 8·w columns. T is the last part of the
    autoencoder's name, `PIPELINE:vae:T`; without it, 1.
    """

    def __init__(self, name: str, model: Any, tiling: bool | None = None) -> None:
        super().__init__(name, model, tiling)
        self._frames = place_of(name)[2] or 1
        self._pictures = 1 + (self._frames - 1) * self._config.scale_factor_temporal

    def latent_shape(self, height: int, width: int) -> Shape:
        """Shape (C, T·h, w) of the latent of a video whose pictures together have (height, width) pixels.

        Raises:
            UserError: a side is not a multiple of what the model needs.
        """
        if height % (self._pictures * self._factor):
            raise UserError(
                f"a film strip of {width}x{height} pixels doesn't fit the autoencoder {self.name!r}, whose videos are "
                f"{self._pictures} pictures under each other: its height must be a multiple of "
                f"{self._pictures * self._factor}."
            )
        channels, rows, columns = super().latent_shape(height // self._pictures, width)
        return channels, self._frames * rows, columns

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """Size (H, W) in pixels of all pictures under each other, of a latent of (height, width) cells."""
        height, width = super().image_size(height, width)
        return self._pictures * height // self._frames, width

    def decoding_bytes(self, height: int, width: int) -> int:
        """About the most memory that decoding a video takes, of all its pictures together (height, width) pixels."""
        if self._frames == 1:
            return super().decoding_bytes(height, width)
        # The pictures of one latent frame are made at a time, and beside them there is what convolutions keep of the
        # frame before (measured), and the pictures that are done.
        live = 51 * self._config.base_dim + 3 * self._pictures
        return int(SPARE * height // self._pictures * width * live * self._model.dtype.itemsize)

    def _reduction(self) -> int:
        return self._config.scale_factor_spatial

    def _mode(self, pixels: Tensor) -> Tensor:
        # (B, 3, H, W) → (B, 3, pictures, H/pictures, W) → (B, C, T, h, w) → (B, C, T·h, w)
        return KLAutoencoder._mode(self, pixels.unflatten(2, (self._pictures, -1))).flatten(2, 3)

    def _picture(self, raw: Tensor) -> Tensor:
        if self._frames == 1:
            return super()._picture(raw)
        return KLAutoencoder._picture(self, raw.unflatten(2, (self._frames, -1))).flatten(2, 3)

    def _tiled_picture(self, raw: Tensor) -> Tensor:
        return KLAutoencoder._tiled_picture(self, raw.unflatten(2, (self._frames, -1))).flatten(2, 3)


class Flux2Autoencoder(KLAutoencoder):
    """FLUX.2's AutoencoderKLFlux2.

    Each of the 4·C values of a 2×2 patch is normalised by its own running statistics of a batch norm.
    """

    def __init__(self, name: str, model: Any, tiling: bool | None = None) -> None:
        super().__init__(name, model, tiling)
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


PIXELS_ENCODED = 4 * 2**20
"""Most pixels that are encoded at once."""

PIXELS_DECODED = 2**19
"""Most pixels that are decoded at once, unless a single image has more; only such images are decoded in tiles. Decoding
a megapixel whole takes 3 GiB in float32."""

SPARE = 1.5
"""How much more memory decoding is expected to take than its tensors do: convolutions need some to work in (a quarter
more on a CPU), and memory has gaps."""

KINDS = {
    "AutoencoderKL": KLAutoencoder,
    "AutoencoderKLQwenImage": QwenImageAutoencoder,
    "AutoencoderKLQwenImage21": QwenImage21Autoencoder,
    "AutoencoderKLFlux2": Flux2Autoencoder,
    "AutoencoderKLWan": WanAutoencoder,
}
"""Name of diffusers' class → ours."""


def place_of(name: str) -> tuple[str, str | None, int | None]:
    """Folder or hub id of an autoencoder by its name, the folder in it, and the number of latent frames of its videos.

    Raises:
        UserError: the number of frames is none, or this installation lacks the bundled autoencoder.
    """
    if name in BUNDLED_AUTOENCODERS:
        return str(bundled_folder(name, BUNDLED_AUTOENCODERS)), None, None
    place, _, rest = name.partition(":")
    subfolder, colon, frames = rest.partition(":")
    if colon and not (frames.isascii() and frames.isdigit() and int(frames)):
        raise UserError(
            f"the autoencoder {name!r}: {frames!r} is no number of latent frames: give one from 1 on, as in "
            f"{place}:{subfolder}:21."
        )
    return place, subfolder or None, int(frames) if colon else None


def load_autoencoder(
    name: str = PIXEL,
    *,
    device: torch.device | str = "cpu",
    precision: Precision | None = None,
    tiling: bool | None = None,
) -> Autoencoder:
    """Load an autoencoder.

    Args:
        name: "pixel", "grey", a bundled one's, or the folder or hub id of one of `KINDS`; with `:vae` behind it, that
            of a pipeline; with `:vae:21`, that of videos of 21 latent frames.
        device: where it runs.
        precision: how its weights are held and in what it computes, "float32" (also None) or "bfloat16". Latents are
            float32 in either. Pixels as latents have no weights, and ignore it.
        tiling: whether images of more than half a megapixel are decoded in overlapping tiles, which takes a quarter of
            the memory and 1.5 times as long; None for where a GPU's free memory is too short for the whole image.
            Normalisation is each tile's own, so that contrast and colours may differ between tiles.

    Raises:
        UserError: nothing loads under that name, or the precision is none of autoencoders.
    """
    if name in (PIXEL, GREY):
        return PixelAutoencoder(name)
    if precision is not None:
        check_precision(precision)
    if precision in LIBRARIES:
        raise UserError(
            f"the autoencoder {name!r} can't be held in {precision}, because convolutions aren't quantised: "
            "use float32 or bfloat16."
        )
    import diffusers

    location, subfolder, frames = place_of(name)
    folder = expanded(location)
    # A folder is never looked up on the hub, so that a missing file in it is named as such.
    where = {
        "pretrained_model_name_or_path": str(folder) if folder.is_dir() else location,
        "subfolder": subfolder,
        "local_files_only": folder.is_dir(),
    }
    try:
        # Any of diffusers' classes reads the configuration, which names the right one.
        kind = diffusers.AutoencoderKL.load_config(**where).get("_class_name")
        if kind not in KINDS:
            raise ValueError(f"it is {kind}, and known are {', '.join(KINDS)}")
        if frames is not None and not issubclass(KINDS[kind], WanAutoencoder):
            raise ValueError(f"it is {kind}, of images, and takes no number of frames")
        model = getattr(diffusers, kind).from_pretrained(**where, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the autoencoder {name!r} can't be loaded ({str(error).splitlines()[0][:200]}): give {PIXEL!r}, {GREY!r}, "
            f"{', '.join(map(repr, BUNDLED_AUTOENCODERS))}, a folder of a diffusers AutoencoderKL (`folder:vae` for a "
            "pipeline's), or a hub id."
        ) from error
    model = model.eval().requires_grad_(False).to(device)
    if precision == "bfloat16":
        # Not `model.to`: FLUX.2's statistics of latents are buffers, and units are converted in float32.
        for weight in model.parameters():
            weight.data = weight.data.to(torch.bfloat16)
    return KINDS[kind](name, model, tiling)


def _tile_side(height: int, width: int, largest: int) -> int:
    """Side of the tiles, in cells, of a latent of (height, width) cells: at most `largest`, and at least 3/4 of it.

    The last tiles of a row and a column are cut off by the edges. Of the possible sides it is the one at which the
    smaller of these two is largest, because a narrow tile has little of the image to be normalised by.
    """

    def smallest(side: int) -> int:
        return min(last_tile(height, side), last_tile(width, side))

    def last_tile(length: int, side: int) -> int:
        return length - (length - 1) // (side * 3 // 4) * (side * 3 // 4)

    # Multiples of four, whose overlap of a quarter is a whole number of cells.
    sides = range(max(4, largest * 3 // 4 // 4 * 4), largest + 1, 4)
    return max(sides, key=lambda side: (smallest(side), side))


def _on_white(pixels: Tensor) -> Tensor:
    """Pixels (B, 4, H, W) in [−1, 1], the last channel alpha → (B, 3, H, W), on a white background."""
    colours, alpha = pixels.clamp(-1, 1).split([3, 1], dim=1)
    return 1 + (colours - 1) * (alpha + 1) / 2


def signed_pixels(images: Tensor) -> Tensor:
    """Images (B, H, W, 3) uint8 → (B, 3, H, W) float32 in [−1, 1]."""
    return images.movedim(-1, 1).float() / 127.5 - 1


def _pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [−1, 1] → images (B, H, W, 3) uint8, clamped; the exact inverse of `signed_pixels`."""
    return (
        ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().contiguous()
    )
