"""Recipes: one typed, validated tree per run.

A recipe is a YAML file in `jobs/recipes/` (or anywhere); with `base: name` it says only what differs from
another, and `--set section.key=value` overrides single fields. Unknown and ill-typed keys are refused with
the nearest known name. The resolved recipe is logged to MLflow and stored in every checkpoint.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from fewstep.data.shipped import EMOJI_DATA
from fewstep.errors import UserError
from fewstep.models.heads import GMFlowSettings, PolicySettings
from fewstep.models.network import LoRASettings


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, docstrings under fields are their documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TeacherSection(Section):
    path: str = "emoji"
    """A bundled name, a diffusers folder, or a hub id; of the network itself, or of its pipeline."""
    family: str = "qwen_image"
    """Which family of networks it belongs to."""
    module: str | None = None
    """A Python file that registers that family, for a teacher of your own (docs/own_teacher.md)."""
    guidance: float = Field(3.0, ge=1)
    """Classifier-free guidance scale of its velocity; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Range of σ in which guidance acts."""
    embedded_guidance: float | None = Field(None, ge=0)
    """Guidance scale that a guidance-distilled network takes as an input (FLUX.1 dev: 3.5); null for all others."""
    orthogonal: float = Field(0.0, ge=0, le=1)
    """Share of the guidance direction's part parallel to x0 that is removed."""
    shift: float | None = Field(None, gt=0)
    """Time shift of its own sampler, with which the student is compared; null takes that of its card, or the
    student's."""

    @model_validator(mode="after")
    def _interval_ascends(self) -> TeacherSection:
        if not self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError("guidance_interval must be [least, largest] σ")
        return self


class StudentSection(Section):
    policy: PolicySettings = GMFlowSettings()
    """Policy head."""
    lora: LoRASettings | None = LoRASettings()
    """Adapters on the shared base; null for none."""
    full: bool = False
    """Train all weights beside a frozen copy of the teacher (the paper's ImageNet students), with lora null; otherwise
    head and adapters alone."""

    start: str | None = None
    """A student to go on from, instead of from the teacher itself: a student's folder, `models:/name@alias`, or a
    published adapter's folder, with the head and the adapters that are described here."""

    @model_validator(mode="after")
    def _adapters_or_all(self) -> StudentSection:
        if self.full and self.lora is not None:
            raise ValueError(
                "student.full trains all weights and leaves none to adapt: set student.lora=null"
            )
        return self


class ImitationSection(Section):
    """π-ID, METHOD.md section 4."""

    data_free: bool = False
    """Walk the student's own trajectories from noise (Algorithm 3; captions suffice) instead of entering segments
    from noised data (Algorithm 2). One sample of a batch then is one walk: nfe segments instead of one."""
    nfe: int = Field(4, ge=1)
    """Network evaluations of the student."""
    more_nfes: tuple[PositiveInt, ...] = ()
    """Further counts of evaluations that the same student learns, so that one model serves 2 to 8 steps. One of all
    counts is drawn per sample; with data_free they take turns over the steps."""
    final_step_scale: float = Field(0.5, gt=0)
    """Size of the last segment relative to the others, and so its share of the training."""
    shift: float = Field(2.0, gt=0)
    """Time shift of the student's segments; need not be the teacher's."""
    intermediate_states: int = Field(2, ge=1)
    """States per segment at which the teacher is asked."""
    window: int = Field(3, ge=0)
    """Micro window in substeps; under 2 the instantaneous velocity is used."""
    substeps: int = Field(128, ge=1)
    """Policy substeps per unit of raw time."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout of mixture components in the rollout."""
    temperature: PositiveFloat | Literal["auto"] = 1.0
    """Mixture temperature at inference, not on the last step; "auto" = clamp(0.1·(nfe − 1), 0, 1)."""
    final_temperature: float = Field(1.0, gt=0, le=1)
    """Mixture temperature of the last step; below 1 it takes speckle out of students of one or two evaluations."""
    final_temperature_below: float = Field(1.0, gt=0, le=1)
    """σ below which the last step has that temperature; above, the mixture is as predicted, and keeps its variety."""
    loss_scale: float = Field(30.0, gt=0)
    """Factor on the mean squared error."""
    mixing_steps: int = Field(0, ge=0)
    """Optimizer steps over which the teacher's own steps give way to the student's rollouts within a segment, from
    all to none (scheduled trajectory mixing, for guidance-distilled teachers); 0 is the student alone throughout."""


class FlowMatchingSection(Section):
    """Plain flow matching, for training a teacher."""

    shift: float = Field(2.0, gt=0)
    """Time shift of training and of the sampler."""
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of captions replaced by the null condition, so that guidance works."""
    guidance: float = Field(3.0, ge=1)
    """Guidance scale of sample grids, written to the teacher's card."""


