"""The driver's side of a run: everything that can be refused is refused here, then Ray Train takes over."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from fewstep.data.labels import class_names
from fewstep.data.schema import DatasetInfo
from fewstep.data.storage import Storage
from fewstep.data.stream import read_split
from fewstep.errors import UserError
from fewstep.models.dual_stream import counterparts
from fewstep.models.family import Family
from fewstep.models.family_code import code_of, use_module
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import open_teacher
from fewstep.train.parallel import cpu_has_bfloat16
from fewstep.train.recipe import (
    EMOJI_DATA,
    FASHION_DATA,
    DataSection,
    DistillRecipe,
    NetworkSection,
    TeacherRecipe,
    TeacherSection,
    TrainSection,
)
from fewstep.train.worker import EXPORT, WorkerJob, train_worker

RECORDS = Path(".fewstep") / "runs"
"""What a run must find again when it is resumed: RUN.json (its MLflow run, its storage) and RUN.yaml (its recipe)."""

PREVIEW_CAPTIONS = 32
"""Held-out captions in the sample grids."""


@dataclass(frozen=True)
class TrainedModel:
    """What a run leaves behind."""

    run_name: str
    folder: Path
    """The exported model, on this machine."""
    checkpoint: str
    """Address of the last checkpoint."""
    mlflow_run: str
    metrics: dict[str, float]


def check(recipe: DistillRecipe | TeacherRecipe) -> DatasetInfo:
    """Refuse what can't work, before anything starts.

    Raises:
        UserError: dataset, teacher, tracking address or cluster don't fit the recipe.
    """
    from fewstep.tracking.address import check_reachable

    if (module := _network(recipe).module) is not None:
        use_module(module)
    info = open_data(recipe.data)
    shape = _check_data(info, recipe)
    _check_precision(recipe.train)
    if isinstance(recipe, DistillRecipe):
        teacher = recipe.teacher
        transformer, family, _ = open_teacher(teacher.path, teacher.family, teacher.embedded_guidance)
        _check_fit(info, shape, transformer, family, teacher.path)
        _check_pooled(info, transformer, teacher.path)
        _check_start(recipe, transformer, family)
        info.buckets("held_out")
    else:
        network = recipe.network
        if network.start is None:
            family = get_family(network.family)
            with torch.device("meta"):
                transformer = family.build(network.config)
        else:
            transformer, family, _ = open_teacher(network.start, network.family)
        _check_fit(info, shape, transformer, family, network.start or network.family)
        _check_imitated(recipe, info, shape, transformer, family)
    check_reachable(recipe.tracking.uri)
    _check_cluster(recipe.train)
    return info


def _check_imitated(
    recipe: TeacherRecipe,
    info: DatasetInfo,
    shape: tuple[int, int, int],
    transformer: nn.Module,
    family: Family,
) -> None:
    """Refuse guidance distillation of a network without the input, or from a teacher of other data or another kind."""
    imitated = recipe.guidance_distillation
    if imitated.teacher is None:
        return
    if not getattr(getattr(transformer, "config", None), "guidance_embeds", False):
        raise UserError(
            f"guidance_distillation: a new network of the family {family.name!r} with this network.config takes no "
            "guidance scale: add guidance_embeds: true (families flux and flux2), or leave "
            "guidance_distillation.teacher null."
        )
    teacher, of_teacher, _ = open_teacher(imitated.teacher, imitated.family)
    _check_fit(info, shape, teacher, of_teacher, imitated.teacher)
    if imitated.from_teacher:
        counterparts(transformer, teacher)


def _check_start(recipe: DistillRecipe, transformer: nn.Module, family: Family) -> None:
    """Refuse a student to go on from that has another head, other adapters, or another base."""
    from fewstep.export.adapter import check_adapter
    from fewstep.export.pipeline import student_folder

    student = recipe.student
    if student.start is None:
        return
    network = PolicyNetwork(transformer, family, student.policy, student.lora, full=student.full)
    try:
        check_adapter(network, student_folder(student.start, recipe.tracking.uri))
    except UserError as error:
        raise UserError(f"student.start: {error}") from None


def open_data(section: DataSection) -> DatasetInfo:
    """The dataset of a recipe; at the shipped recipes' own paths it is prepared first, once.

    At any other path nothing is: a mistyped one must be refused, not trained on something else.
    """
    from fewstep.data.encode import EMOJI, FASHION, prepare
    from fewstep.data.fashion import fashion_mnist
    from fewstep.data.schema import MANIFEST
    from fewstep.data.sources import emoji_set

    shipped = {
        EMOJI_DATA: ("the bundled emoji set", emoji_set, EMOJI),
        FASHION_DATA: ("Fashion-MNIST", fashion_mnist, FASHION),
    }
    if section.path in shipped and Storage.at(section.path).read(MANIFEST) is None:
        what, source, settings = shipped[section.path]
        print(f"preparing {what} in {section.path} (once)", flush=True)
        prepare(source(), section.path, settings, encoders=2, report=lambda line: print(line, flush=True))
    return DatasetInfo.open(section.path)


def fit(recipe: DistillRecipe | TeacherRecipe, run_name: str | None = None) -> TrainedModel:
    """Train on the connected Ray cluster, or continue the run of that name.

    Args:
        recipe: what to train.
        run_name: name of the run and of its folder under `train.storage`; if it exists there, it is
            continued from its last checkpoint under the same MLflow run.

    Raises:
        UserError: see `check`; the loss became non-finite; or workers died more often than allowed.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from fewstep.data.encoder import load_encoder
    from fewstep.export.pipeline import read_student_card, write_card
    from fewstep.tracking.run import Tracker
    from fewstep.tracking.version import run_tags

    info, settings = check(recipe), recipe.train
    storage = _absolute(settings.storage)
    run_name = run_name or f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    record = RECORDS / f"{run_name}.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    tracker = Tracker.start(
        uri=recipe.tracking.uri,
        experiment=recipe.tracking.experiment,
        run_name=run_name,
        params=recipe.model_dump(mode="json"),
        tags=run_tags() | {"recipe": recipe.name},
        spool=spool(),
        run_id=known.get("mlflow_run"),
    )
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"mlflow_run": tracker.run_id, "storage": storage}))
    record.with_suffix(".yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    tracker.log_json(recipe.model_dump(mode="json"), "recipe.json")
    tracker.flush()

    job = WorkerJob(
        recipe=recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": info.root})}),
        null=load_encoder(info.encoding.text_encoder).null(),
        preview=_preview(info),
        code=code_of(_network(recipe).family),
        home=str(Path.cwd()),
        tracking={
            "uri": tracker.uri,
            "experiment": recipe.tracking.experiment,
            "run_name": run_name,
            "params": {},
            "tags": {},
            "spool": spool(),
            "run_id": tracker.run_id,
        },
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if settings.gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name=run_name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            worker_runtime_env={"env_vars": worker_environment(settings)},
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        tracker.finish("FAILED")
        raise UserError(
            f"run {run_name} failed: {_root_cause(error)}; "
            f"continue it from its last checkpoint with --resume {run_name}."
        ) from error
    if (stopped := result.return_value) is not None:
        tracker.finish("FAILED")
        raise UserError(f"run {run_name} stopped: {stopped}")
    folder = Path(".fewstep") / "models" / run_name
    _fetch_export(result.checkpoint, folder)
    if isinstance(
        recipe, DistillRecipe
    ):  # workers were told the data's absolute address, which is nobody's business
        write_card(replace(read_student_card(folder), recipe=recipe.model_dump(mode="json")), folder)
    tracker.finish()
    metrics = {k: float(v) for k, v in (result.metrics or {}).items() if isinstance(v, (int, float))}
    return TrainedModel(run_name, folder, result.checkpoint.path, tracker.run_id, metrics)


def _network(recipe: DistillRecipe | TeacherRecipe) -> TeacherSection | NetworkSection:
    """The part of a recipe that names the network's family."""
    return recipe.teacher if isinstance(recipe, DistillRecipe) else recipe.network


def check_resumable(recipe: DistillRecipe | TeacherRecipe, run_name: str) -> None:
    """Refuse to continue a run that is not there: under a mistyped name it would begin anew.

    Raises:
        UserError: neither this folder nor the recipe's storage knows the run.
    """
    storage = recipe.train.storage
    if (RECORDS / f"{run_name}.json").exists() or Storage.at(f"{storage}/{run_name}").list():
        return
    near = difflib.get_close_matches(run_name, [record.stem for record in RECORDS.glob("*.json")], 1)
    raise UserError(
        f"--resume: there is no run {run_name!r} in {storage}; "
        + (f"did you mean {near[0]!r}?" if near else "give the name that the run printed when it began.")
    )


def _check_data(info: DatasetInfo, recipe: DistillRecipe | TeacherRecipe) -> tuple[int, int, int]:
    data_free = isinstance(recipe, DistillRecipe) and recipe.imitation.data_free
    if not info.has_latents and not data_free:
        remedy = ", or set imitation.data_free=true" if isinstance(recipe, DistillRecipe) else ""
        raise UserError(
            f"data.path: {info.root} holds prompts alone, and this training needs images: prepare a dataset with "
            f"images (jobs/prepare_data.py --source folder){remedy}."
        )
    info.check_world("train", recipe.train.workers)
    return next(iter(info.buckets("train")))


def _check_fit(
    info: DatasetInfo, shape: tuple[int, int, int], transformer: nn.Module, family: Family, teacher: str
) -> None:
    channels, width = family.latent_channels(transformer), family.condition_width(transformer)
    patch, classes = family.patch(transformer), family.classes(transformer)
    if shape[0] != channels:
        raise UserError(
            f"data.path: {info.root} holds latents of {shape[0]} channels (autoencoder {info.encoding.autoencoder!r}), "
            f"the teacher {teacher!r} takes {channels}: prepare the data with the teacher's own autoencoder."
        )
    if width and info.encoding.token_dim != width:
        raise UserError(
            f"data.path: {info.root} holds token states of width {info.encoding.token_dim} "
            f"({info.encoding.text_encoder!r}), the teacher {teacher!r} takes {width}: prepare the data with the "
            "teacher's own text encoder."
        )
    if classes is not None and classes != (known := len(class_names(info.encoding.text_encoder))):
        raise UserError(
            f"data.path: {info.root} has {known} classes ({info.encoding.text_encoder!r}), the teacher {teacher!r} "
            f"knows {classes}: prepare the data with the teacher's own classes."
        )
    if any(side % patch for side in shape[1:]):
        raise UserError(
            f"data.path: latents of {shape[1]}x{shape[2]} can't be cut into the teacher's {patch}x{patch} patches: "
            "prepare the data at a size that is a multiple of the patch."
        )


def _check_pooled(info: DatasetInfo, transformer: nn.Module, teacher: str) -> None:
    """FLUX.1's class takes a vector of the whole caption: the encoder's own, or else the mean token state."""
    wanted = getattr(getattr(transformer, "config", None), "pooled_projection_dim", None)
    width = info.encoding.pooled_dim or info.encoding.token_dim
    if wanted not in (None, width):
        raise UserError(
            f"data.path: {info.root} holds whole captions as vectors of width {width} "
            f"({info.encoding.text_encoder!r}), the teacher {teacher!r} takes {wanted}: prepare the data with the "
            "teacher's own text encoders (--text-encoder flux:PIPELINE)."
        )


def _check_precision(settings: TrainSection) -> None:
    if settings.precision == "bfloat16" and not settings.gpu and not cpu_has_bfloat16():
        raise UserError(
            "train.precision: this CPU has no bfloat16 arithmetic, and would be 50 to 100 times slower than in "
            "float32: set train.precision=float32, or train.gpu=true."
        )
    if settings.precision == "bfloat16" and not settings.gpu and settings.activation_checkpointing:
        # Blocks that run again in backward do so outside of the mode that keeps attention in float32.
        raise UserError(
            "train.activation_checkpointing: on CPUs it works in float32 alone: set it to false, or "
            "train.precision=float32."
        )


def _check_cluster(settings: TrainSection) -> None:
    import ray

    resources = ray.cluster_resources()
    wanted = {"CPU": settings.workers * settings.cpus_per_worker}
    if settings.gpu:
        wanted["GPU"] = float(settings.workers)
    for kind, amount in wanted.items():
        available = resources.get(kind, 0.0)
        if amount > available:
            remedy = "lower train.cpus_per_worker" if kind == "CPU" else "set train.gpu=false"
            raise UserError(
                f"train.workers={settings.workers} need {amount:g} {kind}s, the Ray cluster has {available:g}: "
                f"use fewer workers, or {remedy}, or add nodes."
            )


def worker_environment(settings: TrainSection) -> dict[str, str]:
    """What must stand in a worker's environment before its process starts.

    Threads that wait spin only shortly: beside any other process on the same cores (Ray's own, the data
    pipeline), libgomp's default makes a step up to ten times slower. Freed memory is kept instead of handed
    back to the system and faulted in again at every operation: 15 % of a small model's step. And lines a
    worker prints are printed once: Ray Train's print patch repeats them.
    """
    keep = str(1 << 33)
    return {
        "OMP_NUM_THREADS": str(settings.threads),
        "GOMP_SPINCOUNT": "1000",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": keep,
        "MALLOC_TRIM_THRESHOLD_": keep,
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    }


def _preview(info: DatasetInfo) -> dict[str, Any]:
    split = "held_out" if "held_out" in info.splits else "train"
    shape = next(iter(info.buckets(split)))
    batch = read_split(info.root, split, PREVIEW_CAPTIONS, shape=shape)
    return {
        "conditioning": batch.conditioning,
        "shape": shape,
        "autoencoder": info.encoding.autoencoder,
    }


def _fetch_export(checkpoint: Any, folder: Path) -> None:
    with checkpoint.as_directory() as local:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(Path(local) / EXPORT, folder)


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error.__cause__ or error}
    first = next(iter(failures.values()))
    return f"{type(first).__name__}: {str(first).strip().splitlines()[-1] if str(first).strip() else 'worker died'}"


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def spool() -> Path:
    """Where what MLflow has not taken yet is kept."""
    return Path(".fewstep/spool").absolute()
