"""Images of many prompts without a server: a Ray Data job from a list of prompts to a folder or bucket.

Prompts are cut into units of work. A unit writes its images and then, as its last act, its part of the manifest, so
that a job that was ended goes on with the units that have no part. An image that was written twice is the same both
times, as it depends on nothing but its prompt, its seed and the settings; with another `batch_size`, or on another kind
of machine, rounding may move pixels by one level.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.config import Config, Precision
from fewstep.errors import UserError
from fewstep.evaluate.generation import places, resources_of
from fewstep.storage import Storage
from fewstep.student import read_student_card
from fewstep.student.travel import packed, unpacked

SETTINGS = "job.json"
"""Name of the file with the job's settings."""
MANIFEST = "manifest"
"""Folder of the manifest's parts, which pyarrow and others read as one dataset."""
IMAGES_PER_FOLDER = 1000
"""So that no folder becomes slow to list."""
WRITERS = 8
"""Threads of each actor that compress and write images while the next ones are generated."""


class BatchConfig(Config):
    """What a job generates, beside its prompts."""

    images_per_prompt: int = 1
    """Images of each prompt; image k of prompt i has number i · images_per_prompt + k."""
    seed: int = 0
    """Of image 0; image n has seed + n."""
    nfe: int | None = None
    """Network evaluations; None: as trained."""
    height: int | None = None
    """In pixels; None: as trained."""
    width: int | None = None
    """Likewise."""
    format: Literal["png", "webp", "jpeg"] = "png"
    """Of the files; webp is lossless."""
    batch_size: int = 16
    """Images that are generated at a time."""
    unit: int = 256
    """Images of a unit of work."""
    precision: Precision = "float32"
    """Of the weights."""


@dataclass(frozen=True)
class BatchResult:
    """What a job has come to."""

    images: int
    """In the manifest."""
    refused: int
    """Prompts' images that the student can't make; the manifest has the reason."""
    made: int
    """In this run."""


def generate_batch(
    student: Path, prompts: Sequence[str], config: BatchConfig, out: str, *, gpu: bool = False
) -> BatchResult:
    """Generate the images of all prompts on the connected Ray cluster, or go on with a job that was ended.

    Writes `images/0000/000000000.png` and so on, and `manifest/part-….parquet`: index, prompt, seed, file, SHA-256 of
    the file, and the reason where a prompt was refused.

    Args:
        student: exported folder on this machine.
        prompts: one or more.
        config: what is generated.
        out: folder, or `s3://…`, that every node reaches.
        gpu: whether to generate on GPUs.

    Raises:
        UserError: the folder has another job, or the student or the folder can't be used.
    """
    if not prompts:
        raise UserError("--prompts: there is no prompt.")
    if read_student_card(student).references:
        raise UserError(
            "--model: this student edits reference images, of which a list of prompts has none: use fewstep generate "
            "--image."
        )
    storage, total = Storage.at(out), len(prompts) * config.images_per_prompt
    _settle(storage, student, prompts, config)
    done = _done(storage)
    starts = [start for start in range(0, total, config.unit) if start not in done]
    made = 0
    if starts:
        for count in _worked(student, prompts, config, storage, starts, gpu):
            made += count
    storage.sweep()  # of what runs that were ended left half written
    images, refused = _counted(storage)
    return BatchResult(images, refused, made)


def _settle(storage: Storage, student: Path, prompts: Sequence[str], config: BatchConfig) -> None:
    """Write the job's settings, or compare them with those that are there."""
    weights = sorted(file for file in student.iterdir() if file.suffix == ".safetensors")
    settings = {
        "student": [hashlib.sha256(file.read_bytes()).hexdigest() for file in weights],
        "sampler": read_student_card(student).sampler.model_dump(mode="json"),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        **config.model_dump(
            mode="json", exclude={"batch_size"}
        ),  # which moves no pixel by more than one level
    }
    if (known := storage.read(SETTINGS)) is None:
        storage.write(SETTINGS, json.dumps(settings, indent=2).encode())
        return
    before = json.loads(known)
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        raise UserError(
            f"--out: {storage.root} has a job with other settings ({', '.join(changed)}): give the same ones to go on "
            "with it, or another folder."
        )


def _done(storage: Storage) -> set[int]:
    """Numbers of the first images of units that are done."""
    parts = (name for name in storage.list() if name.startswith(f"{MANIFEST}/part-"))
    return {int(name.removeprefix(f"{MANIFEST}/part-").partition(".")[0]) for name in parts}


