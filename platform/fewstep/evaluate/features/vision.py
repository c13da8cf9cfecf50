"""CLIP and DINOv2, from transformers' own files: features of images, and how well images fit captions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError, one_line
from fewstep.evaluate.features import in_batches

BATCH = 32
"""Images, or captions, that a network sees at a time."""


class Aligned(NamedTuple):
    """How well images fit captions."""

    scores: np.ndarray
    """100 · max(cosine, 0) of each image and its own caption, (N,) (Hessel et al. 2021, arXiv 2104.08718)."""
    ranks: np.ndarray
    """How many captions of the set fit each image better than its own, (N,)."""


class _Pictures(ABC):
    """A network of transformers', with the processor that brings images to its size."""

    def __init__(self, model: Any, processor: Any, device: str | torch.device) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self._processor, self._device = processor, device

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of (N, H, W, 3) uint8 images, (N, D) float32."""
        made = []
        for batch in in_batches(images, BATCH):
            pixels = self._processor(images=list(batch.numpy()), return_tensors="pt")["pixel_values"]
            made.append(self._features(pixels.to(self._device)).float().cpu())
        return torch.cat(made).numpy()

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of pixels as the network takes them."""


class DINOv2(_Pictures):
    """DINOv2's class token after its last normalisation, as in Stein et al. 2023 (arXiv 2306.04675)."""

    name = "DINOv2"

    @classmethod
    def load(cls, place: str, device: str | torch.device = "cpu") -> DINOv2:
        """From a folder or hub id, such as facebook/dinov2-large.

        Raises:
            UserError: there is no such model.
        """
        from transformers import AutoImageProcessor, AutoModel

        model, processor = _loaded(place, "evaluation.features", AutoModel, AutoImageProcessor)
        return cls(model, processor, device)

    def _features(self, pixels: Tensor) -> Tensor:
        return self._model(pixel_values=pixels).last_hidden_state[:, 0]


class CLIP(_Pictures):
    """CLIP's image features in the space that it shares with texts.

    Args:
        model: transformers' CLIPModel.
        processor: its image processor.
        device: where to compute.
        tokenizer: for captions; None if only images are looked at.
    """

    name = "CLIP"

    def __init__(self, model: Any, processor: Any, device: str | torch.device, tokenizer: Any = None) -> None:
        super().__init__(model, processor, device)
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, place: str, device: str | torch.device = "cpu") -> CLIP:
        """From a folder or hub id, such as openai/clip-vit-large-patch14.

        Raises:
            UserError: there is no such model.
        """
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        model, processor, tokenizer = _loaded(
            place, "evaluation.clip", CLIPModel, AutoImageProcessor, AutoTokenizer
        )
        return cls(model, processor, device, tokenizer)

    @torch.inference_mode()
    def align(self, images: np.ndarray, captions: Sequence[str]) -> Aligned:
        """How well (N, H, W, 3) uint8 images fit their captions, of which equal ones count as one."""
        distinct = list(dict.fromkeys(captions))
        own = np.array([distinct.index(caption) for caption in captions])
        texts, pictures = self._texts(distinct), self.features(images)
        cosine = _normalised(pictures) @ _normalised(texts).T
        mine = cosine[np.arange(len(own)), own]
        return Aligned(100 * mine.clip(min=0), (cosine > mine[:, None]).sum(1))

    def _texts(self, captions: Sequence[str]) -> np.ndarray:
        made = []
        for start in range(0, len(captions), BATCH):
            tokens = self._tokenizer(
                list(captions[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            made.append(_projected(self._model.get_text_features(**tokens.to(self._device))).float().cpu())
        return torch.cat(made).numpy()

    def _features(self, pixels: Tensor) -> Tensor:
        return _projected(self._model.get_image_features(pixel_values=pixels))


def _projected(output: Any) -> Tensor:
    """The vectors of CLIP's shared space: transformers 5 returns them as the pooled output of the whole network."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _loaded(place: str, setting: str, *kinds: Any) -> list[Any]:
    """A model and what belongs to it, by transformers' classes."""
    try:
        # Pillow resizes alike on every machine; transformers would use torchvision where there is one.
        return [
            kind.from_pretrained(place, **({"backend": "pil"} if "ImageProcessor" in kind.__name__ else {}))
            for kind in kinds
        ]
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{setting}: {place} can't be loaded: {one_line(error)}") from None
