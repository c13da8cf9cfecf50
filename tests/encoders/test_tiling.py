"""Decoding of large images: one by one, whole or in tiles, and the memory that each takes."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.encoders import autoencoders, load_autoencoder
from fewstep.encoders.autoencoders import KINDS, KLAutoencoder
from fewstep.errors import UserError

FOUR = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
WIDTHS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": FOUR | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16},
    "AutoencoderKLFlux2": {},
    "AutoencoderKLQwenImage": {},
    "AutoencoderKLQwenImage21": {},
    "AutoencoderKLWan": {},
}  # fmt: skip
"""Full-sized autoencoders: those of FLUX.1, FLUX.2, Qwen-Image, Qwen-Image 2.1 and Wan 2.1."""

SMALL = {"layers_per_block": 1, "norm_num_groups": 4, "mid_block_add_attention": False}
TINY: dict[str, dict[str, Any]] = {
    "AutoencoderKL": FOUR | SMALL | {"block_out_channels": (4, 4, 4, 4), "latent_channels": 4},
    "AutoencoderKLFlux2": FOUR | SMALL | {"block_out_channels": (4, 4, 4, 4), "latent_channels": 4},
    "AutoencoderKLQwenImage": {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4}
    | {"latents_std": [1.0] * 4},
    "AutoencoderKLQwenImage21": {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, "num_res_blocks": 1}
    | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    "AutoencoderKLWan": {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "latents_mean": [0.0] * 4}
    | {"latents_std": [1.0] * 4},
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their peak; on meta tensors, without any arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self._add(tensor.untyped_storage(), key)
        return result

    def _add(self, storage: Any, key: int) -> None:
        count = storage.nbytes()
        self.known.add(key)
        self.now += count
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, count)

    def _drop(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count


def full_size(kind: str) -> KLAutoencoder:
    with torch.device("meta"):
        return KINDS[kind](kind, getattr(diffusers, kind)(**WIDTHS[kind]).eval().requires_grad_(False))


@torch.no_grad()
def peak_bytes(autoencoder: KLAutoencoder, height: int, width: int, *, tiled: bool) -> int:
    latents = torch.empty(1, *autoencoder.latent_shape(height, width), device="meta")
    autoencoder._tiling = tiled
    with LiveBytes() as live:
        autoencoder._whole_or_tiled(latents)
    return live.peak


@pytest.mark.parametrize(("height", "width"), [pytest.param(1024, 1024, marks=pytest.mark.slow), (768, 1344)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_decoding_takes_is_foreseen_and_tiles_take_a_third_of_it_at_most(kind, height, width):
    autoencoder = full_size(kind)
    whole = peak_bytes(autoencoder, height, width, tiled=False)
    foreseen = autoencoder.decoding_bytes(height, width)
    assert 1.4 * whole < foreseen < 1.6 * whole
    assert peak_bytes(autoencoder, height, width, tiled=True) < whole / 3
    autoencoder._model.bfloat16()
    assert autoencoder.decoding_bytes(height, width) == foreseen / 2


def test_an_image_is_tiled_where_it_is_large_and_memory_short():
    autoencoder = full_size("AutoencoderKL")
    takes = autoencoder.decoding_bytes(1024, 1024)
    for tiling, free, tiles in (
        (None, takes, False), (None, takes - 1, True), (None, None, False),
        (True, takes, True), (True, None, True), (False, 0, False),
    ):  # fmt: skip
        autoencoder._tiling = tiling
        assert autoencoder.tiles(1024, 1024, free) is tiles
        assert not autoencoder.tiles(512, 1024, 0), "half a megapixel is decoded whole"


def tiny(kind: str, folder: Any, **options: Any) -> KLAutoencoder:
    """A tiny autoencoder without what mixes a whole image (norms by groups, attention), loaded from a folder."""
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**TINY[kind])
    if kind == "AutoencoderKLFlux2":
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    loaded = load_autoencoder(str(folder), **options)
    for module in loaded._model.decoder.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm) or type(child).__name__.endswith("AttentionBlock"):
                setattr(module, name, nn.Identity())
    return loaded


@pytest.mark.parametrize(("height", "width"), [(784, 832), pytest.param(512, 1168, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_lie_where_they_belong_and_show_no_seams(kind, height, width, tmp_path):
    autoencoder = tiny(kind, tmp_path)
    height, width = (-(-side // autoencoder._multiple) * autoencoder._multiple for side in (height, width))
    shape = autoencoder.latent_shape(height, width)
    latents = 3 * F.interpolate(torch.randn(1, shape[0], 16, 16), size=shape[1:], mode="bicubic")
    whole = autoencoder.decode(latents).float()
    autoencoder._tiling = True
    tiled = autoencoder.decode(latents).float()
    assert tiled.shape == whole.shape == (1, height, width, 3)
    # What is left are the edges of tiles, where convolutions see nothing beyond.
    difference, rows = (tiled - whole).abs(), whole.diff(dim=1).abs()
    assert difference.mean() < (0.04 if autoencoder._factor == 16 else 0.03) * whole.std()
    assert difference.amax((0, 3)).mean() < rows.amax((0, 3)).mean() / 4


def test_no_tile_is_narrower_than_the_overlap():
    for height in range(64, 260):
        for width in (64, 96, 128, 168, 200, height):
            side = autoencoders._tile_side(height, width, 64)
            assert 48 <= side <= 64
            assert side % 4 == 0
            for length in (height, width):
                assert length - (length - 1) // (side * 3 // 4) * (side * 3 // 4) >= 8
    assert all(autoencoders._tile_side(n, n, 64) for n in (4, 5, 63))
    # Sizes that models were trained at: none of their tiles is narrower than the overlap of 16 cells.
    for height, width in ((128, 128), (96, 168), (104, 152), (112, 144), (80, 192), (166, 166), (116, 208)):
        stride = autoencoders._tile_side(height, width, 64) * 3 // 4
        assert min((length - 1) % stride + 1 for length in (height, width)) >= 16


def test_large_images_are_decoded_one_by_one_and_encoded_untiled(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoders, "PIXELS_DECODED", 2 * 16 * 24)
    monkeypatch.setattr(KLAutoencoder, "_tile", 64)
    autoencoder = tiny("AutoencoderKL", tmp_path, tiling=True)
    model, parts = autoencoder._model, []

    def count(name: str) -> None:
        known = getattr(model, name)

        def counted(latents: Tensor) -> Any:
            parts.append((name, len(latents)))
            return known(latents)

        monkeypatch.setattr(model, name, counted)

    count("decode")
    count("tiled_decode")
    autoencoder.decode(torch.randn(5, *autoencoder.latent_shape(16, 24)))
    autoencoder.decode(torch.randn(2, *autoencoder.latent_shape(96, 96)))
    assert parts == [("decode", 2), ("decode", 2), ("decode", 1), ("tiled_decode", 1), ("tiled_decode", 1)]
    images = torch.randint(0, 256, (1, 96, 96, 3), dtype=torch.uint8)
    whole = load_autoencoder(str(tmp_path))
    assert torch.equal(autoencoder.encode(images), whole.encode(images))


def test_short_memory_is_told(tmp_path, monkeypatch, caplog):
    autoencoder = tiny("AutoencoderKL", tmp_path)
    latents = torch.randn(1, *autoencoder.latent_shape(1024, 768))
    monkeypatch.setattr(autoencoders, "free_bytes", lambda device: 1000)
    with caplog.at_level(logging.WARNING, "fewstep.encoders.autoencoders"):
        tiled = autoencoder.decode(latents)
    assert "768x1024 pixels is decoded in tiles" in caplog.text
    autoencoder._tiling = True
    assert torch.equal(autoencoder.decode(latents), tiled)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_changes_pixels_little_and_latents_stay_float32(kind, tmp_path):
    exact = tiny(kind, tmp_path)
    half = tiny(kind, tmp_path, precision="bfloat16")
    assert {weight.dtype for weight in half._model.parameters()} == {torch.bfloat16}
    images = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    latents = half.encode(images)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, exact.encode(images), atol=0.05, rtol=0.05)
    difference = (half.decode(latents).float() - exact.decode(latents).float()).abs()
    assert 0 < difference.mean() < 2
    if kind == "AutoencoderKLFlux2":
        assert all(map(torch.equal, half._statistics(), exact._statistics())), "units are not rounded"
    # None is float32, to the bit.
    assert torch.equal(tiny(kind, tmp_path, precision="float32").decode(latents), exact.decode(latents))


def test_integers_are_refused_where_there_are_weights(tmp_path):
    tiny("AutoencoderKL", tmp_path)
    for precision in ("int8", "int4"):
        with pytest.raises(UserError, match=f"can't be held in {precision}, because convolutions"):
            load_autoencoder(str(tmp_path), precision=precision)
    assert load_autoencoder("pixel", precision="int8", tiling=True).latent_shape(8, 8) == (3, 8, 8)
