"""Validation of a recipe before training: all that can't work is refused here, with a message of one sentence."""

from __future__ import annotations

import torch

from fewstep.data.datasets.bundled import open_data
from fewstep.data.schema import DatasetInfo
from fewstep.encoders.autoencoders import place_of
from fewstep.encoders.labels import class_names, is_labels
from fewstep.errors import UserError
from fewstep.evaluate.classifier import Classifier
from fewstep.evaluate.report import LEAST_CAPTIONS
from fewstep.models.adapters import lora_target_modules
from fewstep.models.dual_stream import counterparts
from fewstep.models.family import Family, Transformer
from fewstep.models.family_code import use_module
from fewstep.models.network import PolicyNetwork
from fewstep.models.precision import LIBRARIES, check_arithmetic, check_precision
from fewstep.models.registry import base_name, get_family
from fewstep.models.teacher import check_guidance, locate, open_teacher
from fewstep.models.teacher_folder import check_loras
from fewstep.student.adapter import check_adapter
from fewstep.student.resolve import resolve_student
from fewstep.tracking.address import check_reachable
from fewstep.train.adam8bit import check_torchao
from fewstep.train.parallel import check_sharding
from fewstep.train.recipe import (
    DistillRecipe,
    EvaluationConfig,
    OptimizerConfig,
    TeacherRecipe,
    TrainConfig,
    network_section,
)


def check(recipe: DistillRecipe | TeacherRecipe) -> DatasetInfo:
    """Refuse a recipe that can't work, before anything starts; returns its dataset.

    Raises:
        UserError: dataset, teacher, tracking address or cluster don't fit the recipe.
    """
    # First, because a user's file may register the family that the recipe names.
    if (module := network_section(recipe).module) is not None:
        use_module(module)
    info = open_data(recipe.data.path)
    _check_data(info, recipe)
    _check_precision(recipe)
    if isinstance(recipe, DistillRecipe):
        teacher = recipe.teacher
        # On the meta device: sizes and names are all that is checked, and a large teacher would take minutes to load.
        transformer, family, _ = open_teacher(teacher.path, teacher.family, teacher.embedded_guidance_scale)
        check_loras(locate(teacher.path), family, teacher.loras)
        _check_fit(info, transformer, family, teacher.path)
        check_guidance(family, transformer, teacher.guidance_scale, "teacher.guidance_scale")
        if (lora := recipe.student.lora) is not None:
            lora_target_modules(transformer, family, lora.targets)
        _check_start(recipe, transformer, family)
        _check_evaluation(recipe.evaluation, info)
    else:
        network = recipe.network
        if network.start is None:
            family = get_family(network.family)
            # Only names and shapes are checked: no memory for the weights.
            with torch.device("meta"):
                transformer = family.build(network.config)
        else:
            told = recipe.flow_matching.guidance_scale if recipe.guidance_distillation.teacher else None
            transformer, family, _ = open_teacher(network.start, network.family, told)
        _check_fit(info, transformer, family, network.start or network.family)
        check_guidance(
            family, transformer, recipe.flow_matching.guidance_scale, "flow_matching.guidance_scale"
        )
        _check_imitated(recipe, info, transformer, family)
    _check_optimizer(recipe.optimizer, transformer, family)
    check_reachable(recipe.tracking.uri)
    _check_cluster(recipe.train)
    return info


def _check_imitated(
    recipe: TeacherRecipe, info: DatasetInfo, transformer: Transformer, family: Family
) -> None:
    """Refuse guidance distillation if the network takes no guidance scale, or the teacher does not fit data or network.

    Raises:
        UserError: one of these.
    """
    imitated = recipe.guidance_distillation
    if imitated.teacher is None:
        return
    if not family.takes_guidance(transformer):
        raise UserError(
            f"guidance_distillation: a new network of the family {family.name!r} with this network.config takes no "
            "guidance scale: add guidance_embeds: true (families flux and flux2), or leave "
            "guidance_distillation.teacher null."
        )
    teacher, of_teacher, _ = open_teacher(imitated.teacher, imitated.family)
    _check_fit(info, teacher, of_teacher, imitated.teacher)
    if imitated.from_teacher:
        counterparts(transformer, teacher)


