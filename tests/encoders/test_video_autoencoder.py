"""Wan's autoencoder: a video's pictures stand under each other, and so do its latent frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from test_tiling import TINY, WIDTHS, peak_bytes

from fewstep.encoders import load_autoencoder
from fewstep.encoders.autoencoders import KINDS, place_of
from fewstep.errors import UserError

FRAMES, PICTURES, HEIGHT, WIDTH = 3, 9, 16, 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    tiny = TINY["AutoencoderKLWan"] | {
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 1.0, 2.0],
    }
    made = diffusers.AutoencoderKLWan(**tiny).eval()
    made.save_pretrained(folder := tmp_path_factory.mktemp("pipeline") / "vae")
    return folder.parent, made


@torch.no_grad()
def test_a_film_strip_is_the_video(model: tuple[Path, Any]) -> None:
    folder, theirs = model
    ours = load_autoencoder(f"{folder}:vae:{FRAMES}")
    shape = ours.latent_shape(PICTURES * HEIGHT, WIDTH)
    assert shape == (4, FRAMES * HEIGHT // 8, WIDTH // 8)
    assert ours.image_size(*shape[1:]) == (PICTURES * HEIGHT, WIDTH)

    strips = torch.randint(0, 256, (2, PICTURES * HEIGHT, WIDTH, 3), dtype=torch.uint8)
    # (B, pictures, H, W, 3) → (B, 3, pictures, H, W)
    video = strips.unflatten(1, (PICTURES, HEIGHT)).movedim(-1, 1).float() / 127.5 - 1
    raw = theirs.encode(video).latent_dist.mode()
    mean, std = (
        torch.tensor(value).view(-1, 1, 1, 1)
        for value in (theirs.config.latents_mean, theirs.config.latents_std)
    )
    latents = ours.encode(strips)
    assert latents.shape[1:] == shape
    torch.testing.assert_close(latents.unflatten(2, (FRAMES, -1)), (raw - mean) / std)

    decoded = theirs.decode(raw).sample  # (B, 3, pictures, H, W)
    levels = ((decoded + 1) * 127.5).round().clamp(0, 255)
    found = ours.decode(latents).unflatten(1, (PICTURES, HEIGHT)).movedim(-1, 1)
    assert (levels - found).abs().max() <= 1
    assert levels.std() > 1


def test_a_single_frame_is_an_image(model: tuple[Path, Any]) -> None:
    folder, _ = model
    latents = torch.randn(1, 4, 2, 3)
    images = [load_autoencoder(f"{folder}:vae{frames}").decode(latents) for frames in ("", ":1")]
    assert images[0].shape == (1, 16, 24, 3)
    assert torch.equal(*images)


def test_tiles_of_a_video_lie_where_they_belong(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = model
    latents = torch.randn(1, 4, FRAMES * 16, 20)
    whole, tiled = (load_autoencoder(f"{folder}:vae:{FRAMES}", tiling=tiling) for tiling in (False, True))
    monkeypatch.setattr("fewstep.encoders.autoencoders.PIXELS_DECODED", 100)
    monkeypatch.setattr(type(tiled), "_tile", 96)
    pixels = [autoencoder.decode(latents).float() for autoencoder in (whole, tiled)]
    assert pixels[0].shape == pixels[1].shape == (1, PICTURES * 128, 160, 3)
    assert not torch.equal(*pixels)
    # Norms and attention see a tile at a time.
    assert (pixels[0] - pixels[1]).abs().mean() < 0.2 * pixels[0].std()


def test_what_decoding_a_video_takes_is_foreseen() -> None:
    for frames, size in ((3, (240, 416)), (21, (480, 832))):
        with torch.device("meta"):
            network = diffusers.AutoencoderKLWan(**WIDTHS["AutoencoderKLWan"]).eval().requires_grad_(False)
        video = KINDS["AutoencoderKLWan"](f"wan:vae:{frames}", network)
        height, width = (4 * (frames - 1) + 1) * size[0], size[1]
        whole = peak_bytes(video, height, width, tiled=False)
        assert 1.4 * whole < video.decoding_bytes(height, width) < 1.6 * whole


def test_what_is_no_video_is_refused(model: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = model
    video = load_autoencoder(f"{folder}:vae:{FRAMES}")
    with pytest.raises(UserError, match="9 pictures under each other: its height must be a multiple of 72"):
        video.latent_shape(PICTURES * HEIGHT + 16, WIDTH)
    for frames in ("0", "many", "", "-2", "1.5"):
        with pytest.raises(UserError, match="no number of latent frames"):
            load_autoencoder(f"{folder}:vae:{frames}")
    diffusers.AutoencoderKL(**TINY["AutoencoderKL"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes no number of frames"):
        load_autoencoder(f"{tmp_path}::2")


def test_a_name_tells_place_and_frames() -> None:
    assert place_of("owner/name@main:vae:21") == ("owner/name@main", "vae", 21)
    assert place_of("folder:vae") == ("folder", "vae", None)
    assert place_of("folder") == ("folder", None, None)
