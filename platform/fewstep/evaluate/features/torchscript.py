"""Networks that are given as TorchScript files: Inception-v3 of FID, and VGG16 of LPIPS.

Both files are those of StyleGAN's metrics, which EDM and others use too. Inception's has the weights of the TensorFlow
graph that published FIDs are defined by, and that graph's own way of enlarging images (bilinear, to 299 × 299, without
alignment of corners), which is what makes FIDs comparable; any other resizing changes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.errors import UserError, one_line
from fewstep.evaluate.features import in_batches

BATCH = 32
"""Images that a network sees at a time."""
LEAST_SIDE = 64
"""LPIPS is taken of images of at least this side: VGG16 halves it four times."""


class Inception:
    """Inception-v3's 2,048 features before the last layer.

    Args:
        path: the file `inception-v3-2015-12-05.pt`.
        device: where to compute.

    Raises:
        UserError: there is no such file, or it is none of TorchScript.
    """

    name = "Inception-v3"

    def __init__(self, path: str, device: str | torch.device = "cpu") -> None:
        self._network, self._device = _load(path, "evaluation.features", device), device

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of (N, H, W, 3) uint8 images, (N, 2048) float32."""
        made = [
            self._network(batch.to(self._device).permute(0, 3, 1, 2), return_features=True).float().cpu()
            for batch in in_batches(images, BATCH)
        ]
        return torch.cat(made).numpy()


class LPIPS:
    """Learned perceptual distance of two images (Zhang et al. 2018, arXiv 1801.03924), of VGG16.

    Args:
        path: the file `vgg16.pt`, which has LPIPS's weights: its features' squared distance is LPIPS.
        device: where to compute.

    Raises:
        UserError: there is no such file, or it is none of TorchScript.
    """

    def __init__(self, path: str, device: str | torch.device = "cpu") -> None:
        self._network, self._device = _load(path, "evaluation.lpips", device), device

    @torch.inference_mode()
    def distances(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """LPIPS of corresponding images of two sets (N, H, W, 3) uint8, (N,) float32."""
        pairs = zip(in_batches(images, BATCH), in_batches(others, BATCH), strict=True)
        return torch.cat([(self._of(x) - self._of(y)).square().sum(1).cpu() for x, y in pairs]).numpy()

    def _of(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(self._device).permute(0, 3, 1, 2)
        if min(x.shape[2:]) < LEAST_SIDE:
            scale = -(-LEAST_SIDE // min(x.shape[2:]))
            x = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        return self._network(x, resize_images=False, return_lpips=True).float()


def _load(path: str, setting: str, device: str | torch.device) -> Any:
    if not Path(path).is_file():
        raise UserError(f"{setting}: there is no file {path}.")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{setting}: {path} is no TorchScript file: {one_line(error)}") from None
