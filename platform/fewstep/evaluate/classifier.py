"""A small classifier for class-conditional datasets: it tells whether an image shows its class, and gives features.

EfficientNet's features (`features.py`) come from photographs; those of a network that was trained on the dataset itself
react to what distinguishes its images. Classifiers for known sets of classes ship with fewstep;
`fewstep train-classifier` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.assets import asset
from fewstep.encoders import GREY, load_autoencoder
from fewstep.encoders.labels import class_names
from fewstep.evaluate.features import in_batches

BUNDLED = {"labels:fashion-mnist": "fashion_classifier/model.safetensors"}
"""Label encoder's name → the weights of its classifier among the assets."""

WIDTHS = (32, 64, 128)
"""Channels of the three convolutions; the last is the number of features."""

BATCH = 256
"""Images that the network sees at a time, in training and afterwards."""


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
        """The classifier that ships for an encoder's classes, such as those of `labels:fashion-mnist`; or None.

        Args:
            encoder: name of the encoder of conditions.
            device: where to compute.
        """
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
        """The most probable class of each of (N, H, W, 3) uint8 images, (N,) int64."""
        return self.classes_of(self.features(images))

    @torch.inference_mode()
    def classes_of(self, features: np.ndarray) -> np.ndarray:
        """The most probable class of each image, (N,) int64, from the images' features, (N, 128)."""
        return self.head(torch.from_numpy(features).to(self.head.weight.device)).argmax(1).cpu().numpy()

    def _batches(self, images: np.ndarray) -> Iterator[Tensor]:
        for batch in in_batches(images, BATCH):
            yield brightness_of(batch).to(self.head.weight.device)


def brightness_of(images: Tensor) -> Tensor:
    """Images as a classifier takes them: (N, H, W, 3) uint8 → (N, 1, H, W) in [−1, 1]."""
    return load_autoencoder(GREY).encode(images)


def train_classifier(
    brightness: Tensor, labels: Tensor, classes: int, *, epochs: int, seed: int = 0, lr: float = 3e-3
) -> Iterator[tuple[Classifier, float]]:
    """Fit a classifier by cross-entropy; yields it after each epoch.

    Training images are shifted by up to two pixels, and half of them mirrored.

    Args:
        brightness: (N, 1, H, W) in [−1, 1].
        labels: (N,) int64.
        classes: how many.
        epochs: passes over the images, the learning rate falling to zero along a cosine.
        seed: of weights, order and augmentation.
        lr: the first learning rate.

    Yields:
        The classifier, which goes on learning, and its mean loss in the epoch.
    """
    torch.manual_seed(seed)
    classifier, batches = Classifier(classes), -(-len(labels) // BATCH)
    # Label smoothing (below) and augmentation: the set is small, and features should not depend on single pixels.
    optimizer = torch.optim.AdamW(classifier.parameters(), lr, weight_decay=0.01)
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
