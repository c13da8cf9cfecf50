"""The exported student, and the pipeline that generates with it.

    pipe = FewStepPipeline.from_pretrained("emoji-student")        # bundled name, folder, or models:/name@alias
    image = pipe("red heart, noto style", num_inference_steps=4, seed=0).images[0]

A student folder is an adapter (see `adapter.py`) with one more file, `fewstep.json`: which teacher it
grows on, how captions and pixels are encoded, and how it is sampled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.data.schema import MAX_TOKENS
from fewstep.errors import UserError
from fewstep.export.adapter import load_adapter, save_adapter
from fewstep.flow import (
    NextStep,
    SamplerSchedule,
    TimeShift,
    euler,
    euler_step,
    gaussian_noise,
    generate,
    generate_step,
)
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family_code import CODE, code_of, find_code
from fewstep.models.network import GuidedTeacher, PolicyNetwork
from fewstep.models.teacher import BUNDLED, TeacherReference, check_reference, load_teacher, locate

if TYPE_CHECKING:
    from fewstep.data.autoencoder import Autoencoder
    from fewstep.data.encoder import CaptionEncoder

CARD = "fewstep.json"
DEFAULT_TRACKING = "sqlite:///mlflow.db"
OutputType = Literal["pil", "np", "latent"]
MAX_STEPS = 128
"""One policy substep per step is the finest schedule."""


@dataclass(frozen=True)
class StudentCard:
    """All that generating needs beside the weights."""

    teacher: TeacherReference
    text_encoder: str
    autoencoder: str
    latent_shape: tuple[int, int, int]
    """(C, H, W) it was trained on."""
    nfe: int
    """Network evaluations it was trained for."""
    shift: float
    final_step_scale: float
    substeps: int
    temperature: float | Literal["auto"]
    guidance: float
    """Guidance scale of the teacher that it imitates."""
    teacher_shift: float | None = None
    """Time shift of the teacher's own sampler; None where it is the student's."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Range of σ in which the teacher's guidance acts."""
    orthogonal: float = 0.0
    """Share of the teacher's guidance direction parallel to x̂_0 that is removed."""
    embedded_guidance: float | None = None
    """Guidance scale that teacher and student take as an input, where they are guidance-distilled."""
    final_temperature: float = 1.0
    """Mixture temperature of the last step; `temperature` is that of all others."""
    final_temperature_below: float = 1.0
    """σ below which it acts."""
    more_nfes: tuple[int, ...] = ()
    """Further numbers of evaluations that it was trained for."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """The resolved recipe it was trained with."""
    max_tokens: int = MAX_TOKENS
    """Longest prompt: as long as captions might be in training."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What it measured."""

    @property
    def nfes(self) -> tuple[int, ...]:
        """All numbers of evaluations that it was trained for."""
        return (self.nfe, *self.more_nfes)


@dataclass
class FewStepOutput:
    """Result of a pipeline call."""

    images: list[Any]
    """PIL images, or a (B, H, W, 3) uint8 array, or (B, C, H, W) latents, by `output_type`."""


