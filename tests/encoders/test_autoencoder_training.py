"""A small autoencoder learns, goes on where it was ended, and is written as diffusers loads it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.datasets import emoji
from fewstep.encoders import load_autoencoder
from fewstep.encoders.autoencoder_training import (
    AutoencoderConfig,
    AutoencoderTraining,
    reconstruction,
    write_autoencoder,
)
from fewstep.errors import UserError

CONFIG = AutoencoderConfig(widths=(16, 32), latent_channels=4, steps=300, batch_size=8, warmup_steps=20)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Squares of one colour on another, (64, 16, 16, 3) uint8."""
    draw = np.random.default_rng(0)
    pictures = np.broadcast_to(draw.integers(0, 256, (64, 1, 1, 3)), (64, 16, 16, 3)).copy()
    for picture in pictures:
        top, left = draw.integers(0, 8, 2)
        picture[top : top + 8, left : left + 8] = draw.integers(0, 256, 3)
    return torch.from_numpy(pictures.astype(np.uint8))


def test_it_learns_to_give_pictures_back(pictures: torch.Tensor, tmp_path: Path) -> None:
    training = AutoencoderTraining(CONFIG, pictures, tmp_path)
    before = reconstruction(training.averaged(), pictures)
    losses = list(training.train(CONFIG.steps))
    assert len(losses) == training.step == CONFIG.steps
    after = reconstruction(training.averaged(), pictures)
    assert after.rms < 0.6 * before.rms
    assert after.psnr > before.psnr + 3


def test_one_that_was_ended_comes_to_the_same_weights(pictures: torch.Tensor, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 8})
    whole = AutoencoderTraining(config, pictures, tmp_path / "whole")
    list(whole.train(8))
    first = AutoencoderTraining(config, pictures, tmp_path / "ended")
    list(first.train(5))
    first.save()
    second = AutoencoderTraining(config, pictures, tmp_path / "ended")
    assert second.step == 5
    list(second.train(8))
    for name, value in whole.averaged().state_dict().items():
        assert torch.equal(second.averaged().state_dict()[name], value), name


def test_another_configuration_does_not_go_on(pictures: torch.Tensor, tmp_path: Path) -> None:
    AutoencoderTraining(CONFIG, pictures, tmp_path).save()
    with pytest.raises(UserError, match="of a training with other settings"):
        AutoencoderTraining(CONFIG.model_copy(update={"lr": 2e-3}), pictures, tmp_path)


def test_latents_have_a_mean_of_zero_and_a_deviation_of_one(pictures: torch.Tensor, tmp_path: Path) -> None:
    training = AutoencoderTraining(CONFIG, pictures, tmp_path)
    list(training.train(20))
    write_autoencoder(training.averaged(), pictures, tmp_path / "out")
    loaded = load_autoencoder(str(tmp_path / "out"))
    latents = loaded.encode(pictures)
    assert latents.shape == (64, 4, 8, 8)
    assert loaded.latent_shape(16, 16) == (4, 8, 8)
    assert float(latents.mean()) == pytest.approx(0, abs=0.02)
    assert float(latents.std()) == pytest.approx(1, abs=0.02)
    assert loaded.decode(latents).shape == pictures.shape


def test_the_bundled_autoencoder_gives_held_out_emoji_back() -> None:
    held_out = [row for row in emoji.read_bundle(64).to_pylist() if row["split"] == "held_out"][::16]
    files = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in held_out]
    pictures = torch.from_numpy(np.stack([np.asarray(file) for file in files]))
    autoencoder = load_autoencoder("emoji64")
    latents = autoencoder.encode(pictures)
    assert latents.shape == (len(pictures), 4, 16, 16)
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.3, "nothing scales them"
    error = (torch.from_numpy(np.asarray(autoencoder.decode(latents))).float() - pictures).div(255).square()
    assert -10 * error.mean(dim=(1, 2, 3)).log10().mean() > 32.5  # dB; the card says 33.4 of all of them
