"""Recipes: all settings of a run, as one typed and validated tree.

A recipe is a YAML file in `fewstep.recipes` or elsewhere. With `base: name` it has only what differs from another
recipe; `--set section.key=value` overrides single fields. Unknown keys are refused with the most similar known one, and
values of a wrong type with the reason. Keys from before fewstep 0.2 are read, with a line that tells their new names.
The resolved recipe is logged to MLflow and stored in every checkpoint.
"""

from __future__ import annotations

import copy
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, PositiveInt, model_validator

from fewstep.config import Config, Precision, checked_settings
from fewstep.data.datasets import EMOJI_DATA, SHIPPED_DATA, streamed
from fewstep.data.stream_config import OPEN_SHARDS, CacheConfig, EncodersConfig, Reading
from fewstep.distill import (
    ConsistencyConfig,
    DMD2Config,
    ImitationConfig,
    MeanFlowConfig,
    RegressionConfig,
)
from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep.models.adapters import LoRAConfig
from fewstep.models.heads import GMFlowConfig, PolicyConfig
from fewstep.models.teacher_folder import LoRAFile
from fewstep.text import read_settings
from fewstep.tracking.aliases import CHALLENGER, alias_fault
from fewstep.train.health import HealthConfig
from fewstep.train.overrides import override
from fewstep.train.share import BatchShare

RECIPES = Path(str(files("fewstep.recipes")))
"""Folder of the named recipes."""

RENAMED = {
    "imitation.nfe": "sampler.nfe",
    "imitation.more_nfes": "sampler.more_nfes",
    "imitation.final_step_scale": "sampler.final_step_scale",
    "imitation.shift": "sampler.shift",
    "imitation.substeps": "sampler.substeps",
    "imitation.temperature": "sampler.temperature",
    "imitation.final_temperature": "sampler.final_temperature",
    "imitation.final_temperature_below": "sampler.final_temperature_below",
    "imitation.dropout": "imitation.gm_dropout",
    "teacher.guidance": "teacher.guidance_scale",
    "teacher.embedded_guidance": "teacher.embedded_guidance_scale",
    "flow_matching.guidance": "flow_matching.guidance_scale",
    "optimizer.rate": "optimizer.lr",
    "optimizer.muon_rate": "optimizer.muon_lr",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "evaluation.ladder": "evaluation.baseline_steps",
    "evaluation.promise": "evaluation.criteria",
}
"""Keys from before fewstep 0.2 → their names now; values are the same."""


class TeacherConfig(TeacherSamplerConfig):
    """The frozen network to imitate, its guidance and its sampler."""

    path: str = "emoji"
    """A bundled name, a diffusers folder, or a hub id; of the network itself, or of its pipeline."""
    family: str = "qwen_image"
    """Name of the network's family; for videos with their number of latent frames, wan:21."""
    module: str | None = None
    """A Python file that registers that family, for a teacher of your own (docs/tutorials/own_teacher.md)."""
    loras: tuple[LoRAFile, ...] = ()
    """LoRAs that are folded into the network before distillation, as `[{path: style.safetensors, scale: 0.8}]`: files,
    folders or hub ids, with keys in the style of diffusers, peft or kohya."""

    @property
    def sampler(self) -> TeacherSamplerConfig:
        """The teacher's guidance and sampler without its path and family, as a student's card has them."""
        return TeacherSamplerConfig(
            **{name: getattr(self, name) for name in TeacherSamplerConfig.model_fields}
        )


class StudentConfig(Config):
    """The student's own parts: policy head and adapters, or all weights."""

    policy: PolicyConfig = GMFlowConfig()
    """Policy head."""
    lora: LoRAConfig | None = LoRAConfig()
    """Low-rank adapters on the base that it shares with its teacher; null for none."""
    full: bool = False
    """Train all weights, beside a frozen copy of the teacher (as the paper's ImageNet students), with lora null;
    otherwise only head and adapters are trained."""

    start: str | None = None
    """A student to start from, instead of from the teacher itself: a student's folder, `models:/name@alias`, or the
    folder of a published adapter. Its head and adapters must be those that are described here."""

    @model_validator(mode="after")
    def _adapters_or_all(self) -> StudentConfig:
        if self.full and self.lora is not None:
            raise ValueError(
                "student.full trains all weights and leaves none to adapt: set student.lora=null"
            )
        return self


