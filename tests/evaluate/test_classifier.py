"""The classifier of samples: learns what it is shown, and sees the same in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.evaluate.classifier import WIDTHS, Classifier, brightness_of, train_classifier


def striped(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28, 3) uint8 of two classes: vertical and horizontal stripes, in noise."""
    labels = rng.integers(0, 2, count)
    stripes = np.where(np.arange(28) % 4 < 2, 40, 200)
    images = np.where(labels[:, None, None] == 1, stripes[None, :, None], stripes[None, None, :])
    noisy = (images + rng.normal(0, 30, (count, 28, 28))).clip(0, 255).astype(np.uint8)
    return np.repeat(noisy[..., None], 3, axis=-1), labels


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    images, labels = striped(512, np.random.default_rng(0))
    brightness = brightness_of(torch.from_numpy(images))
    *_, (classifier, _) = train_classifier(brightness, torch.from_numpy(labels), 2, epochs=6)
    return classifier.eval()


def test_it_learns_classes_that_it_can_see(classifier: Classifier) -> None:
    images, labels = striped(200, np.random.default_rng(1))
    assert (classifier.classify(images) == labels).mean() > 0.97


def test_features_are_each_images_own(classifier: Classifier) -> None:
    images, _ = striped(300, np.random.default_rng(2))
    features = classifier.features(images)
    assert features.shape == (300, WIDTHS[-1])
    np.testing.assert_allclose(classifier.features(images[250:260]), features[250:260], atol=1e-5)


def test_captions_that_are_no_classes_have_none() -> None:
    assert Classifier.bundled("minilm") is None
    assert Classifier.bundled("labels:cat,dog") is None


def test_the_bundled_one_knows_its_classes() -> None:
    bundled = Classifier.bundled("labels:fashion-mnist")
    blank = np.zeros((3, 28, 28, 3), np.uint8)
    assert bundled(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert np.isfinite(bundled.features(blank)).all()
