"""LoRA layers that add the adapter to the weight before the product, where that is less work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UserError
from fewstep.models.precision import is_quantised

FOLDED = "folded"
"""Name of the buffer that holds a folded weight."""


class FoldedLoRALinear(Linear):
    """peft's LoRA of a linear layer, computed as x·(W + B·A)ᵀ where the layer is narrow for its rank.

    Per token and training step, an adapter beside the layer takes 3·r·(in + out) multiplications, and the gradient of
    a folded weight takes in·out. Wide layers (such as 3,072 by 12,288 at rank 256) are computed as peft does.
    Parameters are peft's in both cases.
    """

    product: Callable[..., Tensor] = staticmethod(F.linear)
    """What computes the product with a folded weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x (…, in); with the adapter in the student's role, without it in the teacher's."""
        if self.disable_adapters or self.merged or not self._folds():
            return super().forward(x, *args, **kwargs)
        # Folded beforehand by `keep_folded`; in training at each call, as the adapter changes at every step.
        folded, layer = self._buffers.get(FOLDED), cast(nn.Linear, self.get_base_layer())
        return self.product(x, self._fold() if folded is None else folded, layer.bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter to the weight itself, as peft does.

        Raises:
            UserError: the weight is quantised.
        """
        if is_quantised(cast(nn.Linear, self.get_base_layer()).weight):
            raise UserError(
                "adapters can't be merged into quantised weights: load the student in float32 or bfloat16 to merge."
            )
        super().merge(safe_merge, adapter_names)

    @torch.no_grad()
    def keep_folded(self) -> None:
        """Compute the folded weight once and keep it, when neither weight nor adapter will change any more.

        Layers too wide to fold stay as they are. Folding at each call would be a third of the time of generating a
        single image.
        """
        # Not persistent: state dicts, which adapters are saved from, hold the parameters alone.
        if self._folds():
            # In the weight's own type: a network that computes in bfloat16 would round it so at each call.
            dtype = cast(nn.Linear, self.get_base_layer()).weight.dtype
            self.register_buffer(FOLDED, self._fold().to(dtype), persistent=False)

    def _fold(self) -> Tensor:
        """W + B·A, (out, in), float32, with gradient to the adapter."""
        [adapter] = self.active_adapters
        return cast(nn.Linear, self.get_base_layer()).weight.float() + self.get_delta_weight(adapter)

    def _folds(self) -> bool:
        """Whether folding is less work than the adapter beside the layer, and gives the same result."""
        [adapter] = self.active_adapters
        dropout = self.lora_dropout[adapter]
        if dropout.training and not isinstance(dropout, nn.Identity):
            return False  # dropout acts on the adapter's input alone, not on the layer's
        layer = cast(nn.Linear, self.get_base_layer())
        if is_quantised(layer.weight):
            return False  # the sum would have to be quantised again
        beside = 3 * self.r[adapter] * (layer.in_features + layer.out_features)
        return beside > layer.in_features * layer.out_features
