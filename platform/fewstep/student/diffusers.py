"""Students as diffusers pipelines: a folder that diffusers loads, and to which it can add style LoRAs.

    save_diffusers(FewStepPipeline.from_pretrained("emoji64-student"), Path("emoji"))          # or fewstep export

    pipe = diffusers.DiffusionPipeline.from_pretrained("emoji", trust_remote_code=True)
    pipe("red heart, noto style", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    pipe.load_lora_weights("some_style")

    model_index.json, pipeline.py     names of the parts, and a line of code that imports the pipeline's class
    transformer/                      the student's adapters, which loading merges into the teacher's weights, and the
                                      teacher's name; or, as an option, the whole transformer with adapters merged
    head/                             the policy head, and the student's card

Calls take the arguments of diffusers' pipelines, with the same meaning, as far as a few-step student can follow them;
for example, its guidance is distilled into it.

The loaded transformer is of diffusers' own class, so everything works with it that diffusers and peft can do (style
LoRAs, `torch.compile`). The head stays in float32. Its input is the input of the transformer's last norm; the outputs
of that norm and of the projection after it are not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    ImagePipelineOutput,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import (
    Flux2LoraLoaderMixin,
    FluxLoraLoaderMixin,
    Krea2LoraLoaderMixin,
    QwenImageLoraLoaderMixin,
    SD3LoraLoaderMixin,
    WanLoraLoaderMixin,
    ZImageLoraLoaderMixin,
)
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.files import save_weights, shared_weights
from fewstep.models.conditioning import Conditioning
from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.family import Family, Transformer
from fewstep.models.heads import PolicyConfig, build_head
from fewstep.models.pretrained import stream_weights
from fewstep.models.registry import base_name, get_family
from fewstep.models.teacher import checked_meanwhile, open_teacher, told_guidance
from fewstep.policies import Policy
from fewstep.student.adapter import adapter_state
from fewstep.student.arguments import CALLBACK_TENSORS, OutputType, StepEnd, asked_tensors
from fewstep.student.card import StudentCard, read_student_card, write_student_card
from fewstep.student.pipeline import FewStepPipeline

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
ADAPTERS = "adapters.safetensors"
"""Name of the file in `transformer/` with the student's own weights, unless the whole transformer is stored."""


class StudentHead(nn.Module):
    """A student's policy head and card, as a component of a diffusers pipeline."""

    def __init__(self, card: StudentCard, policy: PolicyConfig, base: dict[str, Any]) -> None:
        """Build the head, without values.

        Args:
            card: the student's.
            policy: settings of the head.
            base: configuration of the transformer, which has the sizes.
        """
        super().__init__()
        self.card, self.policy_config, self.base = card, policy, base
        family = get_family(card.teacher.family)
        # The head is built from a transformer's last layers; on the meta device, that transformer takes no memory.
        with torch.device("meta"):
            transformer = family.build(base)
            head = build_head(family.ending(transformer), family.latent_channels(transformer), policy)
        self.head = head.to_empty(device="cpu")

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights."""
        return next(self.parameters()).dtype

    def to(self, *arguments: Any, **options: Any) -> StudentHead:
        """Move to a device; weights stay in float32, also when the pipeline is converted to another type."""
        # diffusers calls to(device), to(dtype) and to(device, dtype), also by keyword. Types are ignored.
        given = [*arguments, options.get("device")]
        device = next((place for place in given if isinstance(place, str | int | torch.device)), None)
        return self if device is None else super().to(device)

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> StudentHead:
        """Load what `save_pretrained` wrote; diffusers' keyword arguments for large models are ignored."""
        config = json.loads((Path(folder) / CONFIG).read_text())
        policy = TypeAdapter(PolicyConfig).validate_python(config["policy"])
        head = cls(read_student_card(Path(folder)), policy, config["base"])
        head.head.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return head.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write configuration, weights, card, and the line of code with which diffusers imports this class."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"policy": self.policy_config.model_dump(), "base": self.base}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_weights(self.head.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
        write_student_card(self.card, folder)
        (folder / "head.py").write_text(f"from {__name__} import {StudentHead.__name__}  # noqa: F401\n")


