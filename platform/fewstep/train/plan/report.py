"""A plan as a table for the terminal."""

from __future__ import annotations

from fewstep.train.plan.planner import Plan

GB = 1e9
"""Bytes of a gigabyte, as GPUs are sold."""

CHARACTERS_PER_TOKEN = 4
"""Of English text, about."""

WORDS = {"ema": "EMA"}
"""Fields of `Memory` that the table does not call by their own names."""


def plan_table(plan: Plan) -> str:
    """What a run costs, as plain text of several lines, and a remedy if it does not fit the machine's memory."""
    recipe, train, machine = plan.recipe, plan.recipe.train, plan.machine
    micro = recipe.data.batch_size // (machine.gpus * train.accumulate)
    chosen, other = ("with", "without") if train.activation_checkpointing else ("without", "with")
    rows = [
        f"  {WORDS.get(name, name):<20}{getattr(plan.memory, name) / GB:>8.2f} GB"
        f"{getattr(plan.otherwise, name) / GB:>16.2f} GB"
        for name in (*vars(plan.memory), "total")
    ]
    fits = plan.memory.total <= machine.memory_gb * GB
    verdict = "fits" if fits else f"does not fit {machine.memory_gb:g} GB: {_remedy(plan, micro)}"
    size = "x".join(map(str, plan.shape))
    seconds = 3600 * plan.hours / train.steps
    text_bytes = plan.captions * plan.tokens * CHARACTERS_PER_TOKEN
    operations = plan.student_operations + plan.teacher_operations
    return "\n".join(
        [
            f"{recipe.name} on {machine.gpus} x {machine.memory_gb:g} GB: {micro} samples per micro-batch, "
            f"{train.accumulate} of them on each GPU per step, latents {size}, {plan.tokens} tokens",
            "",
            f"parameters            {_amount(plan.parameters)}, of the student's own {_amount(plan.trained)}",
            f"memory per GPU        {chosen} checkpointing   {other} it",
            *rows,
            f"                      {verdict}",
            f"operations per step   {operations / 1e15:.3g} P "
            f"(student {plan.student_operations / 1e15:.3g}, teacher {plan.teacher_operations / 1e15:.3g})",
            f"storage               {_gigabytes(plan.cache)} of shards for {plan.captions:,} captions; streamed "
            f"into training {_gigabytes(text_bytes)} of text",
            f"time                  {plan.hours:.3g} h for {train.steps:,} steps of {seconds:.3g} s, at "
            f"{machine.utilisation:.0%} of {machine.tflops:g} TFLOPS per GPU",
        ]
    )


def _remedy(plan: Plan, micro: int) -> str:
    """The first change that helps a run that does not fit, from the one that costs least to the dearest."""
    train = plan.recipe.train
    if not train.activation_checkpointing and plan.otherwise.total <= plan.machine.memory_gb * GB:
        return "set train.activation_checkpointing=true"
    if micro > 1:
        return "raise train.accumulate"
    return "use more GPUs" if train.parallel == "fsdp" else "set train.parallel=fsdp"


def _amount(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _gigabytes(count: float) -> str:
    return f"{count / GB:,.0f} GB" if count >= 100 * GB else f"{count / GB:.2g} GB"
