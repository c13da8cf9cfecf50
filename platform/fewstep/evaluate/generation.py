"""Images for an evaluation, generated on the whole Ray cluster: every method on the same captions and noise."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.config import Precision
from fewstep.data.stream import Batch
from fewstep.evaluate.kept_images import KeptImages
from fewstep.evaluate.trajectory import trajectory_errors
from fewstep.flow import gaussian_noise
from fewstep.models.family_code import find_code
from fewstep.models.precision import check_arithmetic, check_precision
from fewstep.models.solvers import Solver
from fewstep.student.card import read_student_card
from fewstep.student.travel import packed, unpacked

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
    """Network evaluations of the student, or of the teacher's guided velocity."""
    student: bool = False
    """The student's policy sampler, or the teacher's guided sampler."""
    noise: int = 0
    """Which noise: methods with the same number start from the same latents."""
    solver: Solver = "euler"
    """Of the teacher's methods."""


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

    def __init__(self, given: Mapping[str, Any], seed: int, device: str, precision: Precision) -> None:
        import ray

        torch.set_num_threads(1)  # one actor per CPU
        torch.set_flush_denormal(True)  # CPUs compute numbers so close to zero a hundred times slower
        captions: Batch = ray.get(given["batch"])
        self.pipe = unpacked(ray.get(given["files"]), device, precision)
        self.conditioning, self.shape = captions.conditioning.to(self.pipe.device), captions.shape
        self.seed = seed

    def __call__(self, work: dict[str, Any]) -> dict[str, Any]:
        start, stop = work["start"], work["stop"]
        method = Method(**{field.name: work[field.name] for field in fields(Method)})
        generators = [self._generator(method.noise, index) for index in range(start, stop)]
        noise = gaussian_noise((len(generators), *self.shape), generators)
        conditioning = self.conditioning[start:stop]
        if method.student:
            sampler = self.pipe.sampler_for(self.shape, nfe=method.steps)
            latents = self.pipe.sample(noise, conditioning, sampler, generator=generators)
        else:
            latents = self.pipe.sample_teacher(noise, conditioning, method.steps, method.solver)
        return {"name": method.name, "start": start, "pixels": self.pipe.decode(latents)}

    def trajectories(
        self, start: int, stop: int, reference_steps: int, students: Sequence[int], baseline: Sequence[int]
    ) -> dict[str, list[tuple[float, float]]]:
        """`trajectory_errors` of some captions."""
        generators = [self._generator(0, index) for index in range(start, stop)]
        noise = gaussian_noise((len(generators), *self.shape), generators)
        conditioning = self.conditioning[start:stop]
        with torch.inference_mode():
            return trajectory_errors(self.pipe, noise, conditioning, reference_steps, students, baseline)

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

    What the teacher generated for them before is kept in `.fewstep/teacher_images`, and taken from there. What the
    student generates is kept too, in case this is ended, until `discard_images`.

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
    kept = {
        True: KeptImages.of_student(student, card, batch, seed, precisions.student),
        False: KeptImages.of_teacher(card, batch, seed, precisions.teacher),
    }
    images: dict[str, np.ndarray] = {}
    for method in methods:
        known = kept[method.student].load(method.steps, method.noise, method.solver)
        if known is not None:
            images[method.name] = known
    missing = [method for method in methods if method.name not in images]
    for precision in dict.fromkeys(map(precisions.of, missing)):
        together = {method: kept[method.student] for method in missing if precisions.of(method) == precision}
        images |= _generate(student, batch, together, seed, gpu, precision)
    return images


