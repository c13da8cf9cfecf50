"""Qwen-Image and Qwen-Image-Edit: dual-stream transformers of 60 blocks, 20B parameters; and smaller ones."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Transformer
from fewstep.models.packing import PATCH, PackedFamily, own_tokens, pack_all


class QwenImage(PackedFamily):
    """Family of diffusers' `QwenImageTransformer2DModel`."""

    name = "qwen_image"
    network: ClassVar[str] = "QwenImageTransformer2DModel"
    pipeline: ClassVar[str] = "QwenImagePipeline"
    time_embedding: ClassVar[str] = "time_text_embed"
    time_scale: ClassVar[float] = 1.0
    takes_references: ClassVar[bool] = True

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: TextConditioning,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network; it takes no guidance scale. Tokens of reference images follow those of the latents."""
        references = conditioning.references
        # (frames, rows, columns) of each image of a sample, for rotary positions
        shapes = [(1, image.shape[-2] // PATCH, image.shape[-1] // PATCH) for image in (x, *references)]
        tokens = transformer(
            hidden_states=pack_all(x, references),
            encoder_hidden_states=conditioning.states,
            encoder_hidden_states_mask=conditioning.mask,
            timestep=t,
            # Lists in a list, because networks that embed the time of further images as 0 (Qwen-Image-Edit-2511) take
            # no others.
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )[0]
        return own_tokens(tokens, x)

    def unsupported(self, transformer: Transformer) -> str | None:
        """The further condition on the time of layered networks."""
        return "an additional condition on the time" if transformer.config.use_additional_t_cond else None

    def lora_targets(self, transformer: Transformer) -> list[str]:
        """Image and text FFNs, but not the last block's text FFN, and the time embedding (METHOD.md section 5)."""
        last = len(transformer.transformer_blocks) - 1
        text = [
            f"transformer_blocks.{index}.txt_mlp.{layer}"
            for index in range(last)  # the last block's text stream never reaches the output
            for layer in ("net.0.proj", "net.2")
        ]
        return [
            "img_mlp.net.0.proj",
            "img_mlp.net.2",
            "timestep_embedder.linear_1",
            "timestep_embedder.linear_2",
            *text,
        ]

    def blocks(self, transformer: Transformer) -> list[nn.Module]:
        """Its transformer blocks."""
        return list(transformer.transformer_blocks)

    def unused_parameters(self, transformer: Transformer) -> list[str]:
        """The text branch of the last block: nothing reads its output."""
        last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}."
        # The last block's attention still reads text keys and values: those are used.
        dead = (
            f"{last}attn.to_add_out.",
            f"{last}txt_mlp.",
            f"{last}attn.norm_added_q.",
            f"{last}attn.add_q_proj.",
        )
        return [name for name, _ in transformer.named_parameters() if name.startswith(dead)]
