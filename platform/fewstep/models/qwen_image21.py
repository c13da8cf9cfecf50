"""Qwen-Image 2.1: a single-stream transformer of 32 blocks, 7B parameters, in which texts know nothing of the time."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fewstep.errors import UserError
from fewstep.models.cached_texts import CachedText, CachedTexts
from fewstep.models.conditioning import Conditioning, TextConditioning
from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.family import Transformer

SLOT = 4
"""Tokens of an image that stand in one place of the network's joint sequence: 2×2 latent cells."""


class QwenImage21(DiffusersFamily):
    """Family of diffusers' `QwenImage21Transformer2DModel`.

    A text's tokens see neither the image nor the time: they are modulated as at t = 0, and attend only to the text
    before them. So `prepare` computes a text's keys and values once, and each call computes the image's tokens alone.

    In the network an image's position is that behind its text, padding included, so that padding moves the image away
    from its text. Here the texts' keys move with it: captions of different lengths are one batch, in which each sample
    is as alone.
    """

    name = "qwen_image21"
    network: ClassVar[str] = "QwenImage21Transformer2DModel"
    pipeline: ClassVar[str] = "QwenImage21Pipeline"
    time_embedding: ClassVar[str] = "time_text_embed"
    time_scale: ClassVar[float] = 1.0

    def embedded_time(self, t: Tensor) -> Tensor:
        """What the module that embeds the time is called with for σ = t, (B + 1,) float32: the last is the texts'."""
        return torch.cat([t.float(), t.new_zeros(1, dtype=torch.float32)])

    def prepare(self, transformer: Transformer, conditioning: Conditioning) -> Conditioning:
        """Texts as the keys and values of every block.

        Raises:
            UserError: in this network, texts depend on the time.
        """
        if not isinstance(conditioning, TextConditioning):
            return conditioning
        if not transformer.config.causal_condition:
            raise UserError(
                "family qwen_image21: a network with causal_condition=false is not supported, as its texts depend on "
                "the time: use one with causal_condition=true, such as the published one."
            )
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        states, batch = conditioning.states, len(conditioning)
        cache = QwenImage21KVCache(len(transformer.transformer_blocks))
        # With the smallest image there is, whose result is not used. Texts do not see it, nor the padding behind them.
        [output] = transformer(
            hidden_states=states.new_zeros(batch, SLOT, transformer.config.in_channels),
            encoder_hidden_states=states,
            timestep=states.new_zeros(batch),
            **_layout(batch, states.shape[1], 2, 2, states.device),
            kv_cache=cache,
            kv_cache_mode="extract",
            return_dict=False,
        )
        pairs = [tensor for layer in cache.layer_caches for tensor in layer.get()]
        if output.requires_grad:
            pairs = _AfterOutput.apply(output, *pairs)
        # (blocks · 2, B) tensors (L, heads, width): unbound rather than indexed, which would be slow to differentiate
        rows = zip(*(tensor.unbind() for tensor in pairs), strict=True)
        texts = []
        for length, row in zip(conditioning.mask.sum(1).tolist(), rows, strict=True):
            # Copied: a text then keeps no padding, nor the other texts of its batch, in memory.
            own = tuple(tensor[:length].clone() for tensor in row)
            texts.append(CachedText(own[::2], own[1::2]))
        return CachedTexts(tuple(texts))

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network; it takes no guidance scale.

        Raises:
            UserError: a side of the latents is odd.
        """
        batch, _, height, width = x.shape
        if height % 2 or width % 2:
            raise UserError(
                f"family qwen_image21: latents of {height}x{width} can't be cut into the network's groups of 2x2 "
                "cells: choose an image size whose sides are multiples of 32 pixels."
            )
        if x.is_meta:
            return _planned(transformer, x, t, conditioning.tensors[0])
        texts = self.prepare(transformer, conditioning)
        assert isinstance(texts, CachedTexts), "this family takes texts"
        longest = max(texts.lengths)
        padding = torch.tensor([longest - length for length in texts.lengths])
        mask = None
        if padding.any():
            mask = torch.arange(longest) < longest - padding[:, None]  # (B, L), on the CPU
            mask = mask.to(x.device, non_blocking=True)
        # Of the text's own states only their number is used: the cache has all else.
        width_of_states = self.condition_width(transformer)
        return transformer(
            hidden_states=x.flatten(2).mT,
            encoder_hidden_states=x.new_zeros(batch, longest, width_of_states),
            encoder_hidden_states_mask=mask,
            timestep=t,
            **_layout(batch, longest, height, width, x.device),
            kv_cache=_filled(transformer, texts, padding),
            kv_cache_mode="cached",
            return_dict=False,
        )[0]

    def latent_channels(self, transformer: Transformer) -> int:
        """Latent channels C."""
        return transformer.config.in_channels

    def condition_width(self, transformer: Transformer) -> int:
        """Width D of the token states."""
        return transformer.config.context_in_dim

    def patch(self, transformer: Transformer) -> int:
        """1: each latent cell is a token."""
        return 1

    def unpack(self, tokens: Tensor, channels: int, height: int, width: int) -> Tensor:
        """Tokens (B, H·W, n·c) → n latents per sample, (B, n, c, H, W)."""
        return tokens.mT.reshape(len(tokens), -1, channels, height, width)

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """The FFN of every block, which texts and images share, and the time embedding."""
        return [
            "img_mlp.proj",
            "img_mlp.gate_layer",
            "img_mlp.out",
            "timestep_embedder.linear_1",
            "timestep_embedder.linear_2",
        ]

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Its transformer blocks."""
        return list(transformer.transformer_blocks)

    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """None."""
        return []


