"""Plans as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fewstep.config import Precision
from fewstep.models.precision import LIBRARIES
from fewstep.plan.serving import NO_FIT, ServingPlan
from fewstep.plan.training import Plan

GB = 1e9
"""Bytes of a gigabyte, as GPUs are sold."""

CHARACTERS_PER_TOKEN = 4
"""Of English text, about."""

WORDS = {"ema": "EMA"}
"""Fields of `Memory` that the table does not call by their own names."""


def plan_table(plan: Plan) -> str:
    """What a run costs, as plain text of several lines, and a remedy if it does not fit the machine's memory."""
    recipe, train, machine = plan.recipe, plan.recipe.train, plan.machine
    chosen, other = ("with", "without") if train.activation_checkpointing else ("without", "with")
    rows = [
        f"  {WORDS.get(name, name):<20}{getattr(plan.memory, name) / GB:>8.2f} GB"
        f"{getattr(plan.otherwise, name) / GB:>16.2f} GB"
        for name in (*vars(plan.memory), "total")
    ]
    fits = plan.memory.total <= machine.memory_gb * GB
    verdict = "fits" if fits else f"does not fit {machine.memory_gb:g} GB: {_remedy(plan)}"
    size = "x".join(map(str, plan.shape))
    seconds = 3600 * plan.hours / train.steps
    text_bytes = plan.captions * plan.tokens * CHARACTERS_PER_TOKEN
    return "\n".join(
        [
            f"{recipe.name} on {machine.gpus} x {machine.memory_gb:g} GB: {plan.micro_batch} samples per micro-batch, "
            f"{train.accumulate} of them on each GPU per step, latents {size}, {_conditions(plan)}",
            f"frozen weights in {train.precision}, computed as {'GPUs do' if train.gpu else 'CPUs do'}",
            "",
            f"parameters            {_amount(plan.parameters)}, of the student's own {_amount(plan.trained)}",
            f"memory per GPU        {chosen} checkpointing   {other} it",
            *rows,
            f"                      {verdict}",
            f"operations per step   {plan.operations / 1e15:.3g} P "
            f"(student {plan.student_operations / 1e15:.3g}, teacher {plan.teacher_operations / 1e15:.3g})",
            f"storage               {_gigabytes(plan.cache)} of shards for {plan.captions:,} captions; streamed "
            f"into training {_gigabytes(text_bytes)} of text",
            f"time                  {plan.hours:.3g} h for {train.steps:,} steps of {seconds:.3g} s, at "
            f"{machine.utilisation:.0%} of {machine.tflops:g} TFLOPS per GPU",
        ]
    )


COLUMNS = ("weights", "text_encoder", "autoencoder", "evaluation", "decoding", "tiled", "total")
"""Of the table of a service: fields of `ServingMemory`."""


def serving_table(plans: Sequence[ServingPlan], configured: Precision | None = None) -> str:
    """What a student takes in each precision, as plain text of several lines, and a remedy if it fits in none.

    Args:
        plans: of one student, as `plan_serving` gives them.
        configured: the precision that was chosen, whose row is marked; None: no mark.
    """
    first = plans[0]
    device = "a CPU" if first.gpu.on_cpu else f"a GPU of {first.gpu.memory_gb:g} GB"
    size = "x".join(map(str, first.shape))
    images = "1 image" if first.batch == 1 else f"{first.batch} images"
    head = "precision" + "".join(f"{name.replace('_', ' '):>14}" for name in COLUMNS) + f"{'per image':>14}"
    missing = [name for name in COLUMNS if getattr(first.memory, name) is None]
    notes = [
        f"GB; text encoder in {first.encoder_precision}, autoencoder in {first.autoencoder_precision}; total: weights "
        "of all parts, and the larger of evaluation and decoding"
    ]
    if missing:
        names = " and ".join(name.replace("_", " ") for name in missing)
        notes.append(f"not counted, as no configuration is found here: {names}")
    if not first.gpu.on_cpu:
        notes.append(
            f"time of {first.served.sampler.nfe} evaluations at {first.gpu.utilisation:.0%} of {first.gpu.tflops:g} "
            f"TFLOPS ({first.gpu.float32_tflops:g} in float32) and {first.gpu.bandwidth_tb:g} TB/s"
        )
    if all(plan.verdict == NO_FIT for plan in plans):
        notes.append(f"fits in no precision: {_serving_remedy(plans[-1])}")
    return "\n".join(
        [
            f"{first.served.name} on {device}: {images} at a time, latents {size}, {_conditions(first)}",
            "",
            head,
            *(_serving_row(plan) + (" (chosen)" if plan.precision == configured else "") for plan in plans),
            *notes,
        ]
    )


