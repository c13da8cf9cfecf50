"""`fewstep train-autoencoder`: latents for teachers of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Train a small AutoencoderKL on the pictures of a prepared dataset, and print how well it gives back those of the
held-out split. One that was ended goes on where it was."""
EXAMPLES = """\
examples
  fewstep prepare-data --source emoji --size 64 --autoencoder pixel --out data/emoji64-pixels     first
  {program} --data data/emoji64-pixels --out out/autoencoder
  {program} --data data/emoji64-pixels --set latent_channels=8 --set steps=40000 --out out/autoencoder8
  fewstep prepare-data --source emoji --size 64 --autoencoder out/autoencoder --out data/emoji64"""

SAVE_EVERY = 1000
"""Steps between files from which training goes on, and between measurements."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--data", default="data/emoji64-pixels", help="dataset with pixels as latents; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("out/autoencoder"), help="default: %(default)s")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, see AutoencoderConfig: widths, latent_channels, steps, batch_size, lr, …",
    )


def run(options: argparse.Namespace) -> None:
    """Train, print the errors and write a diffusers folder.

    Raises:
        UserError: a setting is unknown, the dataset's latents are no pixels, or its pictures don't fit the network.
    """
    import time

    from fewstep.cluster import connect_ray
    from fewstep.config import checked_settings
    from fewstep.data.datasets.bundled import open_data
    from fewstep.data.stream import read_split
    from fewstep.encoders import PIXEL, load_autoencoder
    from fewstep.encoders.autoencoder_training import (
        AutoencoderConfig,
        AutoencoderTraining,
        reconstruction,
        write_autoencoder,
    )
    from fewstep.errors import UserError
    from fewstep.train.overrides import override

    tree: dict[str, Any] = {}
    for change in options.set:
        override(tree, AutoencoderConfig, change)
    config = checked_settings(AutoencoderConfig, tree, "--set", "AutoencoderConfig lists all keys")
    connect_ray()
    info = open_data(options.data)
    if info.encoding.autoencoder != PIXEL or not info.has_latents:
        raise UserError(
            f"--data: the latents of {options.data} are no pixels: prepare it with --autoencoder pixel."
        )
    decode = load_autoencoder(PIXEL).decode
    train, held = (read_split(options.data, split).latent for split in ("train", "held_out"))
    assert train is not None
    assert held is not None
    pictures, held_out = decode(train), decode(held)
    training = AutoencoderTraining(config, pictures, options.out)
    began, first = time.monotonic(), training.step
    while training.step < config.steps:
        # Training may have been ended between two files.
        target = min((training.step // SAVE_EVERY + 1) * SAVE_EVERY, config.steps)
        sums: dict[str, float] = {}
        count = target - training.step
        for losses in training.train(target):
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value / count
        training.save()
        rate = (training.step - first) * config.batch_size / (time.monotonic() - began)
        now = reconstruction(training.averaged(), held_out)
        means = "  ".join(f"{name} {value:.4f}" for name, value in sums.items())
        print(
            f"{training.step}/{config.steps}  {means}  held out: rms {now.rms:.4f}, {now.psnr:.2f} dB  "
            f"{rate:.0f} pictures/s",
            flush=True,
        )
    model = training.averaged()
    write_autoencoder(model, pictures, options.out)
    final = reconstruction(model, held_out)
    print(
        f"held out    root mean square error {final.rms:.4f} of pixels from 0 to 1, {final.psnr:.2f} dB\n"
        f"autoencoder {options.out.absolute()}"
    )
