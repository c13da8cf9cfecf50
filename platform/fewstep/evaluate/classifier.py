"""A small classifier of a class-conditional set: whether a sample shows its class, and features of that set's own.

EfficientNet's features (`features.py`) know photographs; those of a network trained on the very set see what
matters in it. Classifiers for known sets of classes ship with fewstep; `jobs/train_classifier.py` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.assets import asset
from fewstep.data.autoencoder import GREY, load_autoencoder
from fewstep.data.labels import class_names

BUNDLED = {"labels:fashion-mnist": "fashion_classifier/model.safetensors"}
"""Label encoder's name → the weights of its classifier among the assets."""

WIDTHS = (32, 64, 128)
"""Channels of the three convolutions; the last is the number of features."""

BATCH = 256


class Classifier(nn.Module):
    """Three convolutions with batch norm, the mean over positions as features, and a linear layer to the classes.

    Args:
        classes: how many.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width in zip((1, *WIDTHS), WIDTHS, strict=False):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.body = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(WIDTHS[-1], classes)

    @classmethod
    def bundled(cls, encoder: str, device: str | torch.device = "cpu") -> Classifier | None:
        """The classifier that ships for a label encoder's classes (`labels:fashion-mnist`), or None."""
        if encoder not in BUNDLED:
            return None
        classifier = cls(len(class_names(encoder)))
        classifier.load_state_dict({k: v.float() for k, v in load_file(asset(BUNDLED[encoder])).items()})
        return classifier.to(device).eval().requires_grad_(False)

    def forward(self, brightness: Tensor) -> Tensor:
        """(B, 1, H, W) in [−1, 1] → class scores (B, classes)."""
        return self.head(self.body(brightness))

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of (N, H, W, 3) uint8 images as (N, 128) float32."""
        return torch.cat([self.body(batch).cpu() for batch in self._batches(images)]).numpy()

    @torch.inference_mode()
    def classify(self, images: np.ndarray) -> np.ndarray:
        """The likeliest class of each of (N, H, W, 3) uint8 images, (N,) int64."""
        return self.classes_of(self.features(images))

    @torch.inference_mode()
    def classes_of(self, features: np.ndarray) -> np.ndarray:
        """The same from the images' features, (N, 128)."""
        return self.head(torch.from_numpy(features).to(self.head.weight.device)).argmax(1).cpu().numpy()

    def _batches(self, images: np.ndarray) -> Iterator[Tensor]:
        for batch in torch.from_numpy(np.ascontiguousarray(images)).split(BATCH):
            yield brightness_of(batch).to(self.head.weight.device)


def brightness_of(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 → what a classifier sees, (N, 1, H, W) in [−1, 1]."""
    return load_autoencoder(GREY).encode(images)


def train_classifier(
    brightness: Tensor, labels: Tensor, classes: int, *, epochs: int, seed: int = 0, rate: float = 3e-3
) -> Iterator[tuple[Classifier, float]]:
    """Fit a classifier by cross-entropy, images shifted by up to two pixels and mirrored; yields it each epoch.

    Args:
        brightness: (N, 1, H, W) in [−1, 1].
        labels: (N,) int64.
        classes: how many.
        epochs: passes over the images, the rate falling to zero along a cosine.
        seed: of weights, order and augmentation.
        rate: the first.

    Yields:
        The classifier, which goes on learning, and its mean loss in the epoch.
    """
    torch.manual_seed(seed)
    classifier, batches = Classifier(classes), -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(labels)).split(BATCH):
            shift = torch.randint(-2, 3, (2,)).tolist()
            images = brightness[rows].roll(shift, (2, 3))
            mirrored = torch.rand(len(rows)) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
            loss = nn.functional.cross_entropy(classifier(images), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        yield classifier, total / len(labels)
