"""Students as diffusers pipelines: a folder that diffusers loads, with style LoRAs on top through its own calls.

    save_diffusers(FewStepPipeline.from_pretrained("emoji-student"), Path("emoji"))          # or jobs/export.py

    pipe = diffusers.DiffusionPipeline.from_pretrained("emoji", trust_remote_code=True)
    pipe("red heart, noto style", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    pipe.load_lora_weights("some_style")

    model_index.json, pipeline.py     which pipeline it is, and the line of code that names it
    transformer/                      the student's adapters and the name of the teacher that they are merged into when
                                      it is loaded; or, as an option, the whole transformer with adapters merged
    head/                             the policy head, and the student's card

Loaded, the transformer is a plain one of diffusers' own class: whatever diffusers or peft can do with it (style LoRAs,
`torch.compile`) they can do here. The head stays in float32. It takes what reaches the transformer's last norm; what
that norm and the projection after it make of it is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.loaders import Flux2LoraLoaderMixin, FluxLoraLoaderMixin, QwenImageLoraLoaderMixin
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.export.adapter import HEAD, OUTPUT, adapter_state
from fewstep.export.pipeline import FewStepPipeline, OutputType, StudentCard, read_student_card, write_card
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Family
from fewstep.models.heads import PolicySettings, build_head
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import check_reference, load_teacher, told_guidance
from fewstep.policies import Policy

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
ADAPTERS = "adapters.safetensors"
"""In `transformer/`: what the student adds to its teacher's transformer, where that is not merged on disk."""


class PolicyHead(nn.Module):
    """A student's head and card: the component that a diffusers pipeline has more than its teacher's."""

    def __init__(self, card: StudentCard, policy: PolicySettings, base: dict[str, Any]) -> None:
        """
        Args:
            card: the student's.
            policy: which head.
            base: the transformer's own configuration.
        """
        super().__init__()
        self.card, self.policy_settings, self.base = card, policy, base
        family = get_family(card.teacher.family)
        with torch.device("meta"):
            transformer = family.build(base)
            head = build_head(
                transformer.norm_out, transformer.proj_out, family.latent_channels(transformer), policy
            )
        self.head = head.to_empty(device="cpu")

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    def to(self, *arguments: Any, **options: Any) -> PolicyHead:
        """Move to a device. The weights stay in float32 whatever the pipeline is told."""
        device, *_ = torch._C._nn._parse_to(*arguments, **options)
        return self if device is None else super().to(device)

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> PolicyHead:
        """Read what `save_pretrained` wrote; diffusers' keyword arguments for large models are of no use here."""
        config = json.loads((Path(folder) / CONFIG).read_text())
        policy = TypeAdapter(PolicySettings).validate_python(config["policy"])
        head = cls(read_student_card(Path(folder)), policy, config["base"])
        head.head.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return head.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write configuration, weights, card, and the line of code by which diffusers finds this class."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"policy": self.policy_settings.model_dump(), "base": self.base}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.head.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
        write_card(self.card, folder)
        (folder / "head.py").write_text(f"from {__name__} import {PolicyHead.__name__}  # noqa: F401\n")


class TransformerOnTeacher(nn.Module):
    """How diffusers loads a transformer that is not on disk as a whole: the teacher's, the adapters merged into it.

    A module in name only, because diffusers passes `torch_dtype` to modules alone.
    """

    @staticmethod
    def from_pretrained(folder: str, torch_dtype: torch.dtype = torch.float32, **_: Any) -> nn.Module:
        """The merged transformer, in diffusers' own class.

        Args:
            folder: what `save` wrote.
            torch_dtype: of the weights.

        Raises:
            UserError: the teacher is not where the student's card says, or is another one.
        """
        card = read_student_card(Path(folder))
        transformer, _, reference = load_teacher(
            card.teacher.path, card.teacher.family, card.embedded_guidance
        )
        check_reference(reference, asdict(card.teacher))
        merge(load_file(Path(folder) / ADAPTERS), transformer)
        return transformer.to(torch_dtype)

    @staticmethod
    def save(state: Mapping[str, Tensor], card: StudentCard, folder: Path) -> None:
        """Write the adapters of a student's published weights, its card, and the line of code that names this class."""
        folder.mkdir(parents=True, exist_ok=True)
        trunk = {
            name: tensor for name, tensor in state.items() if not name.startswith(("norm_out", "proj_out"))
        }
        save_file(trunk, folder / ADAPTERS, metadata={"format": "pt"})
        write_card(card, folder)
        (folder / "transformer.py").write_text(
            f"from {__name__} import {TransformerOnTeacher.__name__}  # noqa: F401\n"
        )


