"""A grid: variants of a recipe, the seeds that each is trained with, and what is claimed about them."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from fewstep.config import Config, checked_settings
from fewstep.errors import UserError
from fewstep.evaluate.figures import FIGURES
from fewstep.plan import Machine, make_plan
from fewstep.text import read_settings
from fewstep.train.recipe import DistillRecipe, load_recipe
from fewstep.train.runs import EXPORTS

GRIDS = Path(str(files("fewstep.recipes"))) / "grids"
"""Folder of the named grids."""


def _known(name: str) -> str:
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r}, only {', '.join(FIGURES)}")
    return name


FigureName = Annotated[str, AfterValidator(_known)]
"""One of the figures of a student."""


class Before(Config):
    """A training whose student a variant goes on from."""

    set: tuple[str, ...] = ()
    """Settings, as changes of the grid's base."""
    share: float = Field(0.7, gt=0, lt=1)
    """Share of the operations that it takes; the variant itself has the rest."""


class Variant(Config):
    """One way to train, as changes of the grid's base."""

    about: str
    """What it is, for the tables."""
    set: tuple[str, ...] = ()
    """Settings as the command line takes them, `section.key=value`."""
    before: Before | None = None
    """What is trained first; null begins with a new student. A search is about the variant's own training alone."""
    search: dict[str, tuple[float, ...]] | None = None
    """Values to try for it in place of the grid's; as many combinations."""


class Search(Config):
    """Settings that are looked for before the seeds are trained, for each variant in the same way."""

    set: dict[str, tuple[float, ...]]
    """Setting → values; every combination of them is tried."""
    share: float = Field(0.3, gt=0, le=1)
    """Share of the steps that a try takes."""
    seed: int = 1000
    """Of all tries; none of the grid's own."""
    figure: FigureName = "paired_distance"
    """The one with the best of this figure is taken."""


class Claim(Config):
    """A statement about two variants, and what the paper says of it."""

    claim: str
    """As a sentence."""
    paper: str
    """The paper's own figures."""
    variant: str
    """The variant that it is about."""
    against: str
    """The one that it is compared with."""
    figure: FigureName
    """What is compared."""
    expect: Literal["better", "worse", "equal"]
    """What the paper found the variant to be."""
    tolerance: float = Field(0.05, ge=0)
    """Largest difference, as a share of the other's figure, that still is equal."""


