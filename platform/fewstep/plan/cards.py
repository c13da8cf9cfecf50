"""Which teacher trains and serves on which card: the table of docs/gpus.md, which this module prints.

python -m fewstep.plan.cards
"""

from __future__ import annotations

from collections.abc import Iterator

from fewstep.config import Precision
from fewstep.models.planned import lower_on_meta
from fewstep.models.precision import LIBRARIES
from fewstep.plan.memory import standing_memory
from fewstep.plan.serving import GPU, Served, plan_serving
from fewstep.plan.training import measure, new_student
from fewstep.train.recipe import DistillRecipe, load_recipe

CARDS = (24, 48, 80, 141)
"""Sizes of cards in GB of 10⁹ bytes. Cards have some percent more, which the CUDA context and gaps take."""

NUMBERS = (1, 2, 8)
"""Of cards that train together."""

HELD: dict[Precision, str] = {"bfloat16": "bf16", "int8": "int8", "int4": "int4"}
"""Precisions, the highest first → their names in the table."""

TOKENS = 512
"""Per caption."""

PATCHES = 64
"""Image tokens per side, of an image of a megapixel."""

SETTINGS = ("train.gpu=true", "optimizer.type=adam8bit", "optimizer.ema_offload=true")
"""Of the recipes: what makes trainings small."""

TEACHERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Qwen-Image (20 B)": ("qwen_image_4nfe", ()),
    "FLUX.1 dev (12 B)": ("flux_4nfe", ()),
    "FLUX.2 dev (32 B)": ("flux2_4nfe", ()),
    "FLUX.2 klein (9 B)": (
        "flux2_klein_4nfe",
        ("teacher.path=black-forest-labs/FLUX.2-klein-base-9B",),
    ),
    "FLUX.2 klein (4 B)": (
        "flux2_klein_4nfe",
        ("teacher.path=black-forest-labs/FLUX.2-klein-base-4B",),
    ),
    "Stable Diffusion 3.5 (8 B)": ("sd35_4nfe", ()),
    "Qwen-Image 2.1 (7 B)": ("qwen_image21_4nfe", ()),
    "LongCat-Image (6 B)": ("longcat_4nfe", ()),
    "Z-Image (6 B)": ("z_image_4nfe", ()),
}
"""Teacher → the recipe that distils it, and what is overridden there."""


def cards_table() -> str:
    """The highest precision in which each teacher is served and trained, per size and number of cards, in Markdown."""
    head = ["", *(f"{size} GB" for size in CARDS)]
    return "\n".join(map(_line, [head, ["---"] * len(head), *rows(TEACHERS)]))


def rows(teachers: dict[str, tuple[str, tuple[str, ...]]]) -> list[list[str]]:
    """The table's rows of some teachers, by their cells.

    Args:
        teachers: as `TEACHERS`.
    """
    lines = []
    for teacher, (source, overrides) in teachers.items():
        peaks = dict(_peaks(load_recipe(DistillRecipe, source, [*SETTINGS, *overrides])))
        for what in ("serve", *(f"train on {number}" for number in NUMBERS)):
            cells = [_highest({p: peaks[what, p] for p in HELD}, size) for size in CARDS]
            lines.append([f"{teacher}: {what}", *cells])
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _highest(peaks: dict[Precision, int], size: int) -> str:
    return next((name for precision, name in HELD.items() if peaks[precision] <= size * 1e9), "–")


def _peaks(recipe: DistillRecipe) -> Iterator[tuple[tuple[str, Precision], int]]:
    """(what is done, precision) → bytes on each card, for images of a megapixel and micro-batches of one."""
    served, teacher = Served.recipe(recipe), new_student(recipe)
    side = PATCHES * teacher.family.patch(teacher.transformer)
    for precision in HELD:
        [plan] = plan_serving(
            served, GPU(0), side=side, tokens=TOKENS, encoder_precision=precision, precisions=[precision]
        )
        yield ("serve", precision), plan.memory.in_tiles
        # FSDP does not shard quantised weights: then every card holds all of them.
        parallel = "ddp" if precision in LIBRARIES else "fsdp"
        train = recipe.train.model_copy(update={"precision": precision, "parallel": parallel})
        chosen = recipe.model_copy(update={"train": train})
        network = new_student(chosen)
        lower_on_meta(network, precision)
        standing = {number: standing_memory(network, chosen, number).total for number in NUMBERS}
        network.transformer.enable_gradient_checkpointing()
        shape = network.channels, side, side
        activations = measure(network, chosen, 1, shape, TOKENS).activations
        for number in NUMBERS:
            yield (f"train on {number}", precision), standing[number] + activations


if __name__ == "__main__":
    print(cards_table())