def _worked(
    student: Path,
    prompts: Sequence[str],
    config: BatchConfig,
    storage: Storage,
    starts: Sequence[int],
    gpu: bool,
) -> Iterator[int]:
    """Images of each unit of work, as soon as it is done."""
    import ray
    import ray.data
    from tqdm.auto import tqdm

    total = len(prompts) * config.images_per_prompt
    work = []
    for start in starts:
        numbers = range(start, min(start + config.unit, total))
        texts = [prompts[number // config.images_per_prompt] for number in numbers]
        work.append({"start": start, "prompts": json.dumps(texts)})
    generator: Any = _Generator  # Ray's annotations know classes without constructor arguments alone
    dataset = ray.data.from_items(work, override_num_blocks=len(work)).map(
        generator,
        # In a mapping, of which Ray passes the reference on
        fn_constructor_args=({"files": ray.put(packed(student))}, config, storage, "cuda" if gpu else "cpu"),
        compute=ray.data.ActorPoolStrategy(size=min(places(gpu), len(work))),
        **resources_of(gpu),
    )
    dataset.context.enable_progress_bars = False
    left = sum(min(config.unit, total - start) for start in starts)
    with tqdm(total=left, unit=" images", desc="generating", mininterval=5) as bar:
        for row in dataset.iter_rows():
            bar.update(row["images"])
            yield int(row["images"])


class _Generator:
    """A pipeline in a Ray Data actor, which generates and writes one unit of work at a time."""

    def __init__(self, given: dict[str, Any], config: BatchConfig, storage: Storage, device: str) -> None:
        import ray
        import torch

        if device == "cpu":
            torch.set_num_threads(1)  # one actor per CPU
            torch.set_flush_denormal(True)  # CPUs compute numbers so close to zero a hundred times slower
        self._pipe = unpacked(ray.get(given["files"]), device, config.precision)
        self._config, self._storage = config, storage
        self._writers = ThreadPoolExecutor(WRITERS)

    def __call__(self, work: dict[str, Any]) -> dict[str, Any]:
        config, start, prompts = self._config, int(work["start"]), json.loads(work["prompts"])
        refusals = self._pipe.text_encoder.refusals(prompts)
        numbers = [number for number, refusal in enumerate(refusals) if refusal is None]
        written: dict[int, Future[tuple[str, str]]] = {}
        for first in range(0, len(numbers), config.batch_size):
            chosen = numbers[first : first + config.batch_size]
            images = self._pipe(
                [prompts[number] for number in chosen],
                num_inference_steps=config.nfe,
                seed=[config.seed + start + number for number in chosen],
                height=config.height,
                width=config.width,
            ).images
            for number, image in zip(chosen, images, strict=True):
                written[number] = self._writers.submit(self._write, start + number, image)
        rows = []
        for number, (prompt, refusal) in enumerate(zip(prompts, refusals, strict=True)):
            file, digest = written[number].result() if number in written else (None, None)
            rows.append(
                {
                    "index": start + number,
                    "prompt": prompt,
                    "seed": config.seed + start + number,
                    "file": file,
                    "sha256": digest,
                    "refused": None if refusal is None else refusal[1],
                }
            )
        self._storage.write(f"{MANIFEST}/part-{start:09d}.parquet", _parquet(rows))
        return {"images": len(written)}

    def _write(self, index: int, image: Any) -> tuple[str, str]:
        """Write an image; its file and SHA-256."""
        stream, kind = io.BytesIO(), self._config.format
        image.save(stream, kind, **({"lossless": True} if kind == "webp" else {}))
        file = f"images/{index // IMAGES_PER_FOLDER:04d}/{index:09d}.{'jpg' if kind == 'jpeg' else kind}"
        self._storage.write(file, stream.getvalue())
        return file, hashlib.sha256(stream.getvalue()).hexdigest()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [("index", pa.int64()), ("prompt", pa.string()), ("seed", pa.int64()), ("file", pa.string()),
         ("sha256", pa.string()), ("refused", pa.string())]
    )  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink)
    return sink.getvalue()


def _counted(storage: Storage) -> tuple[int, int]:
    """Images and refused ones in the manifest."""
    import pyarrow.parquet as pq

    images = refused = 0
    for name in storage.list():
        if name.startswith(f"{MANIFEST}/part-") and (content := storage.read(name)) is not None:
            column = pq.read_table(io.BytesIO(content), columns=["file"])["file"]
            refused += column.null_count
            images += len(column) - column.null_count
    return images, refused