class Grid(Config):
    """What is compared."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Name of the grid; runs' names begin with it."""
    about: str
    """What it is about, as a sentence."""
    base: str
    """Name of the recipe that variants change, or its file."""
    set: tuple[str, ...] = ()
    """Changes of the base for all variants."""
    steps: int = Field(ge=1)
    """Optimizer steps of the base; others take as many as have the same number of operations."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that each variant is trained with."""
    search: Search | None = None
    """What is looked for first; null for nothing."""
    variants: dict[str, Variant]
    """Name → what it changes. The first is the one that others are compared with in the tables."""
    figures: tuple[FigureName, ...] = ("kid_teacher", "paired_distance", "diversity")
    """Figures in the table."""
    claims: tuple[Claim, ...] = ()
    """What is judged."""

    @model_validator(mode="after")
    def _claims_are_about_variants(self) -> Grid:
        for name in self.variants:
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(f"variant {name!r} must be of a to z, 0 to 9 and _")
        for claim in self.claims:
            for name in (claim.variant, claim.against):
                if name not in self.variants:
                    raise ValueError(f"a claim is about variant {name!r}, which is not in variants")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError("seeds must be different numbers, and one at least")
        if self.search is not None and self.search.seed in self.seeds:
            raise ValueError("search.seed must be none of seeds, so that no seed has seen the choice")
        for name, variant in self.variants.items():
            if variant.search is None:
                continue
            if self.search is None or len(_combinations(variant.search)) != len(
                _combinations(self.search.set)
            ):
                raise ValueError(
                    f"variant {name!r} must have as many combinations to try as the grid's search"
                )
        return self

    def tries(self, variant: str) -> tuple[tuple[str, ...], ...]:
        """The combinations of settings that are tried for a variant; a single empty one without a search."""
        if self.search is None:
            return ((),)
        own = self.variants[variant].search
        return _combinations(self.search.set if own is None else own)

    def searched(self) -> list[Cell]:
        """The cells of the search; none where there is nothing to choose from."""
        return [
            Cell(self.name, variant, self.search.seed, tried, is_search=True)
            for variant in self.variants
            for tried in self.tries(variant)
            if self.search is not None and len(self.tries(variant)) > 1
        ]

    def cells(self, chosen: dict[str, tuple[str, ...]]) -> list[Cell]:
        """The cells that are compared, all variants of a seed before the next seed.

        Args:
            chosen: variant → what the search found for it; variants without a choice are left out.
        """
        return [
            Cell(self.name, variant, seed, chosen[variant])
            for seed in self.seeds
            for variant in self.variants
            if variant in chosen
        ]

    def stages(self, cell: Cell, **tracking: str) -> tuple[DistillRecipe, ...]:
        """The recipes that a cell trains, each with as many steps as its share of the base's compute pays for.

        Args:
            cell: which one.
            tracking: settings of `TrackingConfig` to change.

        Returns:
            What the cell's variant has before it, if anything, and its own.

        Raises:
            UserError: a setting is unknown or not allowed, or the teacher can't be found.
        """
        share = self.search.share if self.search is not None and cell.is_search else 1.0
        own, before = self._changes(cell), self.variants[cell.variant].before
        if before is None:
            return (self._sized(own, share, cell, cell.run_name, tracking),)
        # Each cell has one of its own, as cells may be trained at the same time.
        first = self._sized(
            (*self.set, *before.set), share * before.share, cell, f"{cell.run_name}-before", tracking
        )
        started = (*own, f"student.start={EXPORTS / first.name}")
        return first, self._sized(started, share * (1 - before.share), cell, cell.run_name, tracking)

    def recipe(self, cell: Cell, **tracking: str) -> DistillRecipe:
        """The last of a cell's stages, whose student is measured."""
        return self.stages(cell, **tracking)[-1]

    def operations(self, cell: Cell) -> int:
        """Operations of the networks in a cell's training."""
        before = self.variants[cell.variant].before
        changes = [self._changes(cell)] if before is None else [(*self.set, *before.set), self._changes(cell)]
        return sum(
            stage.train.steps * _each_step(self.base, one)
            for stage, one in zip(self.stages(cell), changes, strict=True)
        )

    def _sized(
        self, changes: tuple[str, ...], share: float, cell: Cell, name: str, tracking: dict[str, str]
    ) -> DistillRecipe:
        """The recipe of some changes, with a share of the base's compute."""
        recipe = load_recipe(DistillRecipe, self.base, changes)
        paid = share * self.steps * _each_step(self.base, self.set)
        steps = max(1, round(paid / _each_step(self.base, changes)))
        # Schedules of a fixed number of steps are shares of the base's training, as those of the tries are.
        scaled = [f"{key}={max(1, round(number * steps / self.steps))}" for key, number in _schedules(recipe)]
        tracked = [f"tracking.{key}={value}" for key, value in tracking.items()]
        last = [f"train.steps={steps}", f"train.seed={cell.seed}", *tracked]
        whole = load_recipe(DistillRecipe, self.base, [*changes, *scaled, *last])
        # A run of a changed grid is another one, and does not go on from the checkpoints of the former.
        return whole.model_copy(update={"name": f"{name}-{digest(whole)[:6]}"})

    def _changes(self, cell: Cell) -> tuple[str, ...]:
        """What a cell changes of the base, but for its seed and schedules."""
        return (*self.set, *self.variants[cell.variant].set, *cell.found)


