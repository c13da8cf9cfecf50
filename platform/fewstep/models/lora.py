"""LoRA layers that are folded into the weight where that is less work."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class FoldedLoRALinear(Linear):
    """peft's LoRA of a linear layer, computed as x·(W + B·A)ᵀ where the layer is narrow for its rank.

    Per token and training step the adapter beside the layer costs 3·r·(in + out) multiplications, the gradient
    of a folded weight in·out. Wide layers (3,072 by 12,288 at rank 256) are left to peft. The parameters are
    peft's own either way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or not self._folds():
            return super().forward(x, *args, **kwargs)
        base, [adapter] = self.get_base_layer(), self.active_adapters
        return F.linear(x, base.weight + self.get_delta_weight(adapter), base.bias)

    def _folds(self) -> bool:
        [adapter] = self.active_adapters
        dropout = self.lora_dropout[adapter]
        if dropout.training and not isinstance(dropout, nn.Identity):
            return False  # dropout is on the adapter's own input
        return (
            3 * self.r[adapter] * (self.in_features + self.out_features)
            > self.in_features * self.out_features
        )
