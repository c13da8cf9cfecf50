"""The arguments of a pipeline's call, under the names that diffusers' pipelines have for them: checks and meanings.

They are checked before anything is encoded or generated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.config import Shape
from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Family, Transformer
from fewstep.student.card import StudentCard

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

OutputType = Literal["pil", "np", "pt", "latent"]
"""What `images` of a result holds."""

CALLBACK_TENSORS = ["latents", "prompt_embeds"]
"""What `callback_on_step_end` may ask for, and change."""

OTHERS = (
    "prompt_2", "negative_prompt_2", "negative_prompt_embeds", "negative_prompt_embeds_mask",
    "negative_pooled_prompt_embeds", "attention_kwargs", "joint_attention_kwargs", "sigmas", "timesteps",
)  # fmt: skip
"""Arguments of diffusers' pipelines that `check_others` takes."""

StepEnd = Callable[[Any, int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""A callback at the end of each step: of the pipeline, the step's index, the share of evaluations that are left, and
the tensors asked for by name. It returns those that are to be replaced."""


def whole_number(name: str, value: object, least: int) -> int:
    """`value`, if it is a whole number of at least `least`.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, got {_form(value)}.")
    return int(value)


def check_output_type(output_type: str) -> None:
    """Refuse an unknown kind of result.

    Raises:
        UserError: it is unknown.
    """
    if output_type not in get_args(OutputType):
        raise UserError(f"output_type must be one of {', '.join(get_args(OutputType))}; got {output_type!r}.")


def prompt_list(
    prompt: str | Sequence[str] | None,
    prompt_embeds: Tensor | None,
    prompt_embeds_mask: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
) -> list[str]:
    """The captions as a list, empty where their states are given.

    Raises:
        UserError: neither or both are given, what belongs to states is given beside captions, or it is no text.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise UserError(
            "give either prompt, one or several captions, or prompt_embeds, their encoded states."
        )
    if prompt is None:
        return []
    for name, tensor in (
        ("prompt_embeds_mask", prompt_embeds_mask), ("pooled_prompt_embeds", pooled_prompt_embeds)
    ):  # fmt: skip
        if tensor is not None:
            raise UserError(
                f"{name} belongs to prompt_embeds, and prompt is given: leave one of the two out."
            )
    if not (prompts := _texts(prompt)):
        raise UserError(f"prompt must be a caption or a list of at least one caption, got {_form(prompt)}.")
    return prompts


def _texts(value: object) -> list[str] | None:
    """A text or a sequence of texts as a list; None for anything else."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence) and all(isinstance(one, str) for one in value):
        return list(value)
    return None


def reference_images(image: Any, count: int) -> list[Image.Image]:
    """The reference images of a call, RGB.

    Args:
        image: one, or a list of them in the order in which the network takes them: PIL images, or arrays (H, W, 3)
            uint8; None for none.
        count: how many the student takes.

    Raises:
        UserError: it takes another number, or one is no image.
    """
    from PIL import Image

    given = list(image) if isinstance(image, list | tuple) else [] if image is None else [image]
    if given and not count:
        raise UserError(
            "image: this student makes images of prompts alone, and takes no reference images: leave it out."
        )
    if len(given) != count:
        raise UserError(
            f"image: this student edits {count} reference images at once, not {len(given)}: give as many."
        )
    images = []
    for one in given:
        if isinstance(one, np.ndarray) and one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3:
            one = Image.fromarray(one)
        if not isinstance(one, Image.Image):
            raise UserError(f"image must be PIL images or arrays (H, W, 3) of uint8, got {_form(one)}.")
        images.append(one.convert("RGB"))
    return images


def check_others(others: Mapping[str, Any], prompts: list[str]) -> list[str]:
    """Check arguments of diffusers' pipelines that have no place of their own in a few-step student's call.

    `negative_prompt_2`, `negative_prompt_embeds`, `negative_prompt_embeds_mask` and `negative_pooled_prompt_embeds`
    have no effect, and a warning says so, as for `negative_prompt`. `prompt_2` may only repeat the prompt;
    `attention_kwargs` and `joint_attention_kwargs` may only have a scale of 1; `sigmas` and `timesteps` are refused.

    Args:
        others: by their names; None as if not given.
        prompts: captions of the call.

    Returns:
        Names of those without effect.

    Raises:
        UserError: one can't be honoured.
        TypeError: one is unknown.
    """
    ignored = []
    for name, value in others.items():
        if name not in OTHERS:
            raise TypeError(f"the pipeline got an unexpected keyword argument {name!r}")
        if value is None:
            continue
        if name in ("sigmas", "timesteps"):
            raise UserError(
                f"{name}: a few-step student has its own schedule, which it was trained for; leave it out, and give "
                "num_inference_steps."
            )
        if name in ("attention_kwargs", "joint_attention_kwargs"):
            scale = value.get("scale", 1) if isinstance(value, Mapping) and {*value} <= {"scale"} else None
            if not (isinstance(scale, Real) and scale == 1):
                raise UserError(
                    f"{name} must be empty, got {_form(value)}: set the scale of a style LoRA by the pipeline's "
                    "set_adapters."
                )
        elif name == "prompt_2":
            if _texts(value) != prompts:
                raise UserError(
                    f"prompt_2 must be left out or repeat prompt, got {_form(value)}: all text encoders of this model "
                    "get one caption."
                )
        elif name == "negative_prompt_2":
            ignored += [name] * _says_something(name, value)
        else:
            ignored.append(name)
    return ignored


def _says_something(name: str, value: Any) -> bool:
    """Whether a negative prompt has any words: an empty one is what guidance without one means, too.

    Raises:
        UserError: it is no text.
    """
    if value is None:
        return False
    if (texts := _texts(value)) is None:
        raise UserError(f"{name} must be a text or a list of texts, got {_form(value)}.")
    return any(texts)


def generators_for(
    images: int, seed: int | Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None
) -> torch.Generator | Sequence[torch.Generator]:
    """The sources of noise of a batch of images: one for all, or one for each.

    Args:
        images: how many.
        seed: one number, to which the image's index is added, or one for each image; not used where generators are
            given.
        generator: one, or one for each image.

    Raises:
        UserError: their number is another, or one is none.
    """
    if isinstance(generator, torch.Generator):
        return generator
    if generator is not None:
        given = list(generator) if isinstance(generator, Sequence) else [generator]
        if not given or not all(isinstance(one, torch.Generator) for one in given):
            raise UserError(
                f"generator must be a torch.Generator or a list of them, got {_form(generator)}; seed takes numbers."
            )
        _check_count("generator", "generators", len(given), images)
        return given
    # Any, because the types do not know numpy's whole numbers.
    first: Any = seed
    numbers: Any = [first + index for index in range(images)] if isinstance(first, Integral) else first
    if isinstance(numbers, str) or not isinstance(numbers, Sequence):
        raise UserError(f"seed must be a whole number or a list of them, got {_form(seed)}.")
    _check_count("seed", "seeds", len(numbers), images)
    for number in numbers:
        # torch's own range
        whole = isinstance(number, Integral) and not isinstance(number, bool)
        if not (whole and -(2**63) <= number < 2**64):
            raise UserError(f"seed must be a whole number from -2**63 to 2**64 - 1, got {_form(number)}.")
    return [torch.Generator().manual_seed(int(number)) for number in numbers]


def _check_count(name: str, what: str, given: int, images: int) -> None:
    """Refuse a list that has not one entry for each image."""
    if given != images:
        raise UserError(
            f"{name}: {given} {what} for {images} prompts (each counted num_images_per_prompt times); give one, or one "
            "per image."
        )


def check_latents(latents: Tensor, images: int, shape: Shape) -> None:
    """Refuse noise of another form than that of the batch.

    Raises:
        UserError: it has another shape, or is no tensor of finite floating-point numbers.
    """
    wanted = (images, *shape)
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or latents.shape != wanted:
        raise UserError(
            f"latents must be noise of shape (images, channels, height, width) = {wanted}, not packed to tokens, got "
            f"{_form(latents)}; height and width say the image's size."
        )
    _check_values("latents", latents)


def _check_values(name: str, tensor: Tensor) -> None:
    """Refuse a tensor without values, or with such that are not finite."""
    if tensor.is_meta:
        raise UserError(
            f"{name} is on the meta device, where tensors have no values: make it on another device."
        )
    if not tensor.isfinite().all():
        raise UserError(f"{name} must be finite, and holds NaN or infinity: make it again.")


def embedded(
    states: Tensor, mask: Tensor | None, pooled: Tensor | None, family: Family, transformer: Transformer
) -> TextConditioning:
    """Conditions of texts that the caller has encoded.

    Args:
        states: `prompt_embeds`, (B, L, D).
        mask: `prompt_embeds_mask`, (B, L), nonzero where a token is; None where all are.
        pooled: `pooled_prompt_embeds`, (B, P), for networks that take one.
        family: of the network.
        transformer: the network.

    Raises:
        UserError: the network takes no text, other sizes, or only finite floating-point numbers.
    """
    width, summary = family.condition_width(transformer), family.pooled_width(transformer)
    if not width:
        raise UserError("prompt_embeds: this model is not conditioned on texts; give prompt.")
    if (
        not isinstance(states, Tensor)
        or states.ndim != 3
        or not states.numel()
        or states.shape[-1] != width
        or not states.is_floating_point()
    ):
        raise UserError(
            f"prompt_embeds must have shape (prompts, tokens, {width}), at least one of each, and hold floating-point "
            f"numbers, got {_form(states)}."
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != states.shape[:2]):
        raise UserError(f"prompt_embeds_mask must have shape {tuple(states.shape[:2])}, got {_form(mask)}.")
    if mask is not None:
        _check_values("prompt_embeds_mask", mask)
        if not mask.bool().any(dim=1).all():
            raise UserError("prompt_embeds_mask must be nonzero for at least one token of each prompt.")
    # A network whose texts have no vector of their own was trained with the mean of its states, which is as wide.
    if summary is None and pooled is not None:
        raise UserError("pooled_prompt_embeds: this model takes none; leave it out.")
    if (pooled is None and summary not in (None, width)) or (
        pooled is not None
        and (
            not isinstance(pooled, Tensor)
            or pooled.shape != (len(states), summary)
            or not pooled.is_floating_point()
        )
    ):
        raise UserError(
            f"pooled_prompt_embeds must have shape {(len(states), summary)} beside prompt_embeds, and hold "
            f"floating-point numbers, got {_form(pooled)}."
        )
    _check_values("prompt_embeds", states)
    if pooled is not None:
        _check_values("pooled_prompt_embeds", pooled)
    kept = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    kept = kept.to(states.device)
    # As encoders give them: padding is zero.
    return TextConditioning(
        states.float() * kept[..., None], kept, None if pooled is None else pooled.float().to(states.device)
    )


def _form(value: object) -> str:
    """A tensor's shape and type, or the begin of another value in one line, for messages."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return " ".join(repr(value).split())[:100]


def network_guidance(
    guidance_scale: float | None,
    true_cfg_scale: float | None,
    negative_prompt: object,
    card: StudentCard,
    takes_guidance: bool,
    ignored: Sequence[str] = (),
) -> dict[str, float]:
    """What the network is called with for a caller's guidance; logs a warning about what has no effect.

    A student's guidance is distilled into it: it is called once per step, without a negative prompt. As in diffusers'
    pipelines of distilled models, guidance that is asked for nevertheless has no effect. Networks such as FLUX.1 dev
    take the scale as an input, and are given it.

    Args:
        guidance_scale: of the call; None for the student's own.
        true_cfg_scale: of classifier-free guidance where `guidance_scale` is a network's input.
        negative_prompt: of the call.
        card: the student's.
        takes_guidance: whether the network takes the scale as an input.
        ignored: names of further arguments that have no effect for the same reason.

    Raises:
        UserError: a scale is not a number of at least 0, or the negative prompt is no text.
    """
    for name, scale in (("guidance_scale", guidance_scale), ("true_cfg_scale", true_cfg_scale)):
        real = isinstance(scale, Real) and not isinstance(scale, bool)
        if scale is not None and not (real and math.isfinite(scale) and scale >= 0):
            raise UserError(f"{name} must be a number of at least 0, got {_form(scale)}.")
    how = card.teacher_sampler
    if takes_guidance and guidance_scale not in (None, how.embedded_guidance_scale):
        log.warning(
            "guidance_scale %g is given to the network, but this student was distilled at %s: images may be worse.",
            guidance_scale,
            how.embedded_guidance_scale,
        )
    without_effect = [
        f"{name} {scale:g}"
        for name, scale in (
            ("guidance_scale", None if takes_guidance else guidance_scale),
            ("true_cfg_scale", true_cfg_scale),
        )
        if scale is not None and scale > 1 and scale != how.guidance_scale
    ]
    if _says_something("negative_prompt", negative_prompt):
        without_effect.append("negative_prompt")
    without_effect += ignored
    if without_effect:
        log.warning(
            "without effect: %s, because guidance of scale %g is distilled into this student.",
            ", ".join(without_effect),
            how.embedded_guidance_scale if takes_guidance else how.guidance_scale,
        )
    return {"guidance_scale": float(guidance_scale)} if takes_guidance and guidance_scale is not None else {}


def asked_tensors(names: Sequence[str], callback: StepEnd | None) -> list[str]:
    """The names of the tensors that a callback gets.

    Args:
        names: as the caller gave them.
        callback: diffusers' own callback objects say themselves what they want.

    Raises:
        UserError: one is not known, they are no list, or the callback can't be called.
    """
    if callback is not None and not callable(callback):
        raise UserError(
            f"callback_on_step_end must be a function or a callback object, got {_form(callback)}."
        )
    asked = [names] if isinstance(names, str) else getattr(callback, "tensor_inputs", names) or []
    if not isinstance(asked, Sequence | Set):
        raise UserError(f"callback_on_step_end_tensor_inputs must be a list of names, got {_form(asked)}.")
    names = list(asked)
    if unknown := [name for name in names if name not in CALLBACK_TENSORS]:
        raise UserError(
            f"callback_on_step_end_tensor_inputs: {', '.join(map(str, unknown))} is not among "
            f"{', '.join(CALLBACK_TENSORS)}."
        )
    return names


def changed_by(
    callback: StepEnd, pipeline: Any, index: int, left: float, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Call a callback at the end of a step: the tensors that the next step begins with, by name.

    Args:
        callback: as the caller gave it.
        pipeline: its first argument.
        index: of the step, from 0.
        left: share of evaluations that are left.
        tensors: the present ones that it asked for.

    Raises:
        UserError: it returns no mapping, what it did not ask for, or a tensor of another shape.
    """
    returned: Any = callback(pipeline, index, left, dict(tensors))
    given = {} if returned is None else returned
    if not isinstance(given, Mapping):
        raise UserError(
            f"callback_on_step_end returned {_form(given)}: it may return None, or a dict of tensors by name."
        )
    for name, tensor in given.items():
        if (
            name not in tensors
            or not isinstance(tensor, Tensor)
            or tensor.is_meta
            or tensor.shape != tensors[name].shape
        ):
            raise UserError(
                f"callback_on_step_end returned {name} of {_form(tensor)}: it may return only "
                f"{', '.join(f'{known} of {_form(one)}' for known, one in tensors.items())}."
            )
    return {name: given.get(name, tensor).to(tensor) for name, tensor in tensors.items()}


def images_as(pixels: np.ndarray, output_type: OutputType, device: torch.device) -> Any:
    """Images (B, H, W, 3) uint8 in the form asked for, as diffusers gives them.

    Returns:
        A list of PIL images; or floats from 0 to 1, as an array (B, H, W, 3) or, on `device`, a tensor (B, 3, H, W).
    """
    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(image) for image in pixels]
    scaled = pixels.astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).movedim(-1, 1).contiguous().to(device)