class TransformerOnTeacher(nn.Module):
    """Loader of a transformer that is stored as adapters: loads the teacher's, and merges the adapters into it.

    It derives from nn.Module only because diffusers passes `torch_dtype` to modules, and to nothing else.
    """

    @staticmethod
    def from_pretrained(folder: str, torch_dtype: torch.dtype | None = None, **ignored: Any) -> nn.Module:
        """The merged transformer, in diffusers' own class.

        Args:
            folder: as `save` has written it.
            torch_dtype: type of the weights, into which they are read one by one; None for float32.
            ignored: diffusers' keyword arguments for large models.

        Raises:
            UserError: the teacher that the student's card names is not found, or has other weights; or the weights are
                to be quantised, into which adapters can't be merged.
        """
        if ignored.get("quantization_config") is not None:
            raise UserError(
                "quantization_config: adapters can't be merged into quantised weights: export the student as a whole "
                "(fewstep export --merged), and load that folder with it."
            )
        card = read_student_card(Path(folder))
        with checked_meanwhile(card.teacher.path, card.teacher):
            return merged_transformer(card, load_file(Path(folder) / ADAPTERS), torch_dtype or torch.float32)

    @staticmethod
    def save(state: Mapping[str, Tensor], card: StudentCard, folder: Path) -> None:
        """Write a student's own weights without the head, its card, and the line of code that imports this class.

        Args:
            state: the student's weights by their published names.
            card: the student's.
            folder: made if it does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        trunk = {
            name: tensor for name, tensor in state.items() if not name.startswith(("norm_out", "proj_out"))
        }
        save_weights(trunk, folder / ADAPTERS, metadata={"format": "pt"})
        write_student_card(card, folder)
        (folder / "transformer.py").write_text(
            f"from {__name__} import {TransformerOnTeacher.__name__}  # noqa: F401\n"
        )


class FewStepDiffusionPipeline(DiffusionPipeline):
    """A student with the interface of a diffusers pipeline.

    Args:
        transformer: the merged transformer.
        head: the policy head with the student's card.
    """

    # What `register_modules` sets.
    transformer: Transformer
    head: StudentHead

    model_cpu_offload_seq = "transformer"
    # The head is small; and offloading acts on calls of a module's forward, which the head's is not called by.
    _exclude_from_cpu_offload = ("head",)
    _callback_tensor_inputs = CALLBACK_TENSORS

    # The classes by name: `from_pipe` passes on only components of exactly a class that stands here.
    def __init__(
        self,
        transformer: QwenImageTransformer2DModel
        | QwenImage21Transformer2DModel
        | FluxTransformer2DModel
        | Flux2Transformer2DModel
        | ZImageTransformer2DModel
        | SD3Transformer2DModel
        | Krea2Transformer2DModel
        | LongCatImageTransformer2DModel
        | WanTransformer3DModel,
        head: StudentHead,
    ) -> None:
        super().__init__()
        # diffusers' own base class has the method through a mixin that carries no types.
        cast(Any, self).register_modules(transformer=transformer, head=head)
        self._student = FewStepPipeline(_Grafted(self), head.card)
        # Of the last call, by the names that callbacks know.
        self._interrupt = False
        self._guidance_scale: float | None = None

    @property
    def guidance_scale(self) -> float | None:
        """The guidance scale of the last call, as it was given."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the last call."""
        return self._student.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether no more evaluations follow; callbacks set `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        temperature: float | Literal["auto"] | None = None,
        h: float | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEnd | None = None,
        return_dict: bool = True,
        *,
        image: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_prompt: int | None = 1,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        max_sequence_length: int | None = None,
        **others: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images of one or several prompts.

        Args:
            prompt: one or several captions.
            height, width: in pixels; as trained by default.
            num_inference_steps: network evaluations (nfe); as trained by default.
            generator: source of the noise, one or one per image; torch's own by default, as in diffusers' pipelines.
            temperature: mixture temperature; as trained by default.
            h: noise renewed between segments; as trained by default.
            output_type: what `images` holds: PIL images ("pil"), floats from 0 to 1 as an array (B, H, W, 3) ("np") or
                a tensor (B, 3, H, W) ("pt"), or latents (B, C, h, w) ("latent").
            callback_on_step_end: called after each evaluation with this pipeline, the evaluation's index, the share of
                evaluations that are left, and the tensors asked for by name; what it returns of them is gone on with.
                Where it sets the pipeline's `_interrupt`, no more evaluations follow.
            return_dict: return an `ImagePipelineOutput`, or else a tuple with the images.
            image: the reference image of a student that edits, or a list of as many as it takes.
            callback_on_step_end_tensor_inputs: names of these tensors: "latents" and "prompt_embeds".
            num_images_per_prompt: images of each prompt, which follow each other in the result.
            latents: the noise itself, (images, C, h, w), in place of that of `generator`.
            prompt_embeds: encoded captions, (B, L, D), in place of `prompt`.
            prompt_embeds_mask: (B, L), nonzero where a token is; by default everywhere.
            pooled_prompt_embeds: the whole captions' vectors, (B, P), of networks that take them.
            guidance_scale: input of guidance-distilled networks such as FLUX.1 dev; on other students, whose guidance
                is distilled into them, it has no effect, and a warning says so.
            true_cfg_scale, negative_prompt: of classifier-free guidance, for which the same holds.
            max_sequence_length: tokens that a caption may have, beside the student's own limit.
            others: further arguments of diffusers' pipelines, see `fewstep.student.arguments.check_others`.

        Raises:
            UserError: a size, number, prompt or tensor that the model can't take.
            TypeError: an argument that no pipeline has.
        """
        self._student.device = self.head.device  # the pipeline may have been moved since the last call
        nfe = self.head.card.sampler.override(num_inference_steps).nfe
        names = asked_tensors(callback_on_step_end_tensor_inputs, callback_on_step_end)
        self._interrupt, self._guidance_scale = False, guidance_scale
        with cast(Any, self).progress_bar(total=nfe) as bar:

            def on_step_end(
                _: Any, index: int, left: float, tensors: dict[str, Tensor]
            ) -> Mapping[str, Tensor] | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                # Users' callbacks know this pipeline, and not the one that it calls.
                changed = callback_on_step_end(self, index, left, tensors)
                self._student._interrupt = self._interrupt
                return changed

            images = self._student(
                prompt,
                image=image,
                num_inference_steps=num_inference_steps,
                generator=torch.default_generator if generator is None else generator,
                temperature=temperature,
                h=h,
                height=height,
                width=width,
                output_type=output_type,
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=names,
                num_images_per_prompt=num_images_per_prompt,
                latents=latents,
                prompt_embeds=prompt_embeds,
                prompt_embeds_mask=prompt_embeds_mask,
                pooled_prompt_embeds=pooled_prompt_embeds,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                negative_prompt=negative_prompt,
                max_sequence_length=max_sequence_length,
                **others,
            ).images
        cast(Any, self).maybe_free_model_hooks()  # as diffusers asks of every pipeline that can be offloaded
        return ImagePipelineOutput(images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the folder that `DiffusionPipeline.from_pretrained` reads, with the whole merged transformer.

        Args:
            save_directory: made if it does not exist.
            options: arguments of the transformer's own `save_pretrained`, such as `max_shard_size`.
        """
        folder = Path(save_directory)
        with shared_weights(folder / "transformer"):
            self.transformer.save_pretrained(folder / "transformer", **options)
        self._save_beside(folder, ("diffusers", type(self.transformer).__name__))

    def _save_beside(self, folder: Path, transformer: tuple[str, str]) -> None:
        """Write everything but the transformer; `transformer` names the library and class that load that."""
        from diffusers import __version__

        self.head.save_pretrained(folder / "head")
        name = type(self).__name__
        (folder / "pipeline.py").write_text(f"from {__name__} import {name}  # noqa: F401\n")
        index = {
            "_class_name": ["pipeline", name],
            "_diffusers_version": __version__,
            "transformer": transformer,
            "head": ["head", StudentHead.__name__],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


class QwenImageFewStepPipeline(FewStepDiffusionPipeline, QwenImageLoraLoaderMixin):
    """For students of Qwen-Image; takes its style LoRAs."""


class QwenImage21FewStepPipeline(FewStepDiffusionPipeline, QwenImageLoraLoaderMixin):
    """For students of Qwen-Image 2.1; takes its style LoRAs."""


class FluxFewStepPipeline(FewStepDiffusionPipeline, FluxLoraLoaderMixin):
    """For students of FLUX.1; takes its style LoRAs."""


class Flux2FewStepPipeline(FewStepDiffusionPipeline, Flux2LoraLoaderMixin):
    """For students of FLUX.2; takes its style LoRAs."""


class ZImageFewStepPipeline(FewStepDiffusionPipeline, ZImageLoraLoaderMixin):
    """For students of Z-Image; takes its style LoRAs."""


class SD3FewStepPipeline(FewStepDiffusionPipeline, SD3LoraLoaderMixin):
    """For students of Stable Diffusion 3 and 3.5; takes their style LoRAs for the transformer."""


class Krea2FewStepPipeline(FewStepDiffusionPipeline, Krea2LoraLoaderMixin):
    """For students of Krea 2; takes its style LoRAs."""


class LongCatImageFewStepPipeline(FewStepDiffusionPipeline):
    """For students of LongCat-Image, for which diffusers has no loader of LoRAs."""


class WanFewStepPipeline(FewStepDiffusionPipeline, WanLoraLoaderMixin):
    """For students of Wan 2.1; takes its style LoRAs. A video is an image of its frames under each other."""


PIPELINES: dict[str, type[FewStepDiffusionPipeline]] = {
    "qwen_image": QwenImageFewStepPipeline,
    "flux": FluxFewStepPipeline,
    "flux2": Flux2FewStepPipeline,
    "z_image": ZImageFewStepPipeline,
    "sd3": SD3FewStepPipeline,
    "krea2": Krea2FewStepPipeline,
    "qwen_image21": QwenImage21FewStepPipeline,
    "longcat_image": LongCatImageFewStepPipeline,
    "wan": WanFewStepPipeline,
}
"""The teacher's family → the pipeline for its students."""


def to_diffusers(
    student: FewStepPipeline, teacher: str | None = None, dtype: torch.dtype = torch.float32
) -> FewStepDiffusionPipeline:
    """Make a diffusers pipeline of a student. The adapters are merged into a teacher that is loaded once more.

    Args:
        student: of a family in `PIPELINES`.
        teacher: the teacher's folder or hub id on this machine, if it differs from that in the student's card.
        dtype: type of the transformer's weights.

    Raises:
        UserError: there is no pipeline for students of the teacher's family, or the student has all weights itself, and
            in another precision than float32.
    """
    card, network = student.card, cast(Any, student.network)
    if base_name(card.teacher.family) not in PIPELINES:
        raise UserError(
            f"a student of the family {card.teacher.family!r} can't be exported as a diffusers pipeline, only of "
            f"{', '.join(PIPELINES)}: use the student's own folder instead (FewStepPipeline.from_pretrained reads it)."
        )
    transformer = merged_transformer(card, _state(network), dtype, teacher)
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    head = StudentHead(card, network.policy_config, config)
    head.head.load_state_dict(network.head.state_dict())
    return PIPELINES[base_name(card.teacher.family)](transformer, head.eval().requires_grad_(False))


def save_diffusers(
    student: FewStepPipeline, folder: Path, *, merged: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """Write a student as a folder that diffusers loads.

    Args:
        student: of a family in `PIPELINES`.
        folder: made if it does not exist.
        merged: write the whole transformer, so that loading does not need the teacher; otherwise only adapters.
        dtype: type of the merged transformer's weights.

    Raises:
        UserError: there is no pipeline for students of the teacher's family.
    """
    pipe = to_diffusers(student, dtype=dtype)
    if merged:
        pipe.save_pretrained(folder)
    else:
        TransformerOnTeacher.save(_state(student.network), student.card, folder / "transformer")
        pipe._save_beside(folder, ("transformer", TransformerOnTeacher.__name__))


@torch.no_grad()
def merged_transformer(
    card: StudentCard, state: Mapping[str, Tensor], dtype: torch.dtype, teacher: str | None = None
) -> Transformer:
    """A teacher's transformer with a student's weights: LoRA adapters added to weights, or whole weights replaced.

    Sums are made in float32 and rounded once. Weights are read one by one: no second copy of the network is made.

    Args:
        card: the student's, which names the teacher.
        state: the student's weights by their published names (see `adapter.py`); those of the head are left out.
        dtype: of the result's weights.
        teacher: the teacher's folder or hub id on this machine, if it differs from that in the card.

    Raises:
        UserError: the teacher is not found.
    """
    transformer, family, folder = open_teacher(
        teacher or card.teacher.path,
        card.teacher.family,
        card.teacher_sampler.embedded_guidance_scale,
        card.teacher.loras,
    )
    own = dict(transformer.named_parameters())
    # Parts, such as Krea 2's norms, that diffusers also leaves in float32 when it loads in another type.
    exact = set(transformer._keep_in_fp32_modules or ())
    base = own.items() if folder is None else stream_weights(folder)
    for name, value in base:
        if name not in own:
            continue
        layer = name.removesuffix(".weight")
        if not name.startswith(family.output_prefixes):  # of the last norm and projection nothing is used
            value = state.get(name, value)
            if (down := state.get(f"{layer}.lora_A.weight")) is not None:
                # alpha = rank, so adapters are added with factor 1.
                value = value.float() + (state[f"{layer}.lora_B.weight"].float() @ down.float()).to(
                    value.device
                )
        path, _, last = name.rpartition(".")
        held = torch.float32 if exact.intersection(name.split(".")) else dtype
        # Copied, as users may change the weights: they may be mapped pages of a file.
        parameter = nn.Parameter(value.to(held, copy=True), requires_grad=False)
        setattr(transformer.get_submodule(path), last, parameter)
    return transformer.eval()


def _state(network: Any) -> dict[str, Tensor]:
    """A student's own weights by their published names, also if they are frozen.

    Raises:
        UserError: they are not held in float32.
    """
    # A loaded student has nothing trainable any more, so that its weights are found by their names.
    full = network.teacher is not None
    if full and network.precision != "float32":
        raise UserError(
            f"this student's own weights are held in {network.precision}, rounded from those in its folder: load it "
            "in float32 to export it."
        )
    own = {
        name: parameter
        for name, parameter in network.named_parameters()
        if name.startswith(network.head_prefix)
        or ".lora_" in name
        or (full and name.startswith("transformer."))
    }
    return adapter_state(network, own)


class _Grafted(nn.Module):
    """A pipeline's transformer and head with the interface of a `PolicyNetwork`.

    Both are looked up at each call, because users replace them by other modules, such as compiled ones.
    """

    def __init__(self, pipeline: FewStepDiffusionPipeline) -> None:
        super().__init__()
        self._pipeline = pipeline
        card = pipeline.head.card
        self.family: Family = told_guidance(
            get_family(card.teacher.family),
            self.transformer,
            card.teacher_sampler.embedded_guidance_scale,
            card.teacher.path,
        )

    @property
    def transformer(self) -> Transformer:
        """The merged transformer, with the style LoRAs that are loaded."""
        return self._pipeline.transformer

    def prepare(self, conditioning: Conditioning, *, student: bool = True) -> Conditioning:
        """As `PolicyNetwork.prepare`; there is only the student."""
        return self.family.prepare(
            self.transformer, conditioning.to(self._pipeline.head.device, self.transformer.dtype)
        )

    def policy(
        self,
        x_src: Tensor,
        t_src: Tensor,
        conditioning: Conditioning,
        guidance_scale: float | None = None,
    ) -> Policy:
        """The student's policy for the segments that start at x_src (B, C, H, W), t_src (B,)."""
        transformer, head, dtype = self.transformer, self._pipeline.head.head, self.transformer.dtype
        # Before hooks are there, which are for one call of the transformer.
        conditioning = self.prepare(conditioning)
        # The whole forward runs, and the input of its last norm is caught on the way: a compiled or offloaded
        # transformer can't be run in part.
        caught: list[tuple[Any, ...]] = []
        late: list[Tensor] = []
        family = cast(DiffusersFamily, self.family)

        def exact_time(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            # The transformer rounds the time to the type of its weights first: in bfloat16, 0.9987 is 1.0.
            # Qwen-Image's networks for editing embed further times after these.
            known = family.embedded_time(t_src)
            return (torch.cat([known, given[0][len(known) :].float()]), *given[1:])

        def in_own_type(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            # FLUX.2 hands on sines in the type of the time that it was given.
            return (given[0].to(cast(nn.Linear, layer).weight.dtype), *given[1:])

        def catch(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            caught.append((*given, *named.values(), *late))

        def keep_time(_: nn.Module, __: Any, embedded: tuple[Tensor, ...]) -> None:
            late.append(embedded[0])

        last = transformer.get_submodule(family.last_layers[0])
        hooks = [last.register_forward_pre_hook(catch, with_kwargs=True)]
        embedding = transformer.get_submodule(family.time_embedding)
        if family.late_time:
            hooks.append(embedding.register_forward_hook(keep_time))
        if dtype != torch.float32:
            hooks.append(embedding.register_forward_pre_hook(exact_time))
            linear = (layer for layer in embedding.modules() if isinstance(layer, nn.Linear))
            # Quantised ones, of integers, take any type.
            layers = [layer for layer in linear if layer.weight.is_floating_point()]
            hooks += [layer.register_forward_pre_hook(in_own_type) for layer in layers]
        try:
            tokens = family.denoise(transformer, x_src.to(dtype), t_src, conditioning, guidance_scale)
        finally:
            for hook in hooks:
                hook.remove()
        [inputs] = caught
        height, width = x_src.shape[-2:]
        # The head computes in float32, also if the transformer runs in bfloat16.
        packed = head(*(value.float() if value.is_floating_point() else value for value in inputs))
        return head.policy(
            # In Z-Image, padding and caption follow the image up to the last layer.
            packed[:, : tokens.shape[1]],
            lambda tokens, channels: family.unpack(tokens, channels, height, width),
            x_src,
            t_src,
        )
