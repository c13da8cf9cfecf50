"""The figures of an evaluation: their names in words, how they are written, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """One figure of a method."""

    head: str
    """Of its column."""
    digits: int
    """After the point."""
    better: Literal["lower", "higher"]
    """Which way is better."""
    meaning: str
    """In a sentence's part."""

    def write(self, value: float) -> str:
        """A value of it as text."""
        return f"{value:.{self.digits}f}".replace("-", "−")


FIGURES = {
    "kid_teacher": Figure("KID to teacher", 2, "lower", "10⁻³, against the teacher's images from other noise"),
    "kid_real": Figure("KID to real", 1, "lower", "10⁻³, against the captions' real images"),
    "fd_teacher": Figure("FD to teacher", 2, "lower", "Fréchet distance to the teacher's images from other noise"),
    "fd_real": Figure("FD to real", 2, "lower", "Fréchet distance to the captions' real images"),
    "paired_distance": Figure("paired", 2, "lower", "feature distance to the teacher's image of the same noise"),
    "lpips": Figure("LPIPS", 3, "lower", "learned perceptual distance to that image"),
    "pixel_rmse": Figure("pixel", 3, "lower", "root mean square error to that image, pixels in [−1, 1]"),
    "diversity": Figure("diversity", 2, "higher", "mean feature distance of two images; the teacher's is the target"),
    "vendi": Figure("Vendi", 0, "higher", "effective number of different images; the teacher's is the target"),
    "prompt_diversity": Figure(
        "per prompt", 2, "higher", "mean feature distance of two images of one caption; the teacher's is the target"
    ),
    "prompt_vendi": Figure(
        "Vendi per prompt", 2, "higher", "effective number of different images of one caption; likewise"
    ),
    "precision": Figure("precision", 2, "higher", "share of images that lie among the real ones"),
    "recall": Figure("recall", 2, "higher", "share of real images that lie among the generated ones"),
    "density": Figure("density", 2, "higher", "real images' neighbourhoods that an image lies in; 1 for real ones"),
    "coverage": Figure("coverage", 2, "higher", "share of real images with a generated one near"),
    "memorised": Figure(
        "memorised", 2, "lower", "share nearer to a training image than 19 of 20 unseen real ones, of which it is 0.05"
    ),
    "clip_score": Figure("CLIP score", 1, "higher", "100 times the cosine of CLIP's features of image and caption"),
    "retrieval_1": Figure("R@1", 2, "higher", "share of images whose own caption fits best to CLIP, of all captions"),
    "retrieval_5": Figure("R@5", 2, "higher", "share of images whose own caption is among the best five"),
    "frechet": Figure("Fréchet", 3, "lower", "distance to real images in a classifier's features"),
    "accuracy": Figure("accuracy", 3, "higher", "share of images in which it sees the class that was asked for"),
}  # fmt: skip
"""Field of `MethodResult` → what it is, in the order of tables."""
