"""LoRA layers that are folded into the weight where that is less work."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

FOLDED = "folded"
"""Name of the buffer that holds a folded weight."""


class FoldedLoRALinear(Linear):
    """peft's LoRA of a linear layer, computed as x·(W + B·A)ᵀ where the layer is narrow for its rank.

    Per token and training step the adapter beside the layer costs 3·r·(in + out) multiplications, the gradient
    of a folded weight in·out. Wide layers (3,072 by 12,288 at rank 256) are left to peft. The parameters are
    peft's own either way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or not self._folds():
            return super().forward(x, *args, **kwargs)
        folded = self._buffers.get(FOLDED)
        return F.linear(x, self._fold() if folded is None else folded, self.get_base_layer().bias)

    @torch.no_grad()
    def keep_folded(self) -> None:
        """Fold once and for all, where neither weight nor adapter changes any more; layers too wide to fold stay.

        Generating with one sample, folding at each call is a third of the time.
        """
        if self._folds():
            self.register_buffer(FOLDED, self._fold(), persistent=False)

    def _fold(self) -> Tensor:
        [adapter] = self.active_adapters
        return self.get_base_layer().weight + self.get_delta_weight(adapter)

    def _folds(self) -> bool:
        [adapter] = self.active_adapters
        dropout = self.lora_dropout[adapter]
        if dropout.training and not isinstance(dropout, nn.Identity):
            return False  # dropout is on the adapter's own input
        return (
            3 * self.r[adapter] * (self.in_features + self.out_features)
            > self.in_features * self.out_features
        )