class FlowMatchingConfig(Config):
    """Plain flow matching, for training a teacher."""

    shift: float = Field(2.0, gt=0)
    """Time shift of training and of the sampler."""
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of conditions replaced by the null condition, so that classifier-free guidance is possible."""
    guidance_scale: float = Field(3.0, ge=1)
    """Guidance scale of sample grids; also written to the teacher's card."""


class GuidanceDistillationConfig(Config):
    """For a network that takes the guidance scale as an input: it learns another teacher's guided velocity."""

    teacher: str | None = None
    """The teacher to imitate: a bundled name, a folder or a hub id; for the same data. Null is plain flow matching."""
    family: str = "qwen_image"
    """Name of that teacher's family."""
    scales: tuple[float, float] = (1.0, 4.0)
    """Smallest and largest guidance scale; each sample gets a random one between them."""
    from_teacher: bool = False
    """Start from the teacher's weights, as FLUX.1 dev did; a FLUX can start from a Qwen-Image network of its size."""

    @model_validator(mode="after")
    def _scales_ascend(self) -> GuidanceDistillationConfig:
        if not 0 <= self.scales[0] <= self.scales[1]:
            raise ValueError("scales must be [least, largest], from 0 on")
        return self


class NetworkConfig(Config):
    """The network to train: a new one, or an existing teacher."""

    family: str = "qwen_image"
    """Name of the network's family."""
    module: str | None = None
    """A Python file that registers that family, for a network of your own."""
    config: dict[str, Any] = Field(
        default_factory=lambda: {
            "patch_size": 2, "in_channels": 12, "out_channels": 3, "num_layers": 5, "attention_head_dim": 32,
            "num_attention_heads": 4, "joint_attention_dim": 384, "axes_dims_rope": [8, 12, 12],
        }
    )  # fmt: skip
    """Keyword arguments of the network's class, for a new network."""
    start: str | None = None
    """A teacher folder (or bundled name) to start from instead of random weights."""


class DataConfig(Config):
    """The training data."""

    path: str = EMOJI_DATA
    """Folder or s3:// address of a prepared dataset (fewstep prepare-data); data/emoji64, data/emoji16 and
    data/fashion28 are prepared if they don't exist."""
    encode: Literal["shards", "stream"] = "shards"
    """shards: captions and images were encoded when the dataset was prepared. stream: they are encoded while the
    training runs, of a dataset prepared with --encode stream, which is captions and images alone."""
    encoders: EncodersConfig = EncodersConfig()
    """With encode: stream, the actors that do it and their resources; on any node of the cluster."""
    cache: CacheConfig | None = None
    """With encode: stream, a bounded cache of what was encoded, as `{path: /scratch/cache, max_gb: 200}`; null for
    none."""
    batch_size: int = Field(48, ge=1)
    """Samples per optimizer step, over all workers and accumulation steps."""
    open_shards: int = Field(OPEN_SHARDS, ge=1)
    """Shards that a batch takes samples of, where there are as many. More mix better and take more memory; with a
    multiple of the number of workers, no shard is read by two of them."""
    reading: Reading = "tasks"
    """Who reads encoded shards. tasks: Ray Data's, on any node that has room. threads: each training worker's own,
    which copies each sample once instead of three times, on the worker's node."""

    @model_validator(mode="before")
    @classmethod
    def _shipped_data_have_a_folder_of_each_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("encode") == "stream":
            path = data.get("path", EMOJI_DATA)
            return {**data, "path": streamed(path) if path in SHIPPED_DATA else path}
        return data


