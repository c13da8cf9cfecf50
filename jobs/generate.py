#!/usr/bin/env python
"""Write images from prompts with a distilled student."""

import argparse
import time
from pathlib import Path

from fewstep.cli import add_student_options, run_job

EXAMPLES = """\
examples
  jobs/generate.py --prompt "red heart, noto style"
  jobs/generate.py --model models:/emoji-4step@champion --prompt "owl, fluent style" --steps 4 --seed 7 --count 8
  jobs/generate.py --model .fewstep/models/RUN --prompt "owl, twemoji style" --teacher-steps 64 --out owl.png

The bundled student knows captions of the form "LABEL, STYLE style" with the styles noto, twemoji and fluent."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", required=True, help="what to draw")
    add_student_options(parser)
    parser.add_argument("--steps", type=int, help="network evaluations; default: as trained")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; image i of --count uses seed + i")
    parser.add_argument("--count", type=int, default=1, help="how many images")
    parser.add_argument("--temperature", type=float, help="mixture temperature; default: as trained")
    parser.add_argument(
        "--teacher-steps", type=int, help="draw with the teacher's guided Euler sampler instead"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument(
        "--scale", type=int, default=16, help="enlarge every pixel this often; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("out/generated.png"), help="default: %(default)s")
    options = parser.parse_args()
    for name in ("steps", "count", "teacher_steps", "scale"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    if options.out.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        parser.error(f"--out {options.out}: its name must end in .png, .jpg or .webp")

    import numpy as np
    import torch

    from fewstep.evaluate.grid import sample_grid
    from fewstep.export import FewStepPipeline
    from fewstep.flow import gaussian_noise

    pipe = FewStepPipeline.from_pretrained(
        options.model, device=options.device, tracking_uri=options.tracking_uri
    )
    prompts, started = [options.prompt] * options.count, time.perf_counter()
    if options.teacher_steps:
        generators = [torch.Generator().manual_seed(options.seed + i) for i in range(options.count)]
        noise = gaussian_noise((options.count, *pipe.card.latent_shape), generators)
        images = pipe.decode(pipe.sample_teacher(noise, pipe.encode(prompts), options.teacher_steps))
    else:
        images = np.stack(
            pipe(
                prompts,
                num_inference_steps=options.steps,
                seed=options.seed,
                temperature=options.temperature,
                output_type="np",
            ).images
        )
    seconds = time.perf_counter() - started
    options.out.parent.mkdir(parents=True, exist_ok=True)
    columns = min(options.count, 8)
    sample_grid(images, columns, tile=images.shape[2] * options.scale).save(options.out)
    print(f"{options.out.absolute()}  ({options.count} images in {seconds:.2f} s)")


if __name__ == "__main__":
    run_job(main)