class GuidanceDistillationSection(Section):
    """For a network that takes the guidance scale as an input: another teacher's guided velocity instead of data's."""

    teacher: str | None = None
    """The teacher to imitate: a bundled name, a folder or a hub id, on the same data; null is plain flow matching."""
    family: str = "qwen_image"
    """Its family."""
    scales: tuple[float, float] = (1.0, 4.0)
    """Least and largest guidance scale; one is drawn per sample."""
    from_teacher: bool = False
    """Start from the teacher's weights, as FLUX.1 dev did; a FLUX can start from a Qwen-Image network of its size."""

    @model_validator(mode="after")
    def _scales_ascend(self) -> GuidanceDistillationSection:
        if not 0 <= self.scales[0] <= self.scales[1]:
            raise ValueError("scales must be [least, largest], from 0 on")
        return self


class NetworkSection(Section):
    """A new network, or more training for an existing one."""

    family: str = "qwen_image"
    """Which family of networks to build."""
    module: str | None = None
    """A Python file that registers that family, for a network of your own."""
    config: dict[str, Any] = Field(
        default_factory=lambda: {
            "patch_size": 2, "in_channels": 12, "out_channels": 3, "num_layers": 5, "attention_head_dim": 32,
            "num_attention_heads": 4, "joint_attention_dim": 384, "axes_dims_rope": [8, 12, 12],
        }
    )  # fmt: skip
    """Keyword arguments of the family's network class."""
    start: str | None = None
    """A teacher folder (or bundled name) to start from instead of random weights."""


class DataSection(Section):
    path: str = EMOJI_DATA
    """Folder or s3:// address of prepared shards (jobs/prepare_data.py); data/emoji16 and data/fashion28 are prepared
    when missing."""
    batch_size: int = Field(48, ge=1)
    """Samples per optimizer step, over all workers and accumulation steps."""


class OptimizerSection(Section):
    """Adam without weight decay, as in the paper; or Muon where all of a small model's weights are trained."""

    type: Literal["adam", "muon"] = "adam"
    """muon: the matrices of the transformer's blocks move by orthogonalised momentum, all else by Adam."""
    rate: float = Field(1e-3, gt=0)
    """Adam's learning rate after warm-up."""
    muon_rate: float = Field(0.02, gt=0)
    """Muon's, the spectral norm of a step (more for matrices that are higher than wide); scheduled as Adam's is."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["none", "linear"] = "linear"
    """What the rate does after warm-up: stay, or fall linearly to zero at the last step."""
    decay_from: float = Field(0.0, ge=0, lt=1)
    """Share of all steps after which the decay begins."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's averaging factors."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(50.0, gt=0)
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema_gamma: float = Field(7.0, gt=0)
    """γ of the power schedule of the weight average: decay (1 − 1/t)^(γ+1)."""


class TrainSection(Section):
    steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    seed: int = 0
    """One seed, one result."""
    workers: int = Field(1, ge=1)
    """Ray Train workers; each takes its share of every batch."""
    parallel: Literal["fsdp", "ddp"] = "fsdp"
    """How workers share the model: fsdp, each holds a shard of the weights, gathered block by block; ddp, each holds
    all of them and gradients are averaged once per step, which is faster where the model is small."""
    gpu: bool = False
    """Whether each worker gets a GPU."""
    threads: int = Field(2, ge=1)
    """CPU threads of each worker's tensor arithmetic."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """Logical CPUs that each worker holds; leave some free for the data pipeline."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute precision (gradients are reduced, and weights kept, in float32); bfloat16 wants a GPU, or a CPU that
    multiplies it in hardware (AVX512-BF16, AMX)."""
    activation_checkpointing: bool = False
    """Recompute blocks in backward instead of keeping their activations."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """Compile transformer blocks with this backend of torch.compile (inductor, on GPUs); null runs them as they are."""
    checkpoint_every: int = Field(250, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay on disk."""
    log_every: int = Field(10, ge=1)
    """Steps between progress lines and metric points."""
    sample_every: int = Field(250, ge=0)
    """Steps between sample grids; 0 for none."""
    max_failures: int = Field(3, ge=0)
    """How often dead workers are replaced before the run gives up."""
    storage: str = "runs"
    """Folder or s3:// address of checkpoints and results."""


class TrackingSection(Section):
    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking address: a server's http(s) address, or sqlite:///file."""
    experiment: str = "fewstep"
    """MLflow experiment."""
    model: str = "emoji-4step"
    """Name of the registered model."""
    alias: str = "champion"
    """Alias that the new version gets."""

    @model_validator(mode="after")
    def _mlflow_takes_the_names(self) -> TrackingSection:
        # It would refuse them itself, after the training.
        if not re.fullmatch(r"[^/:.%\"']+", self.model):
            raise ValueError(f"model {self.model!r} must not hold any of / : . % \" ' (MLflow's rule)")
        if not re.fullmatch(r"(?!latest$|v\d+$)[\w-]+", self.alias, re.IGNORECASE):
            raise ValueError(
                f"alias {self.alias!r} must be of letters, digits, _ and -, not 'latest' nor 'v1' (MLflow's rule)"
            )
        return self