def _planned(transformer: Transformer, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """What a call of texts and images together takes, on the meta device, where the network's own can't read masks."""
    hidden = torch.cat([transformer.txt_in(states), transformer.img_in(x.flatten(2).mT)], dim=1)
    embedding = transformer.time_text_embed(t, hidden)
    modulation = transformer.modulation(embedding)
    for block in transformer.transformer_blocks:
        if torch.is_grad_enabled() and transformer.gradient_checkpointing:
            hidden = transformer._gradient_checkpointing_func(block, hidden, modulation)
        else:
            hidden = block(hidden, modulation)
    return transformer.proj_out(transformer.norm_out(hidden[:, states.shape[1] :], embedding))


def _layout(batch: int, text: int, height: int, width: int, device: torch.device) -> dict[str, Any]:
    """Arguments that say where in the joint sequence texts of so many tokens and images of such latents are."""
    mask = torch.arange(text + height * width // SLOT, device=device) >= text
    return {"img_mask": mask.expand(batch, -1), "img_shapes": [[(1, height, width)]] * batch}


def _filled(transformer: Transformer, texts: CachedTexts, padding: Tensor) -> Any:
    """The network's own cache with these texts, each padded to the longest by the tokens that `padding` (B,) counts."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache, shift = QwenImage21KVCache(len(transformer.transformer_blocks)), None
    if padding.any():
        # Rotations by so many frames: (B, 1, 1, pairs of the frames' axis) complex
        table = transformer.pos_embed.freqs[0]
        device = texts.tensors[0].device
        shift = table.cpu()[padding][:, None, None].to(device, non_blocking=True)
    for index, layer in enumerate(cache.layer_caches):
        keys = pad_sequence([text.keys[index] for text in texts.texts], batch_first=True)
        values = pad_sequence([text.values[index] for text in texts.texts], batch_first=True)
        layer.store(keys if shift is None else _moved(keys, shift), values)
    return cache


def _moved(keys: Tensor, shift: Tensor) -> Tensor:
    """Keys (B, L, heads, width) moved along the axis of frames alone, whose pairs of numbers are the first."""
    ours, others = keys.split([2 * shift.shape[-1], keys.shape[-1] - 2 * shift.shape[-1]], dim=-1)
    pairs = torch.view_as_complex(ours.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([torch.view_as_real(pairs * shift).flatten(-2).type_as(keys), others], dim=-1)


class _AfterOutput(torch.autograd.Function):
    """Gives keys and values as they are; in backward, the network's output comes first, with a gradient of zero.

    Blocks leave keys and values beside their output. FSDP gathers a block's weights for its backward when the gradient
    of its output is there, and so must see one before the keys' and values' own gradients go on into the block.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *pairs: Tensor) -> tuple[Tensor, ...]:
        ctx.shape, ctx.like = output.shape, output.new_empty(0)
        return tuple(tensor.view_as(tensor) for tensor in pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (ctx.like.new_zeros(()).expand(ctx.shape), *grads)
