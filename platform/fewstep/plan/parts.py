"""The parts of a student's pipeline beside its network, text encoder and autoencoder, without their weights."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.assets import expanded
from fewstep.config import Precision
from fewstep.encoders.autoencoders import GREY, KINDS, PIXEL, KLAutoencoder, place_of
from fewstep.encoders.base import LABELS, of_pipeline
from fewstep.encoders.pipelines import text_models
from fewstep.encoders.text import loading
from fewstep.errors import UserError
from fewstep.models.architecture import known_config
from fewstep.models.precision import LIBRARIES, bytes_of

ENCODERS = {
    "flux": "flux",
    "flux2": "flux2",
    "krea2": "krea2",
    "longcat_image": "longcat-image",
    "qwen_image": "qwen-image",
    "qwen_image21": "qwen-image-2.1",
    "sd3": "sd3",
    "wan": "wan",
    "z_image": "z-image",
}
"""Family of a network → prefix of the name of its pipeline's own text encoder."""

UNKNOWN = "?"
"""Stands for the name of a part that only a student's card or prepared data would tell."""


def text_encoder_bytes(name: str, precision: Precision) -> int | None:
    """Bytes that a text encoder's weights take; None where its configuration is not found here.

    Args:
        name: as for `load_encoder`.
        precision: of its weights; with "int8" and "int4", of those of its linear layers, and the others are bfloat16.
    """
    if name.startswith(LABELS):
        return 0
    try:
        models = _text_models(name)
    except (UserError, OSError, ValueError):
        return None
    return sum(_weights(model, precision) for model in models)


def _weights(model: nn.Module, precision: Precision) -> int:
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    others: Precision = "bfloat16" if precision in LIBRARIES else precision
    return sum(bytes_of(p.numel(), precision if id(p) in linear else others) for p in model.parameters())


def _text_models(name: str) -> list[nn.Module]:
    """The transformers models of a text encoder, on the meta device.

    Raises:
        UserError, OSError, ValueError: a configuration is not found.
    """
    import transformers
    from transformers import AutoConfig

    kind, place = of_pipeline(name), name.partition(":")[2]
    kinds = text_models(name)
    known = known_config(place, "text_encoder") if kind else None
    if known is not None:
        configs = [AutoConfig.for_model(**config) for config in known]
    else:
        with loading(name) as where:
            folders = [{"subfolder": f"text_encoder{number}"} if kind else {} for number in kinds]
            configs = [AutoConfig.from_pretrained(**where, **folder) for folder in folders]
    with torch.device("meta"):
        # AutoModel finds the class by the configuration; the classes themselves have another method.
        classes = [getattr(transformers, kind) for kind in kinds.values()]
        makers = [getattr(kind, "_from_config", None) or kind.from_config for kind in classes]
        return [make(config) for make, config in zip(makers, configs, strict=True)]


def autoencoder_on_meta(name: str, precision: Precision) -> KLAutoencoder | None:
    """An autoencoder on the meta device; None where its latents are pixels.

    Args:
        name: as for `load_autoencoder`.
        precision: of its weights, "float32" or "bfloat16".

    Raises:
        LookupError: its configuration is not found here.
    """
    if name in (PIXEL, GREY):
        return None
    import diffusers

    place, subfolder, _ = place_of(name)
    config = known_config(place, "vae")
    if config is None:
        try:
            folder = expanded(place)
            config = diffusers.AutoencoderKL.load_config(
                str(folder) if folder.is_dir() else place,
                subfolder=subfolder,
                local_files_only=folder.is_dir(),
            )
        except (OSError, ValueError) as error:
            raise LookupError(name) from error
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise LookupError(name)
    with torch.device("meta"):
        model = getattr(diffusers, kind).from_config(config)
    if precision == "bfloat16":
        for weight in model.parameters():  # as `load_autoencoder` does
            weight.data = weight.data.to(torch.bfloat16)
    return KINDS[kind](name, model.eval().requires_grad_(False))


def usual_parts(family: str, teacher: str) -> tuple[str, str]:
    """Names of text encoder and autoencoder of a teacher's pipeline, for a student that has no card yet.

    Args:
        family: of the teacher.
        teacher: the folder or hub id of its pipeline.
    """
    base, colon, frames = family.partition(":")
    if base not in ENCODERS:
        return LABELS if family == "dit" else UNKNOWN, UNKNOWN
    return f"{ENCODERS[base]}:{teacher}", f"{teacher}:vae{colon}{frames}"
