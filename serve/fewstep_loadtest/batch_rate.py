"""The rate of `fewstep generate-batch` beside that of bare engines in as many processes, in turns on one machine.

    python -m fewstep_loadtest.batch_rate --rounds 3

The job's rate is that between the ends of its first and last units of work: what comes before, the start of Ray and of
its actors, is told apart, since it does not grow with the number of images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from fewstep.student import read_student_card, resolve_student
from fewstep_loadtest.load import bare_engine, prompts

BATCH_SIZE = 16
"""Images that are generated at a time, on both sides."""


def engines_rate(source: str, processes: int, seconds: float) -> float:
    """Images per second of bare engines, one thread each, all together.

    Args:
        source: of the student.
        processes: how many.
        seconds: how long each is measured.
    """
    steps = read_student_card(resolve_student(source).folder).sampler.nfe
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        runs = [
            pool.submit(bare_engine, source, BATCH_SIZE, seconds, steps=steps, threads=1)
            for _ in range(processes)
        ]
        return sum(run.result().images_per_s for run in runs)


def job_rate(source: str, images: int, unit: int) -> tuple[float, float]:
    """Images per second of the command on a Ray node of its own, and the seconds until its first unit was done.

    Args:
        source: of the student.
        images: of the job.
        unit: images of a unit of work; far fewer than `images`.

    Raises:
        CalledProcessError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, texts = Path(folder) / "out", Path(folder) / "prompts.txt"
        texts.write_text("\n".join(prompts(images, 7)))
        begin = time.time()
        subprocess.run(
            [
                str(Path(sys.executable).with_name("fewstep")), "generate-batch", "--model", source,
                "--prompts", str(texts), "--out", str(out), "--batch-size", str(BATCH_SIZE), "--unit", str(unit),
            ],
            env=os.environ | {"RAY_ADDRESS": "local"},
            check=True,
        )  # fmt: skip
        ends = sorted(part.stat().st_mtime for part in (out / "manifest").iterdir())
    return (images - unit) / (ends[-1] - ends[0]), ends[0] - begin


def main() -> None:
    """Measure, and print all runs and the ratio of their medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji64-student", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=2048, help="of each job; default: %(default)s")
    parser.add_argument("--unit", type=int, default=64, help="images of a unit of work; default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=30, help="of each run of the engines; default: %(default)s"
    )
    options = parser.parse_args()

    processes = os.cpu_count() or 1  # as many as the job has actors
    engines, jobs = [], []
    for _ in range(options.rounds):
        engines.append(engines_rate(options.model, processes, options.seconds))
        rate, start = job_rate(options.model, options.images, options.unit)
        jobs.append(rate)
        print(f"{processes} engines {engines[-1]:.1f} images/s   job {rate:.1f} images/s after {start:.1f} s")
    ratio = statistics.median(jobs) / statistics.median(engines)
    print(
        f"medians: engines {statistics.median(engines):.1f}, job {statistics.median(jobs):.1f}, ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
