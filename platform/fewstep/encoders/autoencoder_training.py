"""Training a small AutoencoderKL on pictures: the latents of teachers that are trained here.

It is for sets of a few thousand small pictures. Larger ones should use an autoencoder that exists, such as FLUX's: a
preparation's `autoencoder` takes any of diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config import Config
from fewstep.encoders.autoencoders import signed_pixels
from fewstep.errors import UserError
from fewstep.files import shared_weights
from fewstep.models.precision import cpu_has_bfloat16

PROGRESS = "training.pt"
"""Name of the file, beside the autoencoder's, from which training goes on."""
FIRST_LOG_VARIANCE = -6.0
"""Of the latents' noise, before it is learned."""
BATCH_ENCODED = 64
"""Pictures that are encoded at a time where nothing is trained."""


class AutoencoderConfig(Config):
    """Network and training of an autoencoder."""

    widths: tuple[int, ...] = Field((32, 64, 96), min_length=2)
    """Channels of each level, multiples of 4; every level but the last halves the sides."""
    latent_channels: int = Field(4, ge=1)
    """Channels of the latents."""
    steps: int = Field(20_000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(16, ge=1)
    """Pictures of a step."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW, after `warmup_steps` and before it falls linearly to zero from `decay_from` on."""
    warmup_steps: int = Field(200, ge=0)
    """Steps over which the rate rises."""
    decay_from: float = Field(0.6, ge=0, lt=1)
    """Share of the steps after which the rate falls."""
    edge_weight: float = Field(1.0, ge=0)
    """Weight of the mean absolute error of neighbouring pixels' differences, which keeps edges sharp."""
    kl_weight: float = Field(1e-3, ge=0)
    """Weight of the divergence of a latent value's distribution from a standard normal one, in nats per value."""
    seed: int = 0
    """Of weights, order, augmentation and noise."""


@dataclass(frozen=True)
class Reconstruction:
    """How well pictures come back from their latents."""

    rms: float
    """Root mean square error of all pixels, of values from 0 to 1."""
    psnr: float
    """Peak signal-to-noise ratio in dB, the mean over pictures."""


class AutoencoderTraining:
    """An autoencoder that learns, and what its training goes on from.

    Args:
        config: network and training.
        pictures: (N, H, W, 3) uint8, the sides divisible by the network's reduction.
        folder: where `save` writes, and where a training that was ended goes on from.

    Raises:
        UserError: the folder has the training of another configuration.
    """

    def __init__(self, config: AutoencoderConfig, pictures: Tensor, folder: Path) -> None:
        from diffusers import AutoencoderKL

        self.config, self.step, self._pictures, self._folder = config, 0, pictures, folder
        torch.manual_seed(config.seed)
        levels = len(config.widths)
        model: Any = AutoencoderKL(
            block_out_channels=config.widths,
            latent_channels=config.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=4,  # of many channels: a mean of few would take the colour of a flat picture away
            sample_size=pictures.shape[1],
            mid_block_add_attention=False,  # what is far away says little about a pixel
        )
        # With diffusers' own weights the noise of the latents is ten times what pictures make of them, and is learned
        # to be ignored along with them.
        model.quant_conv.bias.data[config.latent_channels :] = FIRST_LOG_VARIANCE
        self.model = model.to(memory_format=torch.channels_last)
        self._averaged = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.01
        )
        self._draw = torch.Generator().manual_seed(config.seed)
        self._resume()

    def train(self, until: int) -> Iterator[dict[str, float]]:
        """Take optimizer steps up to that number; yields the losses of each."""
        for step in range(self.step, min(until, self.config.steps)):
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr(step)
            pixels = self._batch()
            # Much faster where the CPU has it, and much slower where it is emulated. The loss is taken in float32.
            with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
                posterior = self.model.encode(pixels).latent_dist
                latents = posterior.sample(generator=self._draw)
                decoded = self.model.decode(latents).sample
            error = decoded.float() - pixels
            # Absolute errors for flat colours, squared ones so that no part is given up.
            losses = {
                "absolute": error.abs().mean(),
                "squared": error.square().mean(),
                "edges": error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean(),
                "kl": posterior.kl().mean() / latents[0].numel(),
            }
            loss = losses["absolute"] + losses["squared"]
            loss = loss + self.config.edge_weight * losses["edges"] + self.config.kl_weight * losses["kl"]
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self.step = step + 1
            self._average()
            yield {name: value.item() for name, value in losses.items()}

    def averaged(self) -> Any:
        """A copy of the model with the average of its weights (EMA), which is better than the last ones."""
        from diffusers import AutoencoderKL

        model = AutoencoderKL.from_config(self.model.config)
        model.load_state_dict(self._averaged)
        return model.eval().requires_grad_(False)

    def save(self) -> None:
        """Write what training goes on from."""
        self._folder.mkdir(parents=True, exist_ok=True)
        state = {
            "config": self.config.model_dump_json(),
            "step": self.step,
            "model": self.model.state_dict(),
            "averaged": self._averaged,
            "optimizer": self._optimizer.state_dict(),
            "draw": self._draw.get_state(),
        }
        torch.save(state, self._folder / f"{PROGRESS}.part")
        (self._folder / f"{PROGRESS}.part").replace(self._folder / PROGRESS)

    def _resume(self) -> None:
        file = self._folder / PROGRESS
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        if state["config"] != self.config.model_dump_json():
            raise UserError(
                f"{file} is of a training with other settings: give another folder, or delete it."
            )
        self.step, self._averaged = state["step"], state["averaged"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._draw.set_state(state["draw"])

    def _batch(self) -> Tensor:
        """A batch (B, 3, H, W) in [−1, 1]: half of them mirrored, some with their colours exchanged."""
        config, draw = self.config, self._draw
        rows = torch.randint(len(self._pictures), (config.batch_size,), generator=draw)
        pixels = signed_pixels(self._pictures[rows])
        if torch.rand((), generator=draw) < 0.5:
            pixels = pixels.flip(3)
        # More colours than the set has, for those that a student invents.
        if torch.rand((), generator=draw) < 0.3:
            pixels = pixels[:, torch.randperm(3, generator=draw)]
        return pixels.contiguous(memory_format=torch.channels_last)

    def _lr(self, step: int) -> float:
        config = self.config
        rising = min(1.0, (step + 1) / max(1, config.warmup_steps))
        falling = (config.steps - step) / (config.steps * (1 - config.decay_from))
        return config.lr * rising * min(1.0, falling)

    @torch.no_grad()
    def _average(self) -> None:
        weight = 1 - min(0.999, self.step / (self.step + 9))
        for name, value in self.model.state_dict().items():
            self._averaged[name].lerp_(value, weight)


@torch.no_grad()
def reconstruction(model: Any, pictures: Tensor) -> Reconstruction:
    """How well an AutoencoderKL gives back pictures (N, H, W, 3) uint8, from their likeliest latents."""
    squared = []
    for part in pictures.split(BATCH_ENCODED):
        pixels = signed_pixels(part)
        decoded = model.decode(model.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        squared.append(((decoded - pixels) / 2).square().mean((1, 2, 3)))
    errors = torch.cat(squared)
    return Reconstruction(math.sqrt(errors.mean()), float(-10 * errors.log10().mean()))


@torch.no_grad()
def write_autoencoder(model: Any, pictures: Tensor, folder: Path) -> None:
    """Write an AutoencoderKL as a diffusers folder, with its latents' units set by pictures.

    The units are such that latents have a mean of 0 and a standard deviation of 1, as flow matching wants them.

    Args:
        model: diffusers' model.
        pictures: (N, H, W, 3) uint8.
        folder: to write to.
    """
    latents = torch.cat(
        [model.encode(signed_pixels(part)).latent_dist.mode() for part in pictures.split(BATCH_ENCODED)]
    )
    mean, std = float(latents.mean()), float(latents.std())
    model.register_to_config(shift_factor=mean, scaling_factor=1 / std)
    with shared_weights(folder):
        model.to(torch.float16).save_pretrained(folder)
    model.float()
