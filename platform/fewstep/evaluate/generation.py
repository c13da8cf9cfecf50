"""Images for an evaluation, generated on the whole Ray cluster: every method on the same captions and noise."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.config import Precision
from fewstep.data.stream import Batch
from fewstep.evaluate.teacher_images import TeacherImages
from fewstep.flow import gaussian_noise
from fewstep.models.family_code import CODE, FamilyCode, find_code
from fewstep.models.precision import check_arithmetic, check_precision, pipeline_arguments
from fewstep.student.card import read_student_card
from fewstep.student.pipeline import FewStepPipeline

CHUNK_CELLS = 32 * 64 * 64
"""Latent cells per unit of work: 32 captions of small images, 8 of a megapixel."""

CHUNK = 32
"""Most captions per unit of work."""


@dataclass(frozen=True)
class Method:
    """One way of turning noise into images."""

    name: str
    """Name of its row in the report, such as "euler_8"."""
    steps: int
    """Network evaluations of the student, or Euler steps of the teacher."""
    student: bool = False
    """The student's policy sampler, or the teacher's own guided Euler sampler."""
    noise: int = 0
    """Which noise: methods with the same number start from the same latents."""


@dataclass(frozen=True)
class Precisions:
    """Precisions of the weights that images are generated with."""

    student: Precision = "float32"
    """Of the student's methods."""
    teacher: Precision = "float32"
    """Of the teacher's methods, with which the student's are compared."""

    def of(self, method: Method) -> Precision:
        """The one that a method is generated with."""
        return self.student if method.student else self.teacher


class _Actor:
    """A pipeline in a Ray Data actor, which generates one unit of work at a time."""

    def __init__(self, files: Any, batch: Any, seed: int, device: str, precision: Precision) -> None:
        import ray

        torch.set_num_threads(1)  # one actor per CPU
        torch.set_flush_denormal(True)  # CPUs compute numbers so close to zero a hundred times slower
        captions: Batch = ray.get(batch)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(files).items():
                (Path(folder) / name).write_bytes(content)
            if (code := Path(folder) / CODE).exists():  # the driver has checked that it may be run
                FamilyCode.read(code).use()
            self.pipe = FewStepPipeline.from_pretrained(
                folder, device=device, **pipeline_arguments(precision)
            )
        self.conditioning, self.shape = captions.conditioning.to(self.pipe.device), captions.shape
        self.seed = seed

    def __call__(self, work: dict[str, Any]) -> dict[str, Any]:
        start, stop = work["start"], work["stop"]
        method = Method(work["name"], work["steps"], work["student"], work["noise"])
        generators = [self._generator(method.noise, index) for index in range(start, stop)]
        noise = gaussian_noise((len(generators), *self.shape), generators)
        conditioning = self.conditioning[start:stop]
        if method.student:
            sampler = self.pipe.sampler_for(self.shape, nfe=method.steps)
            latents = self.pipe.sample(noise, conditioning, sampler, generator=generators)
        else:
            latents = self.pipe.sample_teacher(noise, conditioning, method.steps)
        return {"name": method.name, "start": start, "pixels": self.pipe.decode(latents)}

    def _generator(self, stream: int, index: int) -> torch.Generator:
        """One caption's own source of noise, so that its image does not depend on how captions are grouped."""
        # hash() of integers is the same in every process, unlike that of text.
        return torch.Generator().manual_seed(hash((self.seed, stream, index)) & (2**63 - 1))