class EvaluationSection(Section):
    captions: int = Field(384, ge=3)
    """Held-out captions to evaluate on."""
    reference_steps: int = Field(64, ge=1)
    """Teacher steps of the reference."""
    ladder: tuple[int, ...] = (2, 4, 8, 16)
    """Euler steps of the teacher to compare with."""
    promise: Literal["quick", "full", "classes"] = "quick"
    """Which of the documented promises the verdict checks: of the quick run, of the long one, or of class-conditional
    students."""
    enabled: bool = True
    """Whether the job evaluates at its end."""

    @model_validator(mode="after")
    def _ladder_has_the_rungs_of_the_promise(self) -> EvaluationSection:
        if missing := {"quick": {4, 8}, "full": {4, 8, 16}}.get(self.promise, set()) - set(self.ladder):
            raise ValueError(
                f"the {self.promise} promise compares with {sorted(missing)} Euler steps: add to ladder"
            )
        return self


class _Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the recipe; run names begin with it."""
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _batch_divides(self) -> _Recipe:
        parts = self.train.workers * self.train.accumulate
        if self.data.batch_size % parts:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} must be a multiple of "
                f"train.workers × train.accumulate = {parts}"
            )
        return self


class DistillRecipe(_Recipe):
    """Distil a teacher into a few-step policy student."""

    name: str = Field("emoji_qwen_4nfe", pattern=r"^[A-Za-z0-9_.-]+$")
    teacher: TeacherSection = TeacherSection()
    student: StudentSection = StudentSection()
    imitation: ImitationSection = ImitationSection()
    evaluation: EvaluationSection = EvaluationSection()


class TeacherRecipe(_Recipe):
    """Train a flow-matching teacher."""

    name: str = Field("emoji_teacher", pattern=r"^[A-Za-z0-9_.-]+$")
    network: NetworkSection = NetworkSection()
    flow_matching: FlowMatchingSection = FlowMatchingSection()
    guidance_distillation: GuidanceDistillationSection = GuidanceDistillationSection()


def network_section(recipe: DistillRecipe | TeacherRecipe) -> TeacherSection | NetworkSection:
    """The part of a recipe that names the network's family."""
    return recipe.teacher if isinstance(recipe, DistillRecipe) else recipe.network


Recipe = TypeVar("Recipe", DistillRecipe, TeacherRecipe)


def load_recipe(
    kind: type[Recipe], source: str | Mapping[str, Any] | None, overrides: Sequence[str], folder: Path
) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        kind: which recipe.
        source: a YAML file, or the name of one in `folder`; a recipe's tree; None for the defaults.
        overrides: `section.key=value` strings, values in YAML.
        folder: where named recipes live (`jobs/recipes`).

    Raises:
        UserError: no such recipe, or a key that is unknown or ill-typed.
    """
    tree = _read(source, folder, (source,)) if isinstance(source, str) else copy.deepcopy(dict(source or {}))
    for override in overrides:
        _set(tree, override)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(kind, error)) from None


def document(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, documentation) of every field, for help pages."""
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from document(type(default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(default), field.description or ""


def _read(source: str, folder: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    file = Path(source) if Path(source).suffix in {".yaml", ".yml"} else folder / f"{source}.yaml"
    if not file.exists():
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        near = difflib.get_close_matches(source, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
        raise UserError(f"--recipe: there is no recipe {source!r} ({file}); {hint}")
    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"--recipe: {file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"--recipe: {file} is no recipe: it must hold keys and values, as those in {folder} do."
        )
    if base := tree.pop("base", None):
        if base in seen:
            raise UserError(f"--recipe: {file} is based on itself ({' → '.join((*seen, base))}).")
        return _merged(_read(base, folder, (*seen, base)), tree)
    return tree


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, section by section; lists and values are replaced whole."""
    both_sections = {
        key: _merged(base[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return base | changes | both_sections


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes section.key=value, for example optimizer.rate=1e-4; got {override!r}.")
    *sections, last = key.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override}: {section!r} is a value, not a section.")
        tree = child
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not YAML; put text in quotes.") from None
    # YAML 1.1 reads 1e-4 as a string; people write learning rates so.
    tree[last] = _number(parsed) if isinstance(parsed, str) else parsed


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [name for name, _, _ in document(kind)]
        near = difflib.get_close_matches(key, known, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "see --help for all keys."
        return f"recipe: unknown key {key!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return f"recipe: {key or kind.__name__}: {message}{value}."