def _check_start(recipe: DistillRecipe, transformer: Transformer, family: Family) -> None:
    """Refuse a `student.start` that has another head, other adapters, or another base than the recipe's student.

    Raises:
        UserError: it has.
    """
    student = recipe.student
    if student.start is None:
        return
    # Built as training will build it (on the meta device), to compare names and shapes with the adapter's.
    network = PolicyNetwork(transformer, family, student.policy, student.lora, full=student.full)
    try:
        check_adapter(network, resolve_student(student.start, tracking_uri=recipe.tracking.uri).folder)
    except UserError as error:
        raise UserError(f"student.start: {error}") from None


def _check_data(info: DatasetInfo, recipe: DistillRecipe | TeacherRecipe) -> None:
    """Refuse a dataset without rows to train on, or without images where they are needed.

    Raises:
        UserError: it is one.
    """
    data_free = isinstance(recipe, DistillRecipe) and recipe.data_free
    if not info.has_latents and not data_free:
        # The objectives that can do without images, where they are told to.
        objective = recipe.objective if isinstance(recipe, DistillRecipe) else ""
        remedy = f", or set {objective}.data_free=true" if objective in ("imitation", "regression") else ""
        raise UserError(
            f"data.path: {info.root} holds prompts alone, and this training needs images: prepare a dataset with "
            f"images (fewstep prepare-data --source folder){remedy}."
        )
    info.buckets("train")  # refuses a dataset without training rows
    if (info.raw is None) == (recipe.data.encode == "stream"):
        kind, other = ("encoded", "shards") if info.raw is None else ("not encoded", "stream")
        raise UserError(
            f"data.encode={recipe.data.encode}: the rows of {info.root} are {kind}: set data.encode={other}, or "
            f"prepare another folder with --encode {recipe.data.encode}."
        )