class OptimizerConfig(Config):
    """Adam, by default without weight decay as in the paper; or Muon, for small models with all weights trained."""

    type: Literal["adam", "adam8bit", "muon"] = "adam"
    """adam8bit: Adam with averages of 8 bits, which take a quarter of the memory (for GPUs: on CPUs it is slow; needs
    torchao). muon: the matrices of transformer blocks are updated by orthogonalised momentum, all other weights by
    Adam."""
    lr: float = Field(1e-3, gt=0)
    """Adam's learning rate after warm-up."""
    muon_lr: float = Field(0.02, gt=0)
    """Muon's learning rate, the spectral norm of an update (more for matrices with more rows than columns); it follows
    the same schedule as Adam's."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["none", "linear"] = "linear"
    """Learning rate after warm-up: constant, or falling linearly to zero at the last step."""
    decay_from: float = Field(0.0, ge=0, lt=1)
    """Share of all steps after which the learning rate begins to fall."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of its averages of gradients and of their squares."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on matrices."""
    max_grad_norm: float = Field(50.0, gt=0)
    """Largest gradient norm; larger gradients are scaled down to it."""
    clip_from: int = Field(1, ge=1)
    """Step from which gradients are scaled down; in the published configurations that of the warm-up's end."""
    ema_gamma: float = Field(7.0, gt=0)
    """γ of the power schedule of the EMA of the weights: decay (1 − 1/t)^(γ+1)."""
    ema_from: int = Field(1, ge=1)
    """Step from which the EMA averages; before, it equals the weights. In the published configurations the warm-up's
    end."""
    ema_offload: bool = False
    """Keep the EMA of the weights in the host's memory instead of the GPU's, through which it passes at each step."""