def _serving_row(plan: ServingPlan) -> str:
    amounts = [getattr(plan.memory, name) for name in COLUMNS]
    parts = "".join(f"{'?' if amount is None else f'{amount / GB:.2f}':>14}" for amount in amounts)
    seconds = "" if plan.gpu.on_cpu else f"{plan.seconds:.3g} s"
    return f"{plan.precision:<9}{parts}{seconds:>14}   {plan.verdict}"


def _serving_remedy(plan: ServingPlan) -> str:
    """The first change that helps a student that fits in no precision; `plan` is of the lowest."""
    memory, limit = plan.memory, plan.gpu.memory_gb * GB
    if plan.batch > 1:
        return "make fewer images at a time (--batch; in a configuration batching.max_batch_size)"
    if memory.total - (memory.text_encoder or 0) <= limit and plan.encoder_precision != "int4":
        return (
            "hold the text encoder in a lower precision (--encoder-precision; in a configuration "
            "engine.parts.text_encoder_precision)"
        )
    return "make smaller images, or use a larger device"


def _remedy(plan: Plan) -> str:
    """What makes a run fit that does not: settings that cost little first, then lower precisions and more GPUs."""
    if settings := _thrift(plan):
        return f"set {' and '.join(settings)}"
    train = plan.recipe.train
    if train.precision == "float32":
        return "set train.precision=bfloat16"
    if train.precision in LIBRARIES:
        return (
            "use larger GPUs"
            if train.precision == "int4"
            else "set train.precision=int4, or train.precision=bfloat16 with train.parallel=fsdp on several GPUs"
        )
    if plan.machine.gpus == 1:
        return "use more GPUs, or set train.precision=int8"
    return "use more GPUs" if train.parallel == "fsdp" else "set train.parallel=fsdp"


def _thrift(plan: Plan) -> list[str]:
    """Settings that together make a run fit without changing what it computes; none where they do not suffice."""
    recipe, memory, limit = plan.recipe, plan.memory, plan.machine.memory_gb * GB
    activations, settings = memory.activations, []
    if not recipe.train.activation_checkpointing and plan.otherwise.activations < activations:
        activations = plan.otherwise.activations
        settings.append("train.activation_checkpointing=true")
    standing, per_sample = memory.total - memory.activations, activations / plan.micro_batch
    savings = []
    if recipe.optimizer.type == "adam":
        savings.append(("optimizer.type=adam8bit", memory.optimizer * 3 // 4))
    if recipe.train.gpu and memory.ema:
        savings.append(("optimizer.ema_offload=true", memory.ema))
    for setting, saved in savings:
        if standing + per_sample > limit:
            standing -= saved
            settings.append(setting)
    if standing + per_sample > limit:
        return []
    fitting = int((limit - standing) / per_sample)  # samples at a time
    if fitting < plan.micro_batch:
        settings.append(
            f"train.accumulate={math.ceil(recipe.data.batch_size / (plan.machine.gpus * fitting))}"
        )
    return settings


def _conditions(plan: Plan | ServingPlan) -> str:
    """What each image is made of, in words."""
    images = f", reference images: {plan.references}" if plan.references else ""
    return f"{plan.tokens} tokens{images}"


def _amount(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _gigabytes(count: float) -> str:
    return f"{count / GB:,.0f} GB" if count >= 100 * GB else f"{count / GB:.2g} GB"
