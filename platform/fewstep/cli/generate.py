"""`fewstep generate`: images from prompts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fewstep.cli.common import add_precision_option, add_student_options, make_folder, number
from fewstep.cli.dry_run import (
    add_parts_options,
    add_serving_options,
    plan_only,
    print_serving_plans,
    refuse_unread,
)

DESCRIPTION = "Write images from prompts with a distilled student."
EXAMPLES = """\
examples
  {program} --prompt "red heart, noto style"
  {program} --model models:/emoji64-4step@champion --prompt "owl, fluent style" --nfe 4 --seed 7 --count 8
  {program} --model .fewstep/models/RUN --prompt "owl, twemoji style" --teacher-steps 64 --out owl.png
  {program} --prompt "owl, noto style" --lora pixel_art.safetensors:0.8
  {program} --model .fewstep/models/RUN --prompt "in noto style" --image owl.png
  {program} --dry-run --recipe qwen_image_4nfe --gpu-memory 24 --encoder-precision int4

The bundled student knows captions of the form "LABEL, STYLE style" with the styles noto, twemoji and fluent."""

READABLE = 256
"""Pixels per side that small images are enlarged to."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--prompt", help="what the images show: a caption, or a class's name or number")
    add_student_options(parser)
    parser.add_argument(
        "--image",
        action="append",
        type=Path,
        metavar="FILE",
        help="reference image, for a student that edits; repeat it for one that takes several",
    )
    parser.add_argument(
        "--nfe", "--steps", type=number(int, 1), metavar="N", help="network evaluations; default: as trained"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the noise; image i of --count uses seed + i; default: 0"
    )
    parser.add_argument("--count", type=number(int, 1), default=1, help="how many images; default: 1")
    parser.add_argument(
        "--temperature",
        type=_temperature,
        metavar="T",
        help="mixture temperature, or auto; default: as trained",
    )
    parser.add_argument(
        "--h",
        type=float,
        help="noise renewed between evaluations, 0 for none, inf for all; default: as trained",
    )
    parser.add_argument(
        "--teacher-steps",
        type=number(int, 1),
        metavar="N",
        help="generate with the teacher's guided Euler sampler instead",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="a style LoRA (file, folder, s3://, hub id, models:/) and its scale; may be repeated; default scale: 1",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: cpu")
    add_precision_option(parser)
    add_parts_options(parser)
    parser.add_argument(
        "--scale",
        type=number(int, 1),
        metavar="N",
        help="enlarge every pixel this often; default: as often as images of 256 pixels have room for",
    )
    parser.add_argument("--out", type=Path, default=Path("out/generated.png"), help="default: %(default)s")
    plan_only(parser, add_serving_options(parser))


def run(options: argparse.Namespace) -> None:
    """Generate, and write one picture with all images side by side.

    Raises:
        UserError: there is no such student, or it can't do what is asked.
    """
    if options.dry_run:
        print_serving_plans(options, [options.model], options.tracking_uri, options.precision)
        return
    refuse_unread(options, "--recipe", "--set")
    if options.prompt is None:
        options.error("the following arguments are required: --prompt")
    if options.out.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        options.error(f"--out {options.out}: its name must end in .png, .jpg or .webp")
    make_folder(options.out.parent, "--out")

    import numpy as np
    import torch

    from fewstep.config import PartsConfig
    from fewstep.evaluate.grid import sample_grid
    from fewstep.flow import gaussian_noise
    from fewstep.flow.sampler_config import MAX_NFE
    from fewstep.images import read_image
    from fewstep.models.devices import check_device
    from fewstep.models.precision import pipeline_arguments
    from fewstep.student import FewStepPipeline

    if options.nfe and options.nfe > MAX_NFE:
        options.error(f"--nfe must be 1 to {MAX_NFE}")
    check_device(options.device)
    pipe = FewStepPipeline.from_pretrained(
        options.model,
        device=options.device,
        tracking_uri=options.tracking_uri,
        parts=PartsConfig(
            text_encoder_precision=options.encoder_precision,
            autoencoder_precision=options.autoencoder_precision,
        ),
        **pipeline_arguments(options.precision),
    )
    styles = [_lora(text) for text in options.lora]
    for index, (source, _) in enumerate(styles):
        pipe.load_lora_weights(source, str(index), tracking_uri=options.tracking_uri)
    lora = [(str(index), scale) for index, (_, scale) in enumerate(styles)]
    references = [read_image(file, "--image") for file in options.image or ()]
    prompts, started = [options.prompt] * options.count, time.perf_counter()
    if options.teacher_steps:
        if len(references) != pipe.card.references:
            options.error(f"--image: this student takes {pipe.card.references} of them")
        conditioning, shape = pipe.encode(prompts), pipe.card.latent_shape
        if references:
            shape = pipe.latent_shape(*pipe.size_like(references[0].height, references[0].width))
            pixels = pipe.fitted(references, shape)
            conditioning = pipe.beside(conditioning, pipe.encode_images(pixels))
        conditioning = pipe.styled(conditioning, lora)
        generators = [torch.Generator().manual_seed(options.seed + i) for i in range(options.count)]
        noise = gaussian_noise((options.count, *shape), generators)
        images = pipe.decode(pipe.sample_teacher(noise, conditioning, options.teacher_steps))
    else:
        drawn = pipe(
            prompts,
            image=references,
            num_inference_steps=options.nfe,
            seed=options.seed,
            temperature=options.temperature,
            h=options.h,
            lora=lora,
        ).images
        images = np.stack([np.asarray(image) for image in drawn])
    seconds = time.perf_counter() - started
    columns = min(options.count, 8)
    scale = options.scale or max(1, READABLE // images.shape[2])
    sample_grid(images, columns, tile=images.shape[2] * scale).save(options.out)
    print(
        f"{options.out.absolute()}  ({options.count} {'image' if options.count == 1 else 'images'} in {seconds:.2f} s)"
    )


def _lora(text: str) -> tuple[str, float]:
    """Source and scale of a style LoRA; addresses may have colons, too."""
    source, colon, scale = text.rpartition(":")
    try:
        return (source, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def _temperature(text: str) -> float | str:
    return text if text == "auto" else float(text)
