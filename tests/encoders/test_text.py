from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderTiny,
    Flux2Pipeline,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from fewstep.encoders import ConditionEncoder, encoder_widths, load_encoder, text
from fewstep.encoders import autoencoders as autoencoder
from fewstep.encoders.autoencoders import load_autoencoder
from fewstep.encoders.base import as_stored, storage_scale
from fewstep.errors import UserError

CAPTIONS = [
    "red heart, noto style",
    "a dog",
    "",
    "a dog",
    "grinning face with big eyes, fluent style",
    "a cat",
]


@pytest.fixture(scope="module")
def encoder() -> ConditionEncoder:
    return load_encoder()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_a_caption_s_states_do_not_depend_on_what_it_is_encoded_with(encoder, threads):
    together = encoder.stored_states(CAPTIONS * 20)
    for index, caption in enumerate(CAPTIONS):
        alone = encoder.stored_states([caption])[0]
        assert all(torch.equal(alone, other) for other in together[index :: len(CAPTIONS)])


def test_captions_encoded_to_draw_are_those_of_shards_before_rounding(encoder, threads):
    together = encoder.each(CAPTIONS * 3)
    for index, caption in enumerate(CAPTIONS):
        [alone] = encoder.each([caption])
        for other in together[index :: len(CAPTIONS)]:
            torch.testing.assert_close(other.states, alone.states, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            alone.states[0], encoder.stored_states([caption])[0], atol=2e-5, rtol=2**-11
        )
    joined = encoder.conditioning(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        [alone] = encoder.each([caption])
        torch.testing.assert_close(joined.states[row][joined.mask[row]], alone.states[0], atol=2e-5, rtol=0)


def test_the_null_condition_is_the_one_that_shards_would_hold(encoder):
    null = encoder.null()
    assert torch.equal(null.states, null.states.half().float())
    torch.testing.assert_close(null.states[0], encoder.stored_states([""])[0], atol=1e-3, rtol=2**-10)


def test_states_are_the_ones_that_float16_shards_hold(encoder):
    for states in encoder.stored_states(CAPTIONS):
        assert states.dtype == torch.float32
        assert states.shape[1] == encoder.dim == encoder_widths("minilm")[0] == 384
        assert torch.equal(states, states.half().float())


@pytest.mark.parametrize("factor", [1.0, 3e4, 1e6, 1e9])
def test_activations_beyond_float16_are_neither_cut_nor_infinite(encoder, monkeypatch, factor):
    states = encoder._states
    monkeypatch.setattr(encoder, "_states", lambda ids: [state * factor for state in states(ids)])
    exact = [*encoder.states(CAPTIONS), encoder.conditioning([""]).states[0]]
    for stored, whole in zip((*encoder.stored_states(CAPTIONS), *encoder.null().states), exact, strict=True):
        # float16's precision, relative to the value or, below its smallest, to the largest
        torch.testing.assert_close(stored, whole, rtol=2**-10, atol=1e-6 * factor)
        assert torch.equal(stored, as_stored(stored)), "rounding again changes nothing"


@pytest.mark.parametrize(
    "largest", [65504.0, 65505.0, 65519.0, 65520.0, 131_000.0, 131_008.0, 131_040.0, 3e38]
)
def test_rounding_again_changes_nothing_also_at_the_edges_of_the_range(largest):
    states = torch.cat([torch.tensor([largest]), largest * torch.logspace(-12, -0.01, 500)])[:, None]
    stored = as_stored(states)
    assert torch.equal(as_stored(stored), stored)
    assert torch.equal((stored / storage_scale(stored)).half().float() * storage_scale(stored), stored)
    torch.testing.assert_close(stored, states, rtol=2**-11, atol=1e-9 * largest)


def test_what_is_no_number_stays_so():
    for wrong in (float("nan"), float("inf")):
        assert not as_stored(torch.tensor([[1.0, wrong]])).isfinite().all()
    assert as_stored(torch.empty(0, 4)).shape == (0, 4)


def test_the_empty_caption_is_two_tokens(encoder):
    assert encoder.stored_states([""])[0].shape == (2, 384)
    assert encoder.stored_states([]) == []
    assert encoder.token_counts(["", "a dog"]) == [2, 4]


def test_a_caption_too_long_is_refused_with_its_length(encoder):
    encoder.check(["word " * 62])
    for refuse in (encoder.check, encoder.encode, encoder.each):
        with pytest.raises(
            UserError, match=r"the caption 'word .*…' is too long \(102 tokens, at most 64\): shorten"
        ):
            refuse(["fine", "word " * 100])


@pytest.mark.parametrize("cut", ["owl \ud83d", "\udd89", "owl \udced\udca0\udcbd"])
def test_half_a_surrogate_pair_is_refused_in_a_sentence_wherever_captions_are_taken(encoder, cut):
    for call in (encoder.check, encoder.encode, encoder.conditioning, encoder.states, encoder.token_counts):
        with pytest.raises(UserError, match="holds half a surrogate pair") as caught:
            call(["an owl", cut])
        str(caught.value).encode()  # can be printed
    assert encoder.refusals(["an owl", cut]) == [
        None, ("no text", "the caption holds half a surrogate pair, an emoji that was cut in two")
    ]  # fmt: skip
    assert encoder.refusals(["an owl \U0001f989"]) == [None]


def test_changed_weights_of_the_packaged_encoder_are_refused(monkeypatch):
    monkeypatch.setattr(text, "MINILM_SHA256", "0" * 64)
    text._minilm_folder.cache_clear()
    try:
        with pytest.raises(UserError, match="have SHA-256 53aa5117"):
            load_encoder()
    finally:
        text._minilm_folder.cache_clear()


def test_an_encoder_in_a_folder_loads_like_the_packaged_one(encoder):
    folder = str(text._minilm_folder())
    other = load_encoder(folder, max_tokens=8)
    assert other.name == folder
    assert torch.equal(other.stored_states(["a dog"])[0], encoder.stored_states(["a dog"])[0])
    with pytest.raises(UserError, match="at most 8"):
        other.encode(["word " * 20])


def test_pixels_survive_the_way_to_latents_and_back():
    pixel = load_autoencoder("pixel")
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    latents = pixel.encode(images)
    assert latents.shape == (2, *pixel.latent_shape(16, 16))
    assert (latents.min(), latents.max()) == (-1, 1)
    assert torch.equal(pixel.decode(latents), images)
    assert pixel.decode(torch.full((1, 3, 1, 1), 7.0)).unique().tolist() == [255]


def test_a_kl_autoencoder_gives_latents_in_the_teacher_s_units(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, scaling_factor=0.5, shift_factor=0.25,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    loaded = load_autoencoder(f"{tmp_path / 'pipeline'}:vae")
    images = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    assert loaded.latent_shape(8, 12) == (4, 4, 6)
    latents = loaded.encode(images)
    with torch.no_grad():
        mean = model.encode(images.movedim(-1, 1).float() / 127.5 - 1).latent_dist.mean
        decoded = model.decode(mean).sample
    assert torch.allclose(latents, (mean - 0.25) * 0.5, atol=1e-6)
    expected = ((decoded.movedim(1, -1) + 1) * 127.5).round().clamp(0, 255)
    assert (loaded.decode(latents).float() - expected).abs().max() <= 1
    for bound in ("PIXELS_ENCODED", "PIXELS_DECODED"):
        monkeypatch.setattr(autoencoder, bound, 8 * 12)  # one image at a time
    torch.testing.assert_close(loaded.encode(images), latents, atol=1e-5, rtol=0)
    assert (loaded.decode(latents).float() - expected).abs().max() <= 1
    with pytest.raises(UserError, match=r"9x8 pixels doesn't fit .* multiples of 2"):
        loaded.latent_shape(8, 9)


def test_qwen_images_autoencoder_gives_latents_of_mean_0_and_deviation_1_by_its_own_figures(tmp_path):
    torch.manual_seed(0)
    mean, std = [0.5, -0.25], [2.0, 4.0]
    model = AutoencoderKLQwenImage(
        base_dim=4, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=mean, latents_std=std
    ).eval()
    model.save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(f"{tmp_path}:vae")
    assert loaded.latent_shape(16, 24) == (2, 2, 3)
    images = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8)
    with torch.no_grad():
        frames = images.permute(0, 3, 1, 2).float().div(127.5).sub(1)[:, :, None]
        raw = model.encode(frames).latent_dist.mode()
        drawn = model.decode(raw).sample[:, :, 0]
    figures = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std))
    latents = loaded.encode(images)
    torch.testing.assert_close(latents, (raw[:, :, 0] - next(figures)) / next(figures), atol=1e-5, rtol=1e-4)
    expected = ((drawn.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert (loaded.decode(latents).float() - expected).abs().max() <= 1


def test_qwen_image_21s_autoencoder_takes_opaque_images_and_lays_transparent_ones_on_white(tmp_path):
    torch.manual_seed(0)
    mean, std = [0.5, -0.25], [2.0, 4.0]
    model = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=2, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=mean, latents_std=std,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(f"{tmp_path}:vae")
    assert loaded.latent_shape(32, 64) == (2, 2, 4)
    with pytest.raises(UserError, match="multiples of 32"):
        loaded.latent_shape(32, 48)
    images = torch.randint(0, 256, (2, 32, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        # The pipeline's own preparation of pictures, given with alpha
        pictures = [Image.fromarray(image.numpy()).convert("RGBA") for image in images]
        frames = VaeImageProcessor(vae_scale_factor=16).preprocess(pictures)[:, :, None]
        raw = model.encode(frames).latent_dist.mode()
        drawn = VaeImageProcessor().postprocess(model.decode(raw).sample[:, :, 0])
    figures = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std))
    latents = loaded.encode(images)
    torch.testing.assert_close(latents, (raw[:, :, 0] - next(figures)) / next(figures), atol=1e-5, rtol=1e-4)
    assert drawn[0].mode == "RGBA"
    for ours, theirs in zip(loaded.decode(latents), drawn, strict=True):
        shown = Image.alpha_composite(Image.new("RGBA", theirs.size, "white"), theirs).convert("RGB")
        assert (ours.float() - torch.from_numpy(np.array(shown)).float()).abs().max() <= 2


def test_flux_2s_autoencoder_normalises_patches_as_its_pipeline_does(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKLFlux2(
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    model.save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(f"{tmp_path}:vae")
    assert loaded.latent_shape(8, 12) == (2, 4, 6)
    with pytest.raises(UserError, match="multiples of 4"):
        loaded.latent_shape(8, 10)
    images = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    with torch.no_grad():
        raw = model.encode(images.permute(0, 3, 1, 2).float().div(127.5).sub(1)).latent_dist.mode()
        drawn = model.decode(raw).sample
        patches = model.bn(Flux2Pipeline._patchify_latents(raw))
    latents = loaded.encode(images)
    torch.testing.assert_close(Flux2Pipeline._patchify_latents(latents), patches, atol=1e-5, rtol=1e-4)
    expected = ((drawn.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert (loaded.decode(latents).float() - expected).abs().max() <= 1


def test_an_autoencoder_of_another_kind_is_refused(tmp_path):
    AutoencoderTiny().save_config(tmp_path)
    with pytest.raises(UserError, match="it is AutoencoderTiny, and known are AutoencoderKL,"):
        load_autoencoder(str(tmp_path))