class TrainConfig(Config):
    """How the training runs on the cluster."""

    steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    seed: int = 0
    """Seed of all random numbers: the same seed gives the same result."""
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of Ray Train workers; each takes its share of every batch. [fewest, most] for a cluster that grows and
    shrinks: a run begins and goes on with as many as there is room for, and the number changes no batch."""
    parallel: Literal["fsdp", "ddp"] = "fsdp"
    """How workers share the model. fsdp: each holds a part of the weights, which are gathered block by block. ddp: each
    holds all of them, and gradients are averaged once per step, which is faster for small models."""
    gpu: bool = False
    """Whether each worker gets a GPU."""
    threads: int = Field(2, ge=1)
    """CPU threads that each worker computes with."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """Logical CPUs that each worker reserves in Ray; leave some for the data pipeline."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches of each worker per optimizer step; fewer, of the same size, where more than the fewest workers
    train."""
    precision: Precision = "float32"
    """How frozen weights are held: float32; bfloat16; int8 or int4, which FSDP does not shard. Blocks compute in
    bfloat16 with all but the first, for which a CPU needs AVX512-BF16 or AMX; trained weights stay float32. auto: at
    first bfloat16 where the machine that starts the run has it, else float32; a run that is resumed keeps its own."""
    activation_checkpointing: bool = False
    """Compute blocks again in backward instead of keeping their activations."""
    compile: Literal["inductor", "aot_eager"] | None = None
    """Backend of torch.compile for transformer blocks (inductor, on GPUs); null does not compile them."""
    checkpoint_every: int = Field(250, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints that are kept; older ones are deleted."""
    log_every: int = Field(10, ge=1)
    """Steps between progress lines and metric points."""
    sample_every: int = Field(250, ge=0)
    """Steps between sample grids; 0 for no grids."""
    max_failures: int = Field(3, ge=0)
    """How often the run is restarted after workers have died, before it fails."""
    wait_minutes: float = Field(15.0, gt=0)
    """How long, in all, the run waits for room for its workers, as when a node has gone or an autoscaler has yet to
    bring one, before it fails. It waits in attempts of Ray Train's own, of a minute or two."""
    storage: str = "runs"
    """Folder or s3:// address of checkpoints and results."""

    @model_validator(mode="before")
    @classmethod
    def _precision_of_this_machine(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("precision") == "auto":
            from fewstep.models.precision import cpu_has_bfloat16

            fast = data.get("gpu") or cpu_has_bfloat16()
            return {**data, "precision": "bfloat16" if fast else "float32"}
        return data

    @model_validator(mode="after")
    def _workers_ascend(self) -> TrainConfig:
        if self.fewest_workers > self.most_workers:
            raise ValueError(f"workers must be a number or [fewest, most], not {list(self.worker_range)}")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @property
    def fewest_workers(self) -> int:
        """Fewest workers, for which memory is planned."""
        return self.worker_range[0]

    @property
    def most_workers(self) -> int:
        """Most workers."""
        return self.worker_range[1]


class TrackingConfig(Config):
    """MLflow's address, and the names under which the run and its model are stored there."""

    uri: str = "sqlite:///mlflow.db"
    """MLflow's tracking address: a server's http(s) address, or sqlite:///file."""
    experiment: str = "fewstep"
    """Name of the MLflow experiment."""
    parent_run: str | None = None
    """Id of the MLflow run below which this one is shown, as those of a grid are (`fewstep ablate`)."""
    model: str = "emoji-4step"
    """Name of the registered model."""
    alias: str = "champion"
    """Alias that the new version of the model gets, and that is served."""
    promote: Literal["criteria", "always"] = "criteria"
    """criteria: only a version that keeps the acceptance criteria (evaluation.criteria) gets that alias, or the first
    one, without which nothing could be served; others get the alias `challenger`, and a tag with the reason. always:
    every version gets it."""

    @model_validator(mode="after")
    def _mlflow_takes_the_names(self) -> TrackingConfig:
        # MLflow itself would refuse them only after the training.
        if not re.fullmatch(r"[^/:.%\"']+", self.model):
            raise ValueError(f"model {self.model!r} must not hold any of / : . % \" ' (MLflow's rule)")
        if (fault := alias_fault(self.alias)) is not None:
            raise ValueError(fault)
        if self.alias == CHALLENGER:
            raise ValueError(f"alias {CHALLENGER!r} is that of versions which are not served: choose another")
        return self


class EvaluationConfig(Config):
    """How the student is evaluated at the end of its training."""

    captions: int = Field(384, ge=3)
    """Number of held-out captions that the evaluation uses."""
    reference_steps: int = Field(64, ge=1)
    """Euler steps of the teacher for the reference images."""
    baseline_steps: tuple[int, ...] = (2, 4, 8, 16)
    """The baseline: numbers of Euler steps of the teacher that the student is compared with."""
    solvers: tuple[Literal["heun", "dpmpp", "unipc"], ...] = ()
    """Further solvers of the teacher's ODE, each compared with at as many evaluations (Heun's method at one less where
    their number is even)."""
    criteria: Literal["quick", "full", "classes"] = "quick"
    """Acceptance criteria that are checked: of the quick run, of the long one, or of class-conditional students."""
    features: str = "efficientnet"
    """Network of the features: efficientnet; inception:FILE, the TorchScript file of Inception-v3 that the FIDs of
    StyleGAN and EDM are made with; clip:MODEL or dinov2:MODEL, a folder or hub id of transformers'."""
    clip: str | None = None
    """CLIP model, a folder or hub id, for CLIP scores and retrieval; null for none."""
    lpips: str | None = None
    """TorchScript file of VGG16 with LPIPS's weights (StyleGAN's vgg16.pt); null for none."""
    scores: tuple[str, ...] = ()
    """Scores of one's own as module:function, from images (N, H, W, 3) uint8 and captions to N numbers, such as of
    HPSv2 or VQAScore (docs/commands/evaluate.md)."""
    images_per_caption: int = Field(0, ge=0)
    """Images of each of the first 32 captions, for the diversity per prompt; 0 for none, and otherwise two at least."""
    training_images: int = Field(0, ge=0)
    """Training images among which those that the student and the reference generate are looked for; 0 for none."""
    enabled: bool = True
    """Whether the job evaluates at its end."""
    every: int = Field(0, ge=0)
    """Steps between measurements of the paired distance to the teacher's pictures on 32 held-out captions, while the
    run trains; the best student is kept, and registered where it is clearly better than the last. 0 for none."""

    @model_validator(mode="after")
    def _one_image_has_no_diversity(self) -> EvaluationConfig:
        if self.images_per_caption == 1:
            raise ValueError(
                "images_per_caption must be 0, or 2 and more: one image of a caption has no diversity"
            )
        return self

    @model_validator(mode="after")
    def _baseline_has_the_steps_of_the_criteria(self) -> EvaluationConfig:
        # Refused here, as the comparison comes only after the training.
        needed = {"quick": {4, 8}, "full": {4, 8, 16}}.get(self.criteria, set())
        if missing := needed - set(self.baseline_steps):
            raise ValueError(
                f"the {self.criteria} criteria compare with {sorted(missing)} Euler steps: add to baseline_steps"
            )
        return self


class _Recipe(Config):
    name: str
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    health: HealthConfig = HealthConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _every_worker_has_samples(self) -> _Recipe:
        for world_size in range(self.train.fewest_workers, self.train.most_workers + 1):
            try:
                self.share(0, world_size)
            except UserError as error:
                raise ValueError(str(error).rstrip(".")) from None
        return self

    @property
    def micro_batch(self) -> int:
        """Most samples of a micro-batch, whatever the number of workers."""
        return -(-self.data.batch_size // (self.train.fewest_workers * self.train.accumulate))

    def share(self, rank: int, world_size: int) -> BatchShare:
        """A worker's part of every global batch."""
        return BatchShare.of(self.data.batch_size, self.micro_batch, rank, world_size)


class DistillRecipe(_Recipe):
    """Distil a teacher into a few-step policy student."""

    name: str = Field("emoji_qwen_4nfe", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the recipe; run names begin with it."""
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    sampler: SamplerConfig = SamplerConfig()
    objective: Literal["imitation", "consistency", "dmd2", "meanflow", "regression"] = "imitation"
    """What the student is trained by: π-ID, or one of the methods that it is compared with; each has a section."""
    imitation: ImitationConfig = ImitationConfig()
    consistency: ConsistencyConfig = ConsistencyConfig()
    dmd2: DMD2Config = DMD2Config()
    meanflow: MeanFlowConfig = MeanFlowConfig()
    regression: RegressionConfig = RegressionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def data_free(self) -> bool:
        """Whether the objective takes captions alone, and no images."""
        sections = {
            "imitation": self.imitation.data_free,
            "regression": self.regression.data_free,
            "dmd2": True,
        }
        return sections.get(self.objective, False)

    @property
    def unjudged_steps(self) -> int:
        """Optimizer steps in the beginning whose losses rise, or mean different things, in a healthy run."""
        sections = {
            "imitation": self.imitation.mixing_steps,
            "consistency": self.consistency.warmup_steps if self.consistency.continuous else 0,
            "meanflow": self.meanflow.warmup_steps,
            "dmd2": self.train.steps,  # two networks' losses take turns
        }
        return sections.get(self.objective, 0)


class TeacherRecipe(_Recipe):
    """Train a flow-matching teacher."""

    name: str = Field("emoji_teacher", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the recipe; run names begin with it."""
    network: NetworkConfig = NetworkConfig()
    flow_matching: FlowMatchingConfig = FlowMatchingConfig()
    guidance_distillation: GuidanceDistillationConfig = GuidanceDistillationConfig()


def network_section(recipe: DistillRecipe | TeacherRecipe) -> TeacherConfig | NetworkConfig:
    """The section of a recipe that names the family of the network to load or build."""
    return recipe.teacher if isinstance(recipe, DistillRecipe) else recipe.network


Recipe = TypeVar("Recipe", DistillRecipe, TeacherRecipe)


def load_recipe(
    kind: type[Recipe],
    source: str | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    folder: Path = RECIPES,
) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        kind: class of the recipe.
        source: a YAML file, the name of one in `folder`, or a recipe as a tree; None for the defaults.
        overrides: texts `section.key=value`, values in YAML; where the field is a text, the text itself.
        folder: folder of the named recipes.

    Raises:
        UserError: there is no such recipe, a key is unknown, or a value is not allowed.
    """
    renamed: dict[str, str] = {}
    # YAML files may have a base; trees are complete.
    tree = _read(source, folder, (source,), renamed) if isinstance(source, str) else dict(source or {})
    tree, old = upgraded(tree)
    renamed |= old
    for change in overrides:
        override(tree, kind, change)
        # Each by itself, so that an old name given last wins over what the recipe says under the new one.
        tree, old = upgraded(tree)
        renamed |= old
    other = {
        DistillRecipe: ("network", "a teacher", "train-teacher"),
        TeacherRecipe: ("student", "a student", "distill"),
    }
    section, what, command = other[kind]
    if section in tree:
        raise UserError(
            f"--recipe: this is a recipe of {what} (it has {section}): give it to fewstep {command}."
        )
    if not isinstance(source, Mapping):
        # Not for trees: they come from checkpoints and cards, where users can't change old names.
        for key, now in renamed.items():
            print(f"recipe: {key} is now called {now}", file=sys.stderr)
    return checked_settings(kind, tree, "recipe", "see --help for all keys")


def upgraded(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe's tree with keys of before fewstep 0.2 under their present names; and which were renamed, old → new.

    A key that is there under both names gets the old name's value.
    """
    new, renamed = copy.deepcopy(dict(tree)), {}
    for old, now in RENAMED.items():
        section, key = old.split(".")
        if isinstance(new.get(section), dict) and key in new[section]:
            target, name = now.split(".")
            # What is no section, such as `sampler:` without a value, stays for validation to refuse.
            if new.get(target) is None:
                new[target] = {}
            if isinstance(new[target], dict):
                new[target][name] = new[section].pop(key)
                renamed[old] = now
    return new, renamed


def _read(source: str, folder: Path, seen: tuple[str, ...], renamed: dict[str, str]) -> dict[str, Any]:
    """The tree of a YAML file on top of its bases.

    Args:
        source: file, or name of one in `folder`.
        folder: folder of the named recipes.
        seen: sources that are based on this one, to notice circles.
        renamed: gets the old keys that were found, with their new names.

    Raises:
        UserError: there is no such file, it is no recipe, or it is based on itself.
    """
    file = Path(source) if Path(source).suffix in {".yaml", ".yml"} else folder / f"{source}.yaml"
    if not file.exists():
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        near = difflib.get_close_matches(source, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
        raise UserError(f"--recipe: there is no recipe {source!r} ({file}); {hint}")
    try:
        tree = yaml.safe_load(read_settings(file, "--recipe")) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--recipe: {file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"--recipe: {file} is no recipe: it must hold keys and values, as those in {folder} do."
        )
    if base := tree.pop("base", None):
        if base in seen:
            raise UserError(f"--recipe: {file} is based on itself ({' → '.join((*seen, base))}).")
        # Keys are renamed before merging, so that old keys in one file override new ones in the other.
        tree, old = upgraded(tree)
        renamed |= old
        return _merged(_read(base, folder, (*seen, base), renamed), tree)
    tree, old = upgraded(tree)
    renamed |= old
    return tree


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, section by section; lists and values are replaced whole."""
    # Only where both are sections; a section in place of a value (lora: null, for one) replaces it.
    both_sections = {
        key: _merged(base[key], value)
        for key, value in changes.items()
        # A section of another type, such as another policy, has other fields: it takes the place of the base's.
        if isinstance(value, dict)
        and isinstance(of_base := base.get(key), dict)
        and value.get("type", of_base.get("type")) == of_base.get("type")
    }
    return base | changes | both_sections
