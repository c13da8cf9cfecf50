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
  {program} --model models:/emoji-4step@champion --prompt "owl, fluent style" --nfe 4 --seed 7 --count 8
  {program} --model .fewstep/models/RUN --prompt "owl, twemoji style" --teacher-steps 64 --out owl.png
  {program} --dry-run --recipe qwen_image_4nfe --gpu-memory 24 --encoder-precision int4

The bundled student knows captions of the form "LABEL, STYLE style" with the styles noto, twemoji and fluent."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--prompt", help="what the images show: a caption, or a class's name or number")
    add_student_options(parser)
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
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: cpu")
    add_precision_option(parser)
    add_parts_options(parser)
    parser.add_argument(
        "--scale",
        type=number(int, 1),
        default=16,
        help="enlarge every pixel this often; default: %(default)s",
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
    prompts, started = [options.prompt] * options.count, time.perf_counter()
    if options.teacher_steps:
        generators = [torch.Generator().manual_seed(options.seed + i) for i in range(options.count)]
        noise = gaussian_noise((options.count, *pipe.card.latent_shape), generators)
        images = pipe.decode(pipe.sample_teacher(noise, pipe.encode(prompts), options.teacher_steps))
    else:
        drawn = pipe(
            prompts,
            num_inference_steps=options.nfe,
            seed=options.seed,
            temperature=options.temperature,
            h=options.h,
        ).images
        images = np.stack([np.asarray(image) for image in drawn])
    seconds = time.perf_counter() - started
    columns = min(options.count, 8)
    sample_grid(images, columns, tile=images.shape[2] * options.scale).save(options.out)
    print(
        f"{options.out.absolute()}  ({options.count} {'image' if options.count == 1 else 'images'} in {seconds:.2f} s)"
    )


def _temperature(text: str) -> float | str:
    return text if text == "auto" else float(text)
