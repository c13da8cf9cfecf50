"""A network's last layer in the form in which policy heads copy it: a linear map of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_SCALE = 1000.0
"""Factor on t in [0, 1] before sinusoids of the usual frequencies, which are made for timesteps up to 1,000."""


class LastProjection(nn.Module):
    """A network's last layer as a linear map of tokens, the form in which heads copy it.

    A k×k convolution is a linear map of each location's k×k neighbourhood. If the layer predicts something else than
    the velocity, tokens are `[b·features, a·x, b]` and the map is `[W, 1, bias]`: u = a·x + b·(W·features + bias). A
    head that copies the map then predicts velocities, too.

    Args:
        layer: the layer.
        mixes_state: whether tokens have the parts a·x and b.
        owns_layer: whether the layer is a submodule of this one; otherwise it is registered only in the network.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, mixes_state: bool, *, owns_layer: bool = False) -> None:
        super().__init__()
        if owns_layer:
            self.layer = layer
        else:
            # Past nn.Module's registry: registered twice, the layer's weights would have two names.
            self.__dict__["layer"] = layer
        self.mixes_state = mixes_state

    @property
    def weight(self) -> Tensor:
        """Weight of the map, (C·p², features)."""
        weight = self.layer.weight.flatten(1)
        if not self.mixes_state:
            return weight
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return torch.cat([weight, identity, self._layer_bias()[:, None]], dim=1)

    @property
    def bias(self) -> Tensor:
        """Bias of the map, (C·p²,)."""
        bias = self._layer_bias()
        # With mixes_state the bias is a column of the weight, as it is multiplied by b.
        return torch.zeros_like(bias) if self.mixes_state else bias

    @property
    def in_features(self) -> int:
        """Features of a token that the map takes."""
        own = self.layer.weight[0].numel()
        return own + self.out_features + 1 if self.mixes_state else own

    @property
    def out_features(self) -> int:
        """Features that the map gives, C·p²."""
        return len(self.layer.weight)

    def tokens(self, hidden: Tensor) -> Tensor:
        """The layer's input as tokens, (B, L, features of the layer)."""
        if isinstance(self.layer, nn.Linear):
            return tokens_of(hidden)
        layer = self.layer
        # (B, L, C_in·k·k): the convolution's input around each location, in the order of its flattened weight
        return F.unfold(hidden, layer.kernel_size, layer.dilation, _padding(layer)).mT

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, features) → (B, L, C·p²)."""
        return F.linear(tokens, self.weight, self.bias)

    def _layer_bias(self) -> Tensor:
        """The layer's bias, zeros if it has none."""
        weight, bias = self.layer.weight, self.layer.bias
        return weight.new_zeros(len(weight)) if bias is None else bias


def time_features(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of t (B,) at frequencies from 1 down to 1/10,000, (B, width) float32."""
    half = (width + 1) // 2  # for an odd width, the last sine is cut off
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = TIME_SCALE * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :width]


def tokens_of(hidden: Tensor) -> Tensor:
    """(B, D) or (B, …, D) → (B, L, D), L being the product of the axes between, or 1."""
    return hidden[:, None] if hidden.ndim == 2 else hidden.flatten(1, -2)


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """A convolution's padding in numbers; torch also takes "same" and "valid"."""
    if isinstance(layer.padding, tuple):
        return layer.padding
    same = layer.padding == "same"
    return tuple(
        d * (k - 1) // 2 if same else 0 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
    )
