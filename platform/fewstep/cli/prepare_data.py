"""`fewstep prepare-data`: captions (and images) become Parquet shards that training reads."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.cli.common import number

OWN_SOURCES = ("folder", "parquet", "webdataset", "prompts")
"""Kinds of sources of users' own data."""

DESCRIPTION = "Prepare a dataset: captions (and images) become Parquet shards that training jobs read."
EXAMPLES = """\
examples
  {program} --out data/emoji16
  {program} --source fashion-mnist --out data/fashion28
  {program} --source folder imagenet/ --out data/imagenet256 --size 256 --shard-rows 4096 \\
      --autoencoder stabilityai/sd-vae-ft-ema --text-encoder labels:1000 --encoders 8 --gpus 1
  {program} --source folder photos/ --out s3://bucket/photos --size 512x512 --size 640x384 \\
      --autoencoder models/qwen-image:vae --text-encoder models/encoder --encoders 4 --gpus 1
  {program} --source parquet hf://datasets/ORG/NAME --out data/set512 --size 512
  {program} --source webdataset 's3://bucket/set/{000..012}.tar' --out s3://bucket/set512 --buckets 512
  {program} --source prompts prompts.txt --out data/prompts --size 16 --held-out 0.05
  ray job submit -- {program} --out data/emoji16

sources
  emoji            the captioned emoji set. 16 and 64 pixels: from the files that ship with fewstep; any other size:
                   rebuilt from three npm packages of pinned hash (needs npm and about 150 MB once)
  emoji-edits      for editing: an emoji in one style as the reference image, "in noto style" as the instruction, and
                   the same emoji in that style as the result
  fashion-mnist    70,000 grey 28x28 pictures in 10 classes, from the Debian package dataset-fashion-mnist, or
                   from a folder of the set's idx files (PATH); classes as conditioning, one channel
  folder DIR       images with a table of captions: metadata.jsonl, .csv, .tsv, .json or .parquet in DIR or in the
                   folders in it (or --captions), with the columns file (or file_name, image) and caption (or
                   text, prompt). Pictures in train/ and in validation/ or test/ are split as their folders say.
                   For editing, a column reference (or references) names the file of each row's reference image, or a
                   list of several; all rows have as many
  parquet PATH...  Parquet files, folders of them or patterns, with the images in them (structures of bytes and path,
                   or bytes) or the names of image files; also hf://datasets/ORGANISATION/NAME. Files named train…
                   and validation… or test… are split so
  webdataset PATH...
                   tar files of WebDataset, folders of them or patterns such as set/{000..012}.tar: an image, and its
                   caption in .txt or under caption, text or prompt in .json
  prompts FILE...  captions alone, for distillation without data: .txt (one a line), or such a table with a
                   column caption, text or prompt
  mix FILE         several of the last four with weights, by a YAML file that has for each name: source, path, and
                   if need be weight, captions, caption_column, image_column, held_out

what to know
  The command may be stopped and repeated: finished shards are kept, nothing half-written is left. A
  broken image or row is skipped, counted and listed with its place in ROOT/rejected.jsonl. A folder that
  holds a dataset of other settings or rows is refused.
  s3:// addresses use AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY. Work runs on
  the Ray cluster of RAY_ADDRESS or of this machine; one is started for the command's time where there is none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""

    def add(*names: str, help: str, **options: Any) -> None:
        default = "; default: %(default)s" if options.get("default") is not None else ""
        parser.add_argument(*names, help=help + default, **options)

    add("paths", nargs="*", metavar="PATH", help="the source's folder or files, local or s3://")
    kinds = ("emoji", "emoji-edits", "fashion-mnist", *OWN_SOURCES, "mix")
    add("--source", choices=kinds, default="emoji", help="see below")
    add("--out", metavar="ROOT", help="where the dataset goes: a local folder or s3://bucket/prefix")
    add("--captions", metavar="TABLE", help="folder: the table of captions, if it is not in the folder")
    add("--caption-column", action="append", metavar="NAME", help="column (of webdataset: extension, or key of the "
        "JSON) of the captions, with dots for fields of structures; repeat it for several, of which each row gets one "
        "at random, as of a list; default: caption, text or prompt")  # fmt: skip
    add("--image-column", metavar="NAME", help="column (of webdataset: extension) of the images, or of the names of "
        "their files; default: file, file_name or image, and of parquet and webdataset the usual ones")  # fmt: skip
    add("--size", action="append", metavar="WxH", help="pixels, 512 or 640x384 (width x height); repeat it "
        "for several buckets, each goes to the nearest aspect ratio; default: 16 (fashion-mnist: 28)")  # fmt: skip
    add("--buckets", type=number(int, 1), metavar="N", help="in place of --size: sizes of about NxN pixels, from twice "
        "as high as wide to twice as wide as high")  # fmt: skip
    add(
        "--min-size",
        type=number(int, 1),
        metavar="N",
        help="images with a shorter side below it are rejected",
    )
    add("--text-encoder", metavar="NAME", help="minilm, a folder or hub id of a transformers encoder; flux:PIPELINE, "
        "flux2:, krea2:, longcat-image:, qwen-image:, qwen-image-2.1:, sd3:, wan: or z-image:PIPELINE for those of a "
        "diffusers pipeline; or classes instead of text: labels:fashion-mnist, labels:cat,dog, labels:1000 (class "
        "numbers); default: minilm (fashion-mnist: its labels)")  # fmt: skip
    add("--autoencoder", metavar="NAME", help="pixel (latents are pixels), grey (one channel), emoji64 (the bundled "
        "one), or a folder or hub id of a diffusers AutoencoderKL or that of Qwen-Image, Qwen-Image 2.1 or FLUX.2 "
        "(PIPELINE:vae for a pipeline's); default: pixel (fashion-mnist: grey; emoji of 64: emoji64)")  # fmt: skip
    add("--max-tokens", type=number(int, 1), metavar="N", help="longer captions are rejected; default: 64")
    add("--latent-type", choices=("float32", "bfloat16", "float16"), help="numbers that latents are stored as; "
        "default: float32")  # fmt: skip
    add("--held-out", type=number(float, 0, 1), default=0.02, metavar="F", help="fraction of own data kept out of "
        "training by a hash of the file name or prompt (the emoji set and fashion-mnist have their "
        "own split)")  # fmt: skip
    add("--shard-rows", type=number(int, 1), metavar="N", help="most rows a shard holds; a training batch takes rows "
        "of several at a time; default: 256 (fashion-mnist: 1024)")  # fmt: skip
    add(
        "--max-pixels",
        type=number(int, 1),
        metavar="N",
        help="larger images are rejected; default: 178956970",
    )
    add("--encode", choices=("shards", "stream"), default="shards", help="shards: encode now. stream: write captions, "
        "and where images lie, for data.encode=stream, which encodes them while training runs")  # fmt: skip
    add("--seed", type=int, default=0, help="of the shuffle of rows over shards")
    add("--encoders", type=number(int, 1), default=1, metavar="N", help="actors of each encoder")
    add("--gpus", type=number(float, 0), default=0.0, metavar="F", help="GPUs of each actor")
    add("--cache", type=Path, metavar="DIR", help="of the emoji packages; default: ~/.cache/fewstep/emoji")
    add("--bundle", action="store_true", help="maintainers: rebuild the files of emoji shipped with fewstep")
    parser.set_defaults(error=parser.error)


def run(options: argparse.Namespace) -> None:
    """Prepare the dataset.

    Raises:
        UserError: the source, an encoder or the place of the dataset can't be used.
    """
    _check(options)

    from fewstep.cluster import connect_ray
    from fewstep.data.datasets import emoji, fashion_mnist
    from fewstep.data.mixture import OwnSource, mixture
    from fewstep.data.prepare import prepare
    from fewstep.encoders import load_autoencoder
    from fewstep.images import Size, bucket_sizes

    if options.bundle:
        for size, file in emoji.BUNDLES.items():
            count = emoji.write_bundle(size, options.cache or emoji.default_cache(), file)
            print(f"{file}: {count} images")
        return
    sizes = options.size and tuple(Size.parse(size) for size in options.size)
    given = {
        "sizes": sizes,
        "text_encoder": options.text_encoder,
        "autoencoder": options.autoencoder,
        "max_tokens": options.max_tokens,
        "latent_type": options.latent_type,
        "shard_rows": options.shard_rows,
        "seed": options.seed,
        "max_pixels": options.max_pixels,
        "min_size": options.min_size,
    }
    config = replace(
        {
            "emoji": emoji.preparation(sizes),
            "emoji-edits": emoji.preparation(sizes),
            "fashion-mnist": fashion_mnist.PREPARATION,
        }.get(options.source, emoji.PREPARATION),
        **{name: value for name, value in given.items() if value is not None},
    )
    if options.buckets:
        # Most networks take the latent in patches of 2x2 cells.
        multiple = load_autoencoder(config.autoencoder).image_size(2, 2)[0]
        config = replace(config, sizes=bucket_sizes(options.buckets, multiple))
    connect_ray()
    if options.source == "emoji":
        source = emoji.emoji_set(config.sizes, options.cache)
    elif options.source == "emoji-edits":
        source = emoji.emoji_edits(config.sizes, options.cache)
    elif options.source == "fashion-mnist":
        source = fashion_mnist.fashion_mnist(*options.paths)
    elif options.source == "mix":
        source = mixture(options.paths[0], held_out=options.held_out, seed=options.seed)
    else:
        source = OwnSource(
            source=options.source,
            path=options.paths,
            captions=options.captions,
            caption_column=options.caption_column or [],
            image_column=options.image_column,
        ).read(options.held_out, options.seed)
    prepare(
        source, options.out, config, encode=options.encode == "shards", encoders=options.encoders, gpus=options.gpus,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip


def _check(options: argparse.Namespace) -> None:
    """End with the usage line where options don't go together."""
    if options.bundle == bool(options.out):
        options.error("say where the dataset goes with --out (a local folder or s3://bucket/prefix)")
    limits = {
        "emoji": (0, 0),
        "emoji-edits": (0, 0),
        "fashion-mnist": (0, 1),
        "folder": (1, 1),
        "mix": (1, 1),
    }
    least, most = limits.get(options.source, (1, None))
    if len(options.paths) < least or (most is not None and len(options.paths) > most):
        takes = "no PATH" if most == 0 else "one PATH" if most == 1 else "a PATH"
        options.error(f"--source {options.source} takes {takes}")
    own = {
        "--captions": (options.captions, ("folder",)),
        "--caption-column": (options.caption_column, OWN_SOURCES),
        "--image-column": (options.image_column, ("folder", "parquet", "webdataset")),
    }
    for name, (value, sources) in own.items():
        if value and options.source not in sources:
            options.error(f"{name} is for --source {', '.join(sources)}, not {options.source}")
    if options.buckets and options.size:
        options.error("--buckets stands in place of --size: give one of the two")