def measure_trajectories(
    student: Path,
    batch: Batch,
    reference_steps: int,
    students: Sequence[int],
    baseline: Sequence[int],
    *,
    seed: int = 0,
    gpu: bool = False,
    precisions: Precisions | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """Root mean square distances to the teacher's trajectory, along each method's own, on the whole cluster.

    Args:
        student, batch, seed, gpu: as for `generate_images`; the noise is that of the paired images.
        precisions: likewise; the student is measured in its teacher's, as one network computes both.
        reference_steps: the teacher's Euler steps.
        students: the student's numbers of evaluations.
        baseline: numbers of the teacher's Euler steps to compare with.

    Returns:
        Per method: σ after each of its steps, from noise to data, and the distance there.
    """
    import ray

    chunk = _chunk(batch)
    starts = range(0, len(batch), chunk)
    given = _given(student, batch)
    # Spread, as Ray Data's are: without a strategy, they would have to fit into the reservation of a trial of Ray Tune.
    kind: Any = ray.remote(**resources_of(gpu), scheduling_strategy="SPREAD")(_Actor)
    actors = [
        kind.remote(given, seed, "cuda" if gpu else "cpu", (precisions or Precisions()).teacher)
        for _ in range(min(places(gpu), len(starts)))
    ]
    work = [
        actors[place % len(actors)].trajectories.remote(
            start, min(start + chunk, len(batch)), reference_steps, students, baseline
        )
        for place, start in enumerate(starts)
    ]
    done = ray.get(work)
    sizes = [min(chunk, len(batch) - start) for start in starts]
    found: dict[str, list[tuple[float, float]]] = {}
    for name, own in done[0].items():
        found[name] = [
            (
                sigma,
                math.sqrt(sum(n * one[name][k][1] for n, one in zip(sizes, done, strict=True)) / sum(sizes)),
            )
            for k, (sigma, _) in enumerate(own)
        ]
    return found


def discard_images(
    student: Path, batch: Batch, *, seed: int = 0, precisions: Precisions | None = None
) -> None:
    """Delete what `generate_images` keeps of a student, once its evaluation is done; arguments as there."""
    precision = (precisions or Precisions()).student
    KeptImages.of_student(student, read_student_card(student), batch, seed, precision).discard()


def _generate(
    student: Path,
    batch: Batch,
    methods: Mapping[Method, KeptImages],
    seed: int,
    gpu: bool,
    precision: Precision,
) -> dict[str, np.ndarray]:
    """Each method's images, (N, H, W, 3) uint8; what is done is kept part by part, and taken from there."""
    chunk = _chunk(batch)
    parts: dict[str, dict[int, np.ndarray]] = {}
    for method, kept in methods.items():
        known = kept.parts(method.steps, method.noise, method.solver)
        # Parts of another size, from before a change of it, are of no use.
        parts[method.name] = {
            start: known[start]
            for start in range(0, len(batch), chunk)
            if len(known.get(start, ())) == min(chunk, len(batch) - start)
        }
    # Methods of many steps come first, so that no actor is left with the longest work at the end.
    work = [
        {**asdict(method), "start": start, "stop": min(start + chunk, len(batch))}
        for method in sorted(methods, key=lambda m: -m.steps)
        for start in range(0, len(batch), chunk)
        if start not in parts[method.name]
    ]
    by_name = {method.name: method for method in methods}
    if work:
        for name, start, pixels in _worked(student, batch, work, seed, gpu, precision):
            method, mine = by_name[name], parts[name]
            mine[start] = pixels
            methods[method].save_part(start, pixels, method.steps, method.noise, method.solver)
            if sum(map(len, mine.values())) == len(batch):
                methods[method].save(method.steps, method.noise, _joined(mine), method.solver)
    return {name: _joined(mine) for name, mine in parts.items()}


def _worked(
    student: Path, batch: Batch, work: Sequence[dict[str, Any]], seed: int, gpu: bool, precision: Precision
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Method, first caption and images of each unit of work, as soon as it is done, in any order."""
    import ray
    import ray.data
    from tqdm.auto import tqdm

    generator: Any = _Actor  # Ray's annotations know classes without constructor arguments alone
    dataset = ray.data.from_items(list(work), override_num_blocks=len(work)).map(
        generator,
        fn_constructor_args=(_given(student, batch), seed, "cuda" if gpu else "cpu", precision),
        compute=ray.data.ActorPoolStrategy(size=min(places(gpu), len(work))),
        **resources_of(gpu),
    )
    dataset.context.enable_progress_bars = False
    total = sum(one["steps"] * (one["stop"] - one["start"]) for one in work)
    steps = {one["name"]: one["steps"] for one in work}
    with tqdm(total=total, unit=" steps", desc="generating", mininterval=5) as bar:
        for row in dataset.iter_rows():
            pixels = np.asarray(row["pixels"], dtype=np.uint8)
            yield row["name"], int(row["start"]), pixels
            bar.update(steps[row["name"]] * len(pixels))


def _joined(parts: Mapping[int, np.ndarray]) -> np.ndarray:
    return np.concatenate([parts[start] for start in sorted(parts)])


def _given(student: Path, batch: Batch) -> dict[str, Any]:
    """What actors need, in Ray's object store; in a mapping, of which Ray passes the references on."""
    import ray

    return {"files": ray.put(packed(student)), "batch": ray.put(batch)}


def _chunk(batch: Batch) -> int:
    """Captions per unit of work."""
    _, height, width = batch.shape
    return min(CHUNK, max(1, CHUNK_CELLS // (height * width)))


def resources_of(gpu: bool) -> dict[str, Any]:
    """Resources of such an actor, as keyword arguments for Ray."""
    return {"num_gpus": 1} if gpu else {"num_cpus": 1}


def places(gpu: bool) -> int:
    """How many actors that compute with networks fit the cluster, one on each CPU or GPU."""
    import ray

    resources = ray.cluster_resources()
    if gpu:
        return max(1, int(resources.get("GPU", 0)))
    # Ray may have been told of more CPUs than there are (see `connect_ray`).
    return max(1, min(int(resources.get("CPU", 1)), (os.cpu_count() or 1) * len(ray.nodes())))