def _check_fit(info: DatasetInfo, transformer: Transformer, family: Family, teacher: str) -> None:
    """Refuse a dataset with another autoencoder, encoder, set of classes or size than the network can take.

    Args:
        info: the dataset.
        transformer, family: of the network.
        teacher: what messages call the network.

    Raises:
        UserError: the dataset does not fit.
    """
    shapes = {shard.shape for shard in info.shards}
    channels, width = family.latent_channels(transformer), family.condition_width(transformer)
    patch, classes = family.patch(transformer), family.classes(transformer)
    rows, columns = family.multiples(transformer)
    if foreign := {shape[0] for shape in shapes} - {channels}:
        raise UserError(
            f"data.path: {info.root} holds latents of {foreign.pop()} channels (autoencoder "
            f"{info.encoding.autoencoder!r}), the teacher {teacher!r} takes {channels}: prepare the data with the "
            "teacher's own autoencoder."
        )
    # Texts for a network of classes, or classes for one of texts; a network without any condition takes both.
    if (classes is None) == is_labels(info.encoding.text_encoder) and (width or classes is not None):
        kind = "texts" if classes is not None else "classes"
        raise UserError(
            f"data.path: {info.root} holds {kind} ({info.encoding.text_encoder!r}), and the teacher {teacher!r} takes "
            f"{'classes' if classes is not None else 'texts'}: prepare the data with the teacher's own encoder."
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
    if info.encoding.references and not family.takes_references:
        raise UserError(
            f"data.path: the rows of {info.root} have reference images, and the family {family.name!r} takes none: "
            "choose a family for editing (qwen_image, flux2), or a dataset without references."
        )
    if uneven := [
        f"{shape[1]}x{shape[2]}" for shape in sorted(shapes) if shape[1] % rows or shape[2] % columns
    ]:
        of_frames = f"{family.frames} frames of " if family.frames > 1 else ""
        raise UserError(
            f"data.path: latents of {uneven[0]} can't be cut into the teacher's {of_frames}{patch}x{patch} patches: "
            "prepare the data at a size that is a multiple of the patch."
        )
    if (frames := place_of(info.encoding.autoencoder)[2] or 1) != family.frames:
        raise UserError(
            f"data.path: {info.root} holds videos of {frames} latent frames (autoencoder "
            f"{info.encoding.autoencoder!r}), the teacher {teacher!r} is asked for {family.frames}: set "
            f"teacher.family={base_name(family.name)}:{frames}, or prepare the data again."
        )
    most = family.largest_side(transformer)
    sides = {f"{s[1]}x{s[2]}": max(s[1] // family.frames, s[2]) for s in sorted(shapes)}
    if large := [size for size, side in sides.items() if most is not None and side > most]:
        raise UserError(
            f"data.path: latents of {large[0]} are larger than the {most}x{most} that the teacher {teacher!r} has "
            "positions for: prepare the data at a smaller size."
        )
    _check_pooled(info, transformer, family, teacher)


def _check_evaluation(settings: EvaluationConfig, info: DatasetInfo) -> None:
    """Refuse an evaluation of too few held-out rows, or of classes for which there is no classifier.

    Raises:
        UserError: it is one.
    """
    buckets = info.buckets("held_out")  # raises a UserError if the split has no rows
    most = max(sum(shard.rows for shard in shards) for shards in buckets.values())
    if settings.enabled and most < LEAST_CAPTIONS:
        raise UserError(
            f"evaluation: {info.root} holds out {most} rows, and an evaluation needs {LEAST_CAPTIONS} of one size: "
            "prepare the data again with more --held-out, or set evaluation.enabled=false."
        )
    by_class = settings.enabled and settings.criteria == "classes"
    if by_class and Classifier.bundled(info.encoding.text_encoder) is None:
        raise UserError(
            f"evaluation.criteria: there is no bundled classifier for the classes of {info.root} "
            f"({info.encoding.text_encoder!r}): set evaluation.criteria=quick."
        )


def _check_pooled(info: DatasetInfo, transformer: Transformer, family: Family, teacher: str) -> None:
    """Refuse a dataset whose vectors of whole captions have another width than the network takes (FLUX.1).

    Raises:
        UserError: they have.
    """
    # Without vectors in the dataset, `TextConditioning.summary` gives the network the mean token state.
    wanted = family.pooled_width(transformer)
    width = info.encoding.pooled_dim or info.encoding.token_dim
    if wanted not in (None, width):
        raise UserError(
            f"data.path: {info.root} holds whole captions as vectors of width {width} "
            f"({info.encoding.text_encoder!r}), the teacher {teacher!r} takes {wanted}: prepare the data with the "
            "teacher's own text encoders (--text-encoder flux:PIPELINE)."
        )


def _check_optimizer(settings: OptimizerConfig, transformer: Transformer, family: Family) -> None:
    """Refuse Muon for a network whose family names no blocks with matrices, and Adam of 8 bits without its library.

    Raises:
        UserError: it is one of these.
    """
    if settings.type == "adam8bit":
        check_torchao()
    blocks = family.blocks(transformer)
    if settings.type == "muon" and not any(p.ndim == 2 for block in blocks for p in block.parameters()):
        raise UserError(
            f"optimizer.type: muon moves the matrices of transformer blocks, and this {family.name} network names no "
            "block that has one: set optimizer.type=adam, or name its blocks in the family."
        )


def _check_precision(recipe: DistillRecipe | TeacherRecipe) -> None:
    """Refuse a precision that the machine, the number of workers or the recipe's kind can't do.

    Raises:
        UserError: it is asked for.
    """
    settings, field = recipe.train, "train.precision"
    precision = check_precision(settings.precision, field)
    if not settings.gpu:  # the driver may be a machine without the workers' GPUs
        check_arithmetic(precision, "cpu", field)
    if precision not in LIBRARIES:
        return
    if isinstance(recipe, TeacherRecipe):
        raise UserError(
            f"{field} {precision}: a teacher's weights are all trained: set it to bfloat16 or float32."
        )
    check_sharding(settings, settings.most_workers)


def _check_cluster(settings: TrainConfig) -> None:
    """Refuse more workers than the Ray cluster has CPUs and GPUs for.

    Raises:
        UserError: it has too few.
    """
    import ray

    # All of the cluster's resources, not those that are free now: other jobs may end, and Ray waits.
    resources = ray.cluster_resources()
    # An elastic run begins with the fewest, if there is no room for more.
    workers = settings.fewest_workers
    wanted = {"CPU": workers * settings.cpus_per_worker}
    if settings.gpu:
        wanted["GPU"] = float(workers)
    for kind, amount in wanted.items():
        available = resources.get(kind, 0.0)
        if amount > available:
            remedy = "lower train.cpus_per_worker" if kind == "CPU" else "set train.gpu=false"
            raise UserError(
                f"train.workers={workers} need {amount:g} {kind}s, the Ray cluster has {available:g}: "
                f"use fewer workers, or {remedy}, or add nodes."
            )
