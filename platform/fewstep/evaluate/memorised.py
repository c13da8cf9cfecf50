"""Whether generated images repeat training images: the nearest of those, as the features see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from fewstep.evaluate import metrics
from fewstep.evaluate.features import FeatureExtractor
from fewstep.evaluate.grid import GridRow, comparison_grid

COLUMNS = 10
"""Images in the picture."""


@dataclass(frozen=True)
class Memorised:
    """What some sets of images may repeat of the training."""

    shares: Mapping[str, metrics.Estimate]
    """Per set, the share of images that are nearer to a training image than 19 of 20 unseen real images are."""
    picture: Image
    """Of the first set the images that are nearest to a training image, and the other sets' of the same captions, each
    above the training image that it is nearest to."""


def find_memorised(
    images: Mapping[str, np.ndarray],
    real: np.ndarray,
    training: np.ndarray,
    captions: Sequence[str],
    extractor: FeatureExtractor,
) -> Memorised:
    """Look for the training images that generated ones are nearest to.

    Args:
        images: per name of a set, (N, H, W, 3) uint8, image i of caption i in each.
        real: the captions' real images, (N, H, W, 3) uint8, which no model has seen in its training.
        training: (M, H, W, 3) uint8.
        captions: the N captions.
        extractor: of the features.
    """
    known = extractor.features(training)
    unseen, _ = metrics.nearest(extractor.features(real), known)
    found = {name: metrics.nearest(extractor.features(one), known) for name, one in images.items()}
    distances, _ = next(iter(found.values()))
    chosen = np.argsort(distances)[:COLUMNS]
    rows = []
    for name, (_, index) in found.items():
        rows.append(
            GridRow(name.partition("_")[0], name.partition("_")[2] + " steps", images[name][chosen], True)
        )
        rows.append(GridRow("training", "nearest image", training[index[chosen]]))
    return Memorised(
        {name: metrics.nearer_than_unseen(own, unseen) for name, (own, _) in found.items()},
        comparison_grid(rows, [captions[index] for index in chosen]),
    )
