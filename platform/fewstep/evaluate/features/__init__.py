"""Networks whose features images are compared in.

`efficientnet` comes with a pinned package. `torchscript` and `vision` load those that papers use, where a
user has them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from fewstep.errors import UserError

FORMS = "efficientnet, inception:FILE, clip:MODEL or dinov2:MODEL"
"""What `load_features` understands."""


class FeatureExtractor(Protocol):
    """Interface of a network whose features images are compared in."""

    name: str
    """Of the network, for tables."""

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of (N, H, W, 3) uint8 images, (N, D) float32."""
        ...


def load_features(spec: str, device: str | torch.device = "cpu") -> FeatureExtractor:
    """The network of a setting.

    Args:
        spec: `efficientnet`; `inception:FILE`, the TorchScript file of Inception-v3 that the FIDs of StyleGAN and EDM
            are made with; `clip:MODEL` or `dinov2:MODEL`, a folder or hub id of transformers'.
        device: where to compute.

    Raises:
        UserError: there is no such kind, file or model.
    """
    kind, _, place = spec.partition(":")
    if spec == "efficientnet":
        from fewstep.evaluate.features.efficientnet import EfficientNetLite0

        return EfficientNetLite0.load(device)
    if kind == "inception" and place:
        from fewstep.evaluate.features.torchscript import Inception

        return Inception(place, device)
    if kind == "clip" and place:
        from fewstep.evaluate.features.vision import CLIP

        return CLIP.load(place, device)
    if kind == "dinov2" and place:
        from fewstep.evaluate.features.vision import DINOv2

        return DINOv2.load(place, device)
    raise UserError(f"evaluation.features: there is no network {spec!r}: give {FORMS}.")


def in_batches(images: np.ndarray, size: int) -> list[torch.Tensor]:
    """(N, H, W, 3) uint8 images as tensors of at most so many each."""
    return list(torch.from_numpy(np.ascontiguousarray(images)).split(size))
