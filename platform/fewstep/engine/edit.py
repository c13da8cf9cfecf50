"""Edits: reference images that an image is made from, and the part of the first of them that has to stay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


# Compared by identity: all images of a request share one, whose references are encoded once.
@dataclass(frozen=True, eq=False)
class Edit:
    """What images are made from, beside their prompt."""

    references: np.ndarray
    """(N, H, W, 3) uint8, at the size of the result."""
    changes: np.ndarray | None = None
    """(H, W) bool, False where the first reference stays as it is; None: everything may change."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the references and of the result."""
        _, height, width, _ = self.references.shape
        return height, width

    def kept(self, pixels: np.ndarray) -> np.ndarray:
        """A result (H, W, 3) uint8 with the pixels of the first reference that have to stay."""
        if self.changes is None:
            return pixels
        return np.where(self.changes[..., None], pixels, self.references[0])


class KeptPart:
    """The cells of a latent that follow the reference image through all steps (blended latents).

    What is generated around them so fits to them. A cell of which any pixel may change is generated.

    Args:
        changes: (H, W) bool, False for pixels that have to stay.
        original: the reference's latent, (1, C, h, w).
        noise: that the image begins with, (1, C, h, w).
    """

    def __init__(self, changes: np.ndarray, original: Tensor, noise: Tensor) -> None:
        self._original, self._noise = original, noise
        pixels = torch.tensor(changes)[None, None].float()
        self._changes = F.adaptive_max_pool2d(pixels, tuple(noise.shape[-2:])) > 0  # (1, 1, h, w)

    def put_into(self, x: Tensor, sigma: float) -> Tensor:
        """A state (1, C, h, w) at this σ, with the noised reference in the cells that have to stay."""
        return torch.where(self._changes, x, (1 - sigma) * self._original + sigma * self._noise)