def _each_step(base: str, changes: tuple[str, ...]) -> int:
    """Operations of an optimizer step of a recipe with some changes."""
    # Settings of an optimizer, and where a student begins, change no operation, and need no plan of their own.
    other = ("optimizer.", "student.start=")
    return _planned(base, tuple(one for one in changes if not one.startswith(other)))


@functools.cache
def _planned(base: str, changes: tuple[str, ...]) -> int:
    recipe = load_recipe(DistillRecipe, base, changes)
    # On one machine of any kind: operations don't depend on it.
    alone = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "float32"})})
    return make_plan(alone, Machine(gpus=1, memory_gb=1.0)).operations


def _schedules(recipe: DistillRecipe) -> list[tuple[str, int]]:
    """Settings that are numbers of optimizer steps."""
    named = {
        "optimizer.warmup_steps": recipe.optimizer.warmup_steps,
        "imitation.mixing_steps": recipe.imitation.mixing_steps,
        "consistency.warmup_steps": recipe.consistency.warmup_steps,
        "meanflow.warmup_steps": recipe.meanflow.warmup_steps,
    }
    return [(name, number) for name, number in named.items() if number]


def _combinations(values: dict[str, tuple[float, ...]]) -> tuple[tuple[str, ...], ...]:
    """Every combination of some settings' values, as the command line takes them."""
    return tuple(
        itertools.product(*([f"{key}={value:g}" for value in several] for key, several in values.items()))
    )


@dataclass(frozen=True)
class Cell:
    """One training of a grid."""

    grid: str
    """Name of the grid."""
    variant: str
    """Name of the variant."""
    seed: int
    """Of its training."""
    found: tuple[str, ...] = ()
    """Settings that the search found, or that are tried."""
    is_search: bool = False
    """Whether it is a try of the search."""

    @property
    def name(self) -> str:
        """Unique within the grid, and fit for a file."""
        pairs = (setting.partition("=") for setting in self.found)
        tried = "".join(f"-{key.rpartition('.')[2]}{value}" for key, _, value in pairs)
        return f"{self.variant}-search{tried}" if self.is_search else f"{self.variant}-seed{self.seed}"

    @property
    def run_name(self) -> str:
        """What the name of its run begins with."""
        return f"{self.grid}-{self.name}"


def load_grid(source: str) -> Grid:
    """Read a grid.

    Args:
        source: a YAML file, or the name of one in `GRIDS`.

    Raises:
        UserError: there is no such grid, a key is unknown, or a value is not allowed.
    """
    file = Path(source) if Path(source).suffix in {".yaml", ".yml"} else GRIDS / f"{source}.yaml"
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in GRIDS.glob("*.yaml")))
        raise UserError(f"--grid: there is no grid {source!r} ({file}); known are {known}.")
    try:
        tree = yaml.safe_load(read_settings(file, "--grid"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--grid: {file} is not valid YAML: {' '.join(str(error).split())}.") from None
    grid = checked_settings(Grid, tree, f"--grid {file.name}", "docs/commands/ablate.md lists all keys")
    for variant in grid.variants.values():
        # A wrong setting is told before any training.
        load_recipe(DistillRecipe, grid.base, [*grid.set, *variant.set])
        if variant.before is not None:
            load_recipe(DistillRecipe, grid.base, [*grid.set, *variant.before.set])
    return grid


def digest(recipe: DistillRecipe) -> str:
    """A hash of what determines a recipe's result: two cells with the same one need not be trained twice."""
    tree = recipe.model_dump(mode="json")
    shaping = {key: value for key, value in tree.items() if key not in {"name", "tracking", "health"}}
    # Where the run is kept, and how often it says something, changes no result; `precision: auto` is told as what it
    # was on the machine that trained.
    for key in ("storage", "checkpoint_every", "keep_checkpoints", "log_every", "sample_every", "precision"):
        shaping["train"].pop(key)
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