class FewStepDiffusionPipeline(DiffusionPipeline):
    """A student behind diffusers' interface.

    Args:
        transformer: the merged transformer.
        head: the policy head with the student's card.
    """

    model_cpu_offload_seq = "transformer"
    _exclude_from_cpu_offload = ("head",)  # small, and not called through its forward

    def __init__(self, transformer: nn.Module, head: PolicyHead) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, head=head)
        self._student = FewStepPipeline(_Grafted(self), head.card)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        temperature: float | Literal["auto"] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[[Any, int, float, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[list[Any]]:
        """Generate one image per prompt.

        Args:
            prompt: one or several captions.
            height, width: in pixels; as trained by default.
            num_inference_steps: network evaluations; as trained by default.
            generator: of the noise: one, or one per prompt; random by default.
            temperature: mixture temperature; as trained by default.
            output_type: what `images` holds: PIL images, (H, W, 3) uint8 arrays, or (C, H, W) latents.
            callback_on_step_end: called after each evaluation with this pipeline, its index, the raw time left, and
                {"latents": the state}; what it returns is not looked at.
            return_dict: an `ImagePipelineOutput`, or a tuple of the images.

        Raises:
            UserError: a size, step count or prompt that the model can't take.
        """
        self._student.device = self.head.device
        steps = self.head.card.nfe if num_inference_steps is None else num_inference_steps
        with self.progress_bar(total=steps) as bar:

            def on_step(index: int, state: Tensor, _: Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, index, 1 - (index + 1) / steps, {"latents": state})

            images = self._student(
                prompt,
                num_inference_steps=steps,
                generator=generator or torch.Generator().manual_seed(torch.seed() % 2**63),
                temperature=temperature,
                height=height,
                width=width,
                output_type=output_type,
                on_step=on_step,
            ).images
        return ImagePipelineOutput(images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the folder that `DiffusionPipeline.from_pretrained` reads, the transformer merged.

        Args:
            save_directory: made if it does not exist.
            options: of the transformer's own `save_pretrained`, such as `max_shard_size`.
        """
        folder = Path(save_directory)
        self.transformer.save_pretrained(folder / "transformer", **options)
        self._save_beside(folder, ("diffusers", type(self.transformer).__name__))

    def _save_beside(self, folder: Path, transformer: tuple[str, str]) -> None:
        """All but the transformer; `transformer` names the library and class that read it."""
        from diffusers import __version__

        self.head.save_pretrained(folder / "head")
        name = type(self).__name__
        (folder / "pipeline.py").write_text(f"from {__name__} import {name}  # noqa: F401\n")
        index = {
            "_class_name": ["pipeline", name],
            "_diffusers_version": __version__,
            "transformer": transformer,
            "head": ["head", PolicyHead.__name__],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


class QwenImageFewStepPipeline(FewStepDiffusionPipeline, QwenImageLoraLoaderMixin):
    """For Qwen-Image students, with its style LoRAs."""


class FluxFewStepPipeline(FewStepDiffusionPipeline, FluxLoraLoaderMixin):
    """For FLUX.1 students, with its style LoRAs."""


class Flux2FewStepPipeline(FewStepDiffusionPipeline, Flux2LoraLoaderMixin):
    """For FLUX.2 students, with its style LoRAs."""


PIPELINES: dict[str, type[FewStepDiffusionPipeline]] = {
    "qwen_image": QwenImageFewStepPipeline,
    "flux": FluxFewStepPipeline,
    "flux2": Flux2FewStepPipeline,
}
"""By family of the teacher."""


def to_diffusers(student: FewStepPipeline, teacher: str | None = None) -> FewStepDiffusionPipeline:
    """The student as a diffusers pipeline; a new one, with a copy of the teacher's weights that it merges into.

    Args:
        student: of a family in `PIPELINES`.
        teacher: where the teacher lies here, if not where the student's card says.

    Raises:
        UserError: a family for which diffusers has no such pipeline.
    """
    card, network = student.card, student.network
    if card.teacher.family not in PIPELINES:
        raise UserError(
            f"a student of the family {card.teacher.family!r} can't be exported as a diffusers pipeline, only of "
            f"{', '.join(PIPELINES)}: give it on as the folder that it is (FewStepPipeline.from_pretrained reads it)."
        )
    transformer, _, _ = load_teacher(
        teacher or card.teacher.path, card.teacher.family, card.embedded_guidance
    )
    merge(_state(network), transformer)
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    head = PolicyHead(card, network.policy_settings, config)
    head.head.load_state_dict(network.head.state_dict())
    return PIPELINES[card.teacher.family](transformer, head.eval().requires_grad_(False))


def save_diffusers(
    student: FewStepPipeline, folder: Path, *, merged: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """Write the student as a folder that diffusers loads. Errors as for `to_diffusers`.

    Args:
        student: of a family in `PIPELINES`.
        folder: made if it does not exist.
        merged: write the whole transformer, so that the teacher is not needed where the folder is loaded; otherwise
            the adapters alone.
        dtype: of a merged transformer's weights on disk.
    """
    pipe = to_diffusers(student)
    if merged:
        pipe.transformer.to(dtype)
        pipe.save_pretrained(folder)
    else:
        TransformerOnTeacher.save(_state(student.network), student.card, folder / "transformer")
        pipe._save_beside(folder, ("transformer", TransformerOnTeacher.__name__))


@torch.no_grad()
def merge(state: Mapping[str, Tensor], transformer: nn.Module) -> None:
    """Give a plain transformer a student's trunk: adapters are added to its weights, whole weights replace them.

    Args:
        state: the student's weights by their published names (see `adapter.py`); its head is left aside.
        transformer: its teacher's; changed in place. Its last norm and projection stay the teacher's.
    """
    weights = dict(transformer.named_parameters())
    for name, tensor in state.items():
        layer = name.removesuffix(".lora_A.weight")
        if layer != name:
            weight = weights[f"{layer}.weight"]
            weight.add_((state[f"{layer}.lora_B.weight"] @ tensor).to(weight))
        elif name in weights and not name.startswith(OUTPUT):
            weights[name].copy_(tensor)


def _state(network: PolicyNetwork) -> dict[str, Tensor]:
    """The published weights of a student that is no longer trained."""
    full = network.teacher is not None
    own = {
        name: parameter
        for name, parameter in network.named_parameters()
        if name.startswith(HEAD) or ".lora_" in name or (full and name.startswith("transformer."))
    }
    return adapter_state(network, own)


class _Grafted(nn.Module):
    """A pipeline's transformer and head, called as one `PolicyNetwork`; whatever they are at the time of the call."""

    def __init__(self, pipeline: FewStepDiffusionPipeline) -> None:
        super().__init__()
        self._pipeline = pipeline
        card = pipeline.head.card
        self.family: Family = told_guidance(
            get_family(card.teacher.family), self.transformer, card.embedded_guidance, card.teacher.path
        )

    @property
    def transformer(self) -> nn.Module:
        """The merged transformer, with whatever style is loaded."""
        return self._pipeline.transformer

    def policy(self, x_src: Tensor, t_src: Tensor, conditioning: TextConditioning) -> Policy:
        """The student's policy for the segment that starts at (x_src, t_src)."""
        transformer, head, dtype = self.transformer, self._pipeline.head.head, self.transformer.dtype
        caught: list[tuple[Tensor, Tensor]] = []
        hook = transformer.norm_out.register_forward_pre_hook(lambda _, given: caught.append(given))
        try:
            self.family.denoise(
                transformer, x_src.to(dtype), t_src.to(dtype), conditioning.to(x_src.device, dtype)
            )
        finally:
            hook.remove()
        [(hidden, embedding)] = caught
        height, width = x_src.shape[-2:]
        return head.policy(
            head(hidden.float(), embedding.float()),
            lambda tokens, channels: self.family.unpack(tokens, channels, height, width),
            x_src,
            t_src,
        )
