"""Copies of training images are found, and images like those that nobody trained on are not taken for copies."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.evaluate import metrics
from fewstep.evaluate.memorised import find_memorised


class Pixels:
    """Features that are the pixels themselves."""

    name = "pixels"

    def features(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32)


def test_the_nearest_is_found_and_its_distance_is_euclidean() -> None:
    distances, which = metrics.nearest(
        np.array([[0.0, 0.0], [10.0, 0.0]]), np.array([[9.0, 0.0], [3.0, 4.0]])
    )
    assert which.tolist() == [1, 0]
    assert distances == pytest.approx([5.0, 1.0])


def test_copies_are_memorised_and_new_images_are_as_often_near_as_unseen_real_ones() -> None:
    draw = np.random.default_rng(0)
    training, real, new = (draw.integers(0, 256, (count, 8, 8, 3), np.uint8) for count in (200, 400, 400))
    nearly = training[:100].astype(int).clip(1, 254) + draw.integers(-1, 2, (100, 8, 8, 3))
    copies = np.concatenate([nearly.astype(np.uint8), new[:300]])
    found = find_memorised(
        {"student_4": copies, "teacher_64": new},
        real,
        training,
        [f"caption {index}" for index in range(400)],
        Pixels(),
    )
    assert found.shares["student_4"].value == pytest.approx(0.25 + 0.75 * 0.05, abs=0.03)
    low, high = found.shares["teacher_64"].low, found.shares["teacher_64"].high
    assert low < 0.05 < high
    assert found.picture.width > found.picture.height > 300
