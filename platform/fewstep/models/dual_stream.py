"""Starting a FLUX network from a Qwen-Image network, whose blocks are FLUX's dual-stream blocks under other names."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.errors import UserError
from fewstep.models.family import Transformer
from fewstep.models.registry import get_family

NAMES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_text_embed.timestep_embedder": "time_text_embed.timestep_embedder",
    "norm_out": "norm_out",
    "proj_out": "proj_out",
}
"""Names of modules outside the blocks, Qwen-Image's → FLUX's."""

BLOCK_NAMES = {
    "img_mod.1": "norm1.linear",
    "txt_mod.1": "norm1_context.linear",
    "attn": "attn",
    "img_mlp": "ff",
    "txt_mlp": "ff_context",
}
"""Names of modules within a block, Qwen-Image's → FLUX's. In the modulations (…mod.1, norm1) of both, shift, scale and
gate of the attention come before those of the MLP."""


def counterparts(flux: Transformer, qwen: Transformer) -> dict[str, str]:
    """Names of `qwen`'s trained parameters → names of the parameters of `flux` that correspond to them.

    Either network may be on the meta device.

    Raises:
        UserError: the networks are of other classes, or of different sizes.
    """
    classes = type(flux).__name__, type(qwen).__name__
    if classes != ("FluxTransformer2DModel", "QwenImageTransformer2DModel"):
        raise UserError(
            "guidance_distillation.from_teacher: only a network of family flux can start from a teacher of family "
            f"qwen_image, and these are {classes[0]} and {classes[1]}: set it to false."
        )
    modules = dict(NAMES)
    for index in range(len(qwen.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        modules |= {f"{block}.{old}": f"{block}.{new}" for old, new in BLOCK_NAMES.items()}
    # FLUX has no norm of the text (`start_from_dual_stream` folds it in), and some parameters never were trained.
    untrained = {"txt_norm.weight", *get_family("qwen_image").unused_parameters(qwen)}
    found = {name: _renamed(name, modules) for name in qwen.state_dict() if name not in untrained}
    shapes, wanted = ({k: v.shape for k, v in network.state_dict().items()} for network in (flux, qwen))
    # By shapes alone, so that networks on the meta device can be checked before a training begins.
    if misfits := [old for old, new in found.items() if shapes.get(new) != wanted[old]]:
        raise UserError(
            f"guidance_distillation.from_teacher: the network has no {found[misfits[0]]} of the teacher's shape "
            f"{tuple(wanted[misfits[0]])}: give it the teacher's width and number of blocks, or set it to false."
        )
    return found


@torch.no_grad()
def start_from_dual_stream(flux: Transformer, qwen: Transformer, text_rms: float) -> None:
    """Give a FLUX network the weights of a Qwen-Image network; parts that only FLUX has get an output of zero.

    These parts (single-stream blocks, pooled text, guidance scale) are learned from there. In Qwen-Image's last block
    the text branch never reached an output; its parameters keep the values that `flux` has. The two networks still
    differ: text is at position 0 instead of behind the image, and each text token keeps its own root mean square
    instead of 1.

    Args:
        flux: diffusers' `FluxTransformer2DModel`, with as many dual-stream blocks as `qwen` has blocks and of its
            width; changed in place.
        qwen: diffusers' `QwenImageTransformer2DModel`.
        text_rms: root mean square of the text encoder's token states, by which they are divided, as `flux` does not
            normalise them.

    Raises:
        UserError: as `counterparts`.
    """
    weights = qwen.state_dict()
    started = {new: weights[old] for old, new in counterparts(flux, qwen).items()}
    started["context_embedder.weight"] = weights["txt_in.weight"] * weights["txt_norm.weight"] / text_rms
    flux.load_state_dict(started, strict=False)  # the rest of FLUX's parameters stays
    embeddings = flux.time_text_embed
    # The last layers before what these parts add to the rest of the network.
    silenced = [embeddings.text_embedder.linear_2, *(b.proj_out for b in flux.single_transformer_blocks)]
    if hasattr(embeddings, "guidance_embedder"):
        silenced.append(embeddings.guidance_embedder.linear_2)
    for layer in silenced:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _renamed(name: str, modules: dict[str, str]) -> str:
    """A parameter's name with that of its module replaced, by the longest of `modules` that it begins with."""
    old = max((module for module in modules if name.startswith(f"{module}.")), key=len)
    return modules[old] + name.removeprefix(old)