def save_student(
    network: PolicyNetwork, card: StudentCard, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a student folder; `weights` replaces the network's trainable parameters (the average, say).

    A family that came as a user's file goes along, as a copy of that file.
    """
    save_adapter(network, folder, weights)
    if (code := code_of(network.family.name)) is not None:
        (folder / CODE).write_bytes(code.content)
        card = replace(card, teacher=replace(card.teacher, code_sha256=code.sha256))
    write_card(card, folder)


def write_card(card: StudentCard, folder: Path) -> None:
    """Write (or replace) the card of a student folder."""
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n")


def read_student_card(folder: Path) -> StudentCard:
    """Read the card of a student folder.

    Raises:
        UserError: it has none.
    """
    file = folder / CARD
    if not file.exists():
        raise UserError(
            f"{folder} is no exported student: it has no {CARD}; give the folder that a distillation job wrote, "
            f"models:/name@alias, or a bundled name ({', '.join(BUNDLED)})."
        )
    fields = json.loads(file.read_text())
    return StudentCard(
        **{
            **fields,
            "teacher": TeacherReference(**fields["teacher"]),
            "latent_shape": tuple(fields["latent_shape"]),
            "guidance_interval": tuple(fields.get("guidance_interval", (0.0, 1.0))),
            "more_nfes": tuple(fields.get("more_nfes", ())),
        }
    )


class FewStepPipeline:
    """Generates images from prompts in a few network evaluations; its teacher is at hand to compare with."""

    def __init__(self, network: PolicyNetwork, card: StudentCard, device: torch.device | str = "cpu") -> None:
        self.card, self.device = card, torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        if isinstance(network, PolicyNetwork):
            network.keep_folded()

    # Encoder, autoencoder and teacher load when they are first used: a server may run them elsewhere, or never.

    @cached_property
    def text_encoder(self) -> CaptionEncoder:
        from fewstep.data.encoder import load_encoder

        return load_encoder(self.card.text_encoder, max_tokens=self.card.max_tokens, device=self.device)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        from fewstep.data.autoencoder import load_autoencoder

        return load_autoencoder(self.card.autoencoder, device=self.device)

    @cached_property
    def teacher(self) -> GuidedTeacher:
        card = self.card
        null = None if card.guidance == 1 else self.text_encoder.null().to(self.device)
        return GuidedTeacher(self.network, null, card.guidance, card.guidance_interval, card.orthogonal)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        teacher: str | None = None,
        device: torch.device | str = "cpu",
        tracking_uri: str | None = None,
    ) -> FewStepPipeline:
        """Load a student and the teacher that it grows on.

        Args:
            path: a bundled name, a student folder, or an MLflow address (`models:/name@alias`, `runs:/…`).
            teacher: where the teacher lies here, if not where the student's card says.
            device: where to generate.
            tracking_uri: where MLflow addresses are looked up; `MLFLOW_TRACKING_URI` by default.

        Raises:
            UserError: nothing loadable there, another teacher than the student's own, or a teacher whose family is
                code that came with the student and that nobody has looked at here (`family_code.py`).
        """
        folder = student_folder(str(path), tracking_uri)
        card = read_student_card(folder)
        find_code(card.teacher.family, card.teacher.code_sha256, folder)
        transformer, family, reference = load_teacher(
            teacher or card.teacher.path, card.teacher.family, card.embedded_guidance
        )
        check_reference(reference, asdict(card.teacher))
        return cls(load_adapter(transformer, family, folder), card, device)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | None = None,
        temperature: float | Literal["auto"] | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: OutputType = "pil",
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> FewStepOutput:
        """Generate one image per prompt.

        Args:
            prompt: one or several captions.
            num_inference_steps: network evaluations; the trained number by default.
            seed: of the noise: one number (prompt i gets seed + i) or one per prompt. An image depends on
                its own prompt and seed alone, not on its batch.
            generator: draw the noise from this instead of `seed`.
            temperature: mixture temperature; the trained setting by default.
            height, width: in pixels; as trained by default.
            output_type: what `images` holds.
            on_step: called after each evaluation with its index, the state, and the predicted clean latents.

        Raises:
            UserError: a size, step count or prompt that the model can't take.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not (temperature in (None, "auto") or 0 < temperature <= 1):
            raise UserError(f"temperature must be above 0 and at most 1, or 'auto'; got {temperature}.")
        if output_type not in get_args(OutputType):
            raise UserError(
                f"output_type must be one of {', '.join(get_args(OutputType))}; got {output_type!r}."
            )
        steps = self.card.nfe if num_inference_steps is None else num_inference_steps
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(f"num_inference_steps must be 1 to {MAX_STEPS}, got {steps}.")
        shape = self.latent_shape(height, width)
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise UserError(
                f"seed: {len(seeds)} seeds for {len(prompts)} prompts; give one, or one per prompt."
            )
        noise = gaussian_noise(
            (len(prompts), *shape), generator or [torch.Generator().manual_seed(s) for s in seeds]
        )
        conditioning = self.encode(prompts)
        latents = self.sample(noise, conditioning, steps, temperature=temperature, on_step=on_step)
        if output_type == "latent":
            return FewStepOutput(list(latents))
        pixels = self.decode(latents)
        return FewStepOutput(list(pixels) if output_type == "np" else _to_pil(pixels))

    def encode(self, prompts: Sequence[str]) -> TextConditioning:
        """Captions → token states (and pooled vectors), as training shards hold them but for float16's rounding."""
        return self.text_encoder.conditioning(list(prompts)).to(self.device)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """(B, C, H, W) latents → (B, H', W', 3) uint8."""
        return np.asarray(self.autoencoder.decode(latents))

    @torch.inference_mode()
    def sample(
        self,
        noise: Tensor,
        conditioning: TextConditioning,
        steps: int,
        *,
        temperature: float | Literal["auto"] | None = None,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """The student: (B, C, H, W) noise → latents, in `steps` network evaluations."""
        return generate(
            partial(self.network.policy, conditioning=conditioning),
            noise.to(self.device),
            self._schedule(steps),
            **self._temperatures(temperature),
            substeps=self.card.substeps,
            on_step=on_step,
        )

    def next_step(
        self, index: int, steps: int, temperature: float | Literal["auto"] | None = None
    ) -> NextStep:
        """What one sample does at evaluation `index` (from 0) of `steps`, for `sample_step`."""
        return self._schedule(steps).next_step(index, **self._temperatures(temperature))

    @torch.inference_mode()
    def sample_step(
        self, x: Tensor, conditioning: TextConditioning, step: NextStep
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """One network evaluation of `sample`, each sample at a step of its own (see `generate_step`)."""
        policy_at = partial(self.network.policy, conditioning=conditioning)
        return generate_step(policy_at, x, step, TimeShift(self.card.shift), substeps=self.card.substeps)

    @torch.inference_mode()
    def sample_teacher(self, noise: Tensor, conditioning: TextConditioning, steps: int) -> Tensor:
        """The teacher's own guided Euler sampler from the same noise; `steps × teacher.passes` passes."""
        velocity = partial(self.teacher.velocity, conditioning=conditioning)
        return euler(velocity, noise.to(self.device), steps, self._teacher_shift)

    @torch.inference_mode()
    def sample_teacher_step(
        self, x: Tensor, conditioning: TextConditioning, step: Tensor, steps: Tensor
    ) -> Tensor:
        """One step of `sample_teacher`, each sample at a step of its own (see `euler_step`)."""
        velocity = partial(self.teacher.velocity, conditioning=conditioning)
        return euler_step(velocity, x, step, steps, self._teacher_shift)

    def _temperatures(self, temperature: float | Literal["auto"] | None) -> dict[str, Any]:
        return {
            "temperature": self.card.temperature if temperature is None else temperature,
            "final_temperature": self.card.final_temperature,
            "final_temperature_below": self.card.final_temperature_below,
        }

    def _schedule(self, steps: int) -> SamplerSchedule:
        return _schedule(steps, self.card.shift, self.card.final_step_scale)

    @property
    def _teacher_shift(self) -> TimeShift:
        return TimeShift(self.card.teacher_shift or self.card.shift)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, as trained."""
        _, height, width = self.card.latent_shape
        return self.autoencoder.image_size(height, width)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of (height, width) pixels; a side that is not given is as trained.

        Raises:
            UserError: the autoencoder or the network's patches do not tile it.
        """
        if height is None and width is None:
            return self.card.latent_shape
        trained_height, trained_width = self.size
        height, width = (
            trained_height if height is None else height,
            trained_width if width is None else width,
        )
        shape = self.autoencoder.latent_shape(height, width)
        patch = self.network.family.patch(self.network.transformer)
        if any(cells % patch or cells < patch for cells in shape[1:]):
            multiple, _ = self.autoencoder.image_size(patch, patch)
            raise UserError(
                f"an image of {width}x{height} pixels doesn't fit this model: both sides must be multiples of "
                f"{multiple}."
            )
        return shape


@lru_cache(maxsize=MAX_STEPS)
def _schedule(steps: int, shift: float, final_step_scale: float) -> SamplerSchedule:
    return SamplerSchedule(steps, TimeShift(shift), final_step_scale)  # its tables are made once


def student_folder(path: str, tracking_uri: str | None = None) -> Path:
    """The local folder of a student: a bundled name, a folder, or an MLflow address (downloaded).

    Raises:
        UserError: nothing is there.
    """
    if path.startswith(("models:", "runs:")):
        from fewstep.tracking.registry import resolve

        return resolve(path, registry_uri(tracking_uri))[0]
    return Path(locate(path, "model"))


def registry_uri(given: str | None) -> str:
    """Where `models:/…` is looked up: as given, or MLflow's own setting, or the local database."""
    return given or os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_TRACKING)


def _to_pil(pixels: np.ndarray) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(image) for image in pixels]
