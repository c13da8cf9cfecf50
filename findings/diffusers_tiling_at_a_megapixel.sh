#!/usr/bin/env bash
# diffusers 0.42.1: `enable_tiling()` of an autoencoder with FLUX's configuration does nothing up to 1024 x 1024 pixels.
#
# One would guess: who runs out of memory while decoding a megapixel, and enables tiling, decodes in several smaller
#   pieces: "the VAE will split the input tensor into tiles", says the method.
# What happens: AutoencoderKL's tiles are as large as its `sample_size`, 1024 for FLUX, and what isn't larger than one
#   tile is decoded whole: one call of the decoder, as without tiling, and no warning. A larger picture's tiles are of
#   1024 x 1024 each, besides narrow ones at the edge. `vae.tile_sample_min_size` and `vae.tile_latent_min_size` can be
#   set to less, together.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check diffusers==0.42.1
cat > "$folder/try.py" <<'P'
import diffusers
import torch
from diffusers import AutoencoderKL

# FLUX's autoencoder with 8 channels in place of 128 to 512, and without attention, for speed.
vae = AutoencoderKL(
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[8] * 4,
    layers_per_block=1, norm_num_groups=4, latent_channels=16, sample_size=1024, use_quant_conv=False,
    use_post_quant_conv=False, mid_block_add_attention=False).eval()
calls = []
vae.decoder.register_forward_pre_hook(lambda module, inputs: calls.append("x".join(map(str, inputs[0].shape[2:]))))
print("diffusers", diffusers.__version__)
vae.enable_tiling()
for side, tile in ((1024, None), (1088, None), (1024, 512)):
    if tile:
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8
    calls.clear()
    with torch.no_grad():
        vae.decode(torch.zeros(1, 16, side // 8, side // 8))
    print(side, "pixels, tiles of", tile or "the default size", "-", len(calls), "calls of the decoder:", *calls)
P
"$folder/venv/bin/python" -W ignore "$folder/try.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
diffusers 0.42.1
1024 pixels, tiles of the default size - 1 calls of the decoder: 128x128
1088 pixels, tiles of the default size - 4 calls of the decoder: 128x128 128x40 40x128 40x40
1024 pixels, tiles of 512 - 9 calls of the decoder: 64x64 64x64 64x32 64x64 64x64 64x32 32x64 32x64 32x32
SEEN
