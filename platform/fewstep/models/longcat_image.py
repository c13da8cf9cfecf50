"""LongCat-Image: FLUX.1's blocks with a text encoder of its own, 6B parameters; and smaller networks of the class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Transformer
from fewstep.models.flux import Flux, grid
from fewstep.models.packing import PATCH, pack

TEXT_TOKENS = 512
"""Length in tokens of every text; the image's positions follow it."""


@dataclass(frozen=True)
class LongCatImage(Flux):
    """Family of diffusers' `LongCatImageTransformer2DModel`: FLUX.1's, without guidance, pooled text and masks.

    The network attends to the padding of texts, whose states are part of what its text encoder gives: always 512 rows.
    Texts of other encoders, which are shorter, are padded to as many by zeros, so that a sample doesn't depend on the
    others of its batch.
    """

    name = "longcat_image"
    network: ClassVar[str] = "LongCatImageTransformer2DModel"
    pipeline: ClassVar[str] = "LongCatImagePipeline"
    time_embedding: ClassVar[str] = "time_embed"

    def denoise(
        self,
        transformer: Transformer,
        x: Tensor,
        t: Tensor,
        conditioning: TextConditioning,
        guidance_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Call the network; it takes no guidance scale.

        Raises:
            UserError: a text has more than 512 tokens.
        """
        states = conditioning.states
        missing = TEXT_TOKENS - states.shape[1]
        if missing < 0:
            raise UserError(
                f"LongCat-Image takes texts of up to {TEXT_TOKENS} tokens, and one has {states.shape[1]}: prepare the "
                f"data with --max-tokens {TEXT_TOKENS} or less."
            )
        states = F.pad(states, (0, 0, 0, missing))  # rows after the tokens
        rows, columns = (side // PATCH for side in x.shape[-2:])
        # Positions (kind, row, column): a text's tokens lie on the diagonal, and the image begins after 512 of them.
        place = torch.arange(TEXT_TOKENS, device=x.device)
        image = grid(1, rows, columns, device=x.device)
        return transformer(
            hidden_states=pack(x),
            encoder_hidden_states=states,
            timestep=t,
            txt_ids=torch.stack([torch.zeros_like(place), place, place], dim=1),
            img_ids=image + torch.tensor([1, TEXT_TOKENS, TEXT_TOKENS], device=x.device),
            return_dict=False,
        )[0]

    def pooled_width(self, transformer: Transformer) -> int | None:
        """None: the network takes only token states."""
        return None

    def takes_guidance(self, transformer: Transformer) -> bool:
        """False: guidance takes a second pass."""
        return False
