"""The feature extractor: pinned weights, and features that depend on the image alone."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.errors import UserError
from fewstep.evaluate.features.efficientnet import BATCH, FEATURES, EfficientNetLite0


@pytest.fixture(scope="module")
def extractor():
    return EfficientNetLite0.load()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (BATCH + 2, 16, 16, 3), dtype=np.uint8)


def test_features_are_one_finite_row_per_image(extractor, images):
    features = extractor.features(images[:3])
    assert features.shape == (3, FEATURES)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


def test_features_of_the_same_images_are_the_same_bits(extractor, images):
    np.testing.assert_array_equal(
        extractor.features(images[:4]), EfficientNetLite0.load().features(images[:4])
    )


def test_an_image_has_the_same_features_alone_and_in_any_batch(extractor, images):
    together = extractor.features(images)
    for index in (0, BATCH - 1, BATCH + 1):
        alone = extractor.features(images[index : index + 1])[0]
        np.testing.assert_allclose(alone, together[index], atol=1e-4)


def test_features_tell_channels_apart_and_keep_their_order(extractor):
    colours = np.zeros((3, 16, 16, 3), dtype=np.uint8)
    for channel in range(3):
        colours[channel, 4:12, 4:12, channel] = 255
    features = extractor.features(colours)
    assert np.linalg.norm(features[0] - features[1]) > 5
    np.testing.assert_allclose(extractor.features(colours[::-1]), features[::-1], atol=1e-4)


def test_a_changed_weights_file_is_refused(tmp_path):
    changed = tmp_path / "weights.pth"
    changed.write_bytes(b"not the weights")
    with pytest.raises(UserError, match=r"weights\.pth has SHA-256 .* reinstall it"):
        EfficientNetLite0.load(weights=changed)