def generate_images(
    student: Path,
    batch: Batch,
    methods: Sequence[Method],
    *,
    seed: int = 0,
    gpu: bool = False,
    precisions: Precisions | None = None,
) -> dict[str, np.ndarray]:
    """Images of every method for every caption of `batch`, on all CPUs (or GPUs) of the cluster.

    What the teacher generated for them before is kept in `.fewstep/teacher_images`, and taken from there.

    Args:
        student: exported folder on this machine. Its teacher must be found under the same path or hub id on every
            node.
        batch: captions, of one latent shape.
        methods: what to generate them with.
        seed: of the noise.
        gpu: whether each actor gets a GPU instead of a CPU.
        precisions: of the weights; float32 by default.

    Returns:
        Per method (N, H, W, 3) uint8, in the order of the captions.

    Raises:
        UserError: the teacher's family is code that nobody has looked at here; or a precision can't be used here.
    """
    precisions = precisions or Precisions()
    for precision in (precisions.student, precisions.teacher):
        check_arithmetic(check_precision(precision), "cuda" if gpu else "cpu")
    card = read_student_card(student)
    find_code(card.teacher.family, card.teacher.code_sha256, student)
    kept = TeacherImages.of(card, batch, seed, precisions.teacher)
    images: dict[str, np.ndarray] = {}
    for method in methods:
        if not method.student and (known := kept.load(method.steps, method.noise)) is not None:
            images[method.name] = known
    missing = [method for method in methods if method.name not in images]
    # Kept one by one, so that an evaluation that is interrupted need not begin again.
    for precision in dict.fromkeys(map(precisions.of, missing)):
        together = [method for method in missing if precisions.of(method) == precision]
        for method, made in _generate(student, batch, together, seed, gpu, precision):
            images[method.name] = made
            if not method.student:
                kept.save(method.steps, method.noise, made)
    return images


def _generate(
    student: Path, batch: Batch, methods: Sequence[Method], seed: int, gpu: bool, precision: Precision
) -> Iterator[tuple[Method, np.ndarray]]:
    """Each method with its images, (N, H, W, 3) uint8, as soon as all of them are there."""
    import ray
    import ray.data
    from tqdm.auto import tqdm

    _, height, width = batch.shape
    chunk = min(CHUNK, max(1, CHUNK_CELLS // (height * width)))
    # Methods of many steps come first, so that no actor is left with the longest work at the end.
    work = [
        {**asdict(method), "start": start, "stop": min(start + chunk, len(batch))}
        for method in sorted(methods, key=lambda m: -m.steps)
        for start in range(0, len(batch), chunk)
    ]
    # The student travels as bytes: the other nodes need not see this machine's folders.
    files = {file.name: file.read_bytes() for file in student.iterdir() if file.is_file()}
    generator: Any = _Actor  # Ray's annotations know classes without constructor arguments alone
    resources: dict[str, Any] = {"num_gpus": 1} if gpu else {"num_cpus": 1}
    dataset = ray.data.from_items(work, override_num_blocks=len(work)).map(
        generator,
        fn_constructor_args=(ray.put(files), ray.put(batch), seed, "cuda" if gpu else "cpu", precision),
        compute=ray.data.ActorPoolStrategy(size=min(_places(gpu), len(work))),
        **resources,
    )
    dataset.context.enable_progress_bars = False
    by_name = {method.name: method for method in methods}
    parts: dict[str, dict[int, np.ndarray]] = {name: {} for name in by_name}
    total = sum(method.steps * len(batch) for method in methods)
    with tqdm(total=total, unit=" steps", desc="generating", mininterval=5) as bar:
        for row in dataset.iter_rows():
            method, pixels = by_name[row["name"]], np.asarray(row["pixels"], dtype=np.uint8)
            mine = parts[method.name]
            mine[int(row["start"])] = pixels
            bar.update(method.steps * len(pixels))
            # Units of work come back in any order; a method is handed on once its last one is there.
            if sum(map(len, mine.values())) == len(batch):
                yield method, np.concatenate([mine[start] for start in sorted(mine)])


def _places(gpu: bool) -> int:
    """How many actors fit the cluster."""
    import ray

    resources = ray.cluster_resources()
    if gpu:
        return max(1, int(resources.get("GPU", 0)))
    # Ray may have been told of more CPUs than there are (see `connect_ray`).
    return max(1, min(int(resources.get("CPU", 1)), (os.cpu_count() or 1) * len(ray.nodes())))
