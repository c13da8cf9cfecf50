"""The figures of an evaluation, as pure functions of features (N, D) and images (N, H, W, 3) uint8.

Row i of every set belongs to caption i. That makes two sets dependent even where their noise is not: two images of one
caption resemble each other, whoever generated them. So captions, not images, are the units that are averaged over and
resampled, and no term compares two images of one caption, except in the paired figures, which are made to do so.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

KID_UNIT = 1e-3
"""All KID values are in thousandths of a squared maximum mean discrepancy, as papers tabulate them."""

NORMAL_95 = 1.959964
"""A normal distribution has 95 % of its mass within so many standard deviations of its mean."""


class Estimate(NamedTuple):
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Kernel distance of two sets of features (N, D) over the same N captions, in units of 10⁻³.

    The squared maximum mean discrepancy under Bińkowski et al.'s kernel k(a, b) = (a·b / D + 1)³ (arXiv
    1801.01401, section 4), estimated as the U-statistic of Gretton et al. 2012 (JMLR 13, equation 4) over the
    pairs z_i = (x_i, y_i):

        1 / (N (N − 1)) · Σ_{i≠j} k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(x_j, y_i)

    It is unbiased even though x_i and y_i share a caption. The usual estimator keeps the N terms k(x_i, y_i),
    which is right for independent sets only: two images of one caption are alike, and it comes out too low
    (by 10·10⁻³ for 384 emoji against blurred copies). For equal distributions its expected value is zero, so values
    below zero occur.
    """
    return _mean_off_diagonal(_discrepancy(x, y)) / KID_UNIT


def kid_interval(x: np.ndarray, y: np.ndarray) -> Estimate:
    """`kid` with a 95 % interval: normal, with the jackknife's variance over captions.

    Close to zero the statistic is degenerate; the jackknife then overstates its variance (twofold in the limit). There
    the interval errs towards finding no difference.

    Args:
        x, y: features of two sets over the same captions, (N, D) each.
    """
    return _jackknife(_discrepancy(x, y))


def kid_difference(x: np.ndarray, other: np.ndarray, y: np.ndarray) -> Estimate:
    """`kid(x, y) − kid(other, y)` with its 95 % interval, jackknifed over captions in all three sets at once.

    `x` and `other` share captions, noise and reference, so their errors largely cancel: the interval is
    narrower than the two separate ones suggest.

    Args:
        x, other, y: features of three sets over the same captions, (N, D) each.
    """
    return _jackknife(_discrepancy(x, y) - _discrepancy(other, y))


def paired_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Mean Euclidean distance of the features (N, D) of corresponding images."""
    return float(np.linalg.norm(x.astype(np.float64) - y, axis=1).mean())


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features (N, D), (M, D).

    |μ_x − μ_y|² + tr(Σ_x + Σ_y − 2 (Σ_x Σ_y)^½) (Heusel et al. 2017, arXiv 1706.08500, equation 6). Biased upwards
    for few samples: compare only sets of equal size, and much larger than D.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # The product of two positive semi-definite matrices has real, non-negative eigenvalues, up to rounding.
    roots = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real.clip(min=0))
    means = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    return float(means + np.trace(cov_x) + np.trace(cov_y) - 2 * roots.sum())


def pixel_rmse(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean square difference of (N, H, W, 3) uint8 images, in units where pixels span [−1, 1]."""
    # Image by image, because whole sets as float64 would take eight times their memory.
    squares = [np.square(one.astype(np.float64) - other).mean() for one, other in zip(x, y, strict=True)]
    return float(np.sqrt(np.mean(squares)) / 127.5)


def diversity(x: np.ndarray) -> float:
    """Mean Euclidean distance of the features (N, D) of two different images of a set."""
    return _mean_off_diagonal(_distances(x, x))


def precision(generated: np.ndarray, real: np.ndarray, neighbours: int = 3) -> Estimate:
    """Share of generated images that lie among the real ones (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 2).

    An image does if it is no further from some real image than that one's `neighbours`-th nearest real image. Recall
    is the same with the two exchanged: the share of real images that lie among the generated ones.

    Args:
        generated, real: features, (N, D) and (M, D).
        neighbours: k. Intervals take the neighbourhoods as given.
    """
    return share(np.any(_distances(generated, real) <= _radii(real, neighbours), axis=1))


def density(generated: np.ndarray, real: np.ndarray, neighbours: int = 5) -> Estimate:
    """How many real images' neighbourhoods a generated image lies in, of k (Naeem et al. 2020, arXiv 2002.09797).

    Around 1 for two sets of one distribution, and above it for images that crowd where real ones do. Unlike
    `precision` it does not count one far-off real image, with its large neighbourhood, as much as many near ones.

    Args:
        generated, real, neighbours: as for `precision`.
    """
    inside = (_distances(generated, real) <= _radii(real, neighbours)).sum(axis=1)
    return mean(inside / neighbours)


def coverage(generated: np.ndarray, real: np.ndarray, neighbours: int = 5) -> Estimate:
    """Share of real images with a generated one in their neighbourhood (Naeem et al. 2020, arXiv 2002.09797).

    Args:
        generated, real, neighbours: as for `precision`.
    """
    return share(np.any(_distances(generated, real) <= _radii(real, neighbours), axis=0))


def nearest(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of features (N, D), the Euclidean distance to the nearest row of others (M, D), and which it is.

    Returns:
        (N,) float64 and (N,) int.
    """
    distances = _distances(x, y)
    which = distances.argmin(axis=1)
    return distances[np.arange(len(x)), which], which


def nearer_than_unseen(distances: np.ndarray, unseen: np.ndarray, share_of_unseen: float = 0.05) -> Estimate:
    """Share of generated images that are nearer to a training image than most real images are that nobody trained on.

    Args:
        distances: of generated images to the nearest training image, (N,).
        unseen: the same of real images outside the training, (M,).
        share_of_unseen: of these, how many are as near. A model that repeats nothing has about this share.
    """
    return share(distances < np.quantile(unseen, share_of_unseen))


def within_captions(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much the images of one caption differ: mean Euclidean distance of two of them, and their Vendi score.

    Args:
        x: features (P, M, D) of M images of each of P captions.

    Returns:
        (P,) each.
    """
    return np.array([diversity(one) for one in x]), np.array([vendi_score(one) for one in x])


def vendi_score(x: np.ndarray) -> float:
    """Effective number of different images in a set (Friedman and Dieng 2023, arXiv 2210.02410), 1 to N.

    The exponential of the entropy of the eigenvalues of K/N, with K the cosine similarities of the features (N, D).
    """
    x = x.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    # Of the smaller of the two Gram matrices, whose eigenvalues that are not 0 are the same.
    gram = (x @ x.T if len(x) <= x.shape[1] else x.T @ x) / len(x)
    eigenvalues = np.linalg.eigvalsh(gram)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def share(inside: np.ndarray) -> Estimate:
    """The share of true values (N,), with Wilson's 95 % interval, which holds at 0 and 1 too."""
    count, found, z = len(inside), float(inside.mean()), NORMAL_95
    middle = (found + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(found * (1 - found) / count + z * z / (4 * count**2))
    return Estimate(found, float(min(found, middle - half)), float(max(found, middle + half)))


def mean(values: np.ndarray) -> Estimate:
    """The mean of values (N,), with its normal 95 % interval."""
    middle, half = float(values.mean()), float(NORMAL_95 * values.std(ddof=1) / np.sqrt(len(values)))
    return Estimate(middle, middle - half, middle + half)


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances of features (N, D) and (M, D), (N, M) float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squared = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None, :] - 2 * x @ y.T
    # Rounding makes distances of equal images slightly negative.
    return np.sqrt(squared.clip(min=0))


def _radii(x: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance of each row of (N, D) to its k-th nearest other row, (N,)."""
    distances = _distances(x, x)
    np.fill_diagonal(distances, np.inf)
    return np.partition(distances, neighbours - 1, axis=1)[:, neighbours - 1]


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # In float64: KID is a small difference of large means, which float32 would round away.
    return (x.astype(np.float64) @ y.T.astype(np.float64) / x.shape[1] + 1) ** 3


def _discrepancy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The U-statistic's terms h(z_i, z_j), symmetric (N, N); the diagonal has no meaning."""
    cross = _kernel(x, y)
    return _kernel(x, x) + _kernel(y, y) - cross - cross.T


def _mean_off_diagonal(terms: np.ndarray) -> float:
    count = len(terms)
    return float((terms.sum() - terms.trace()) / (count * (count - 1)))


def _jackknife(terms: np.ndarray) -> Estimate:
    """Mean of the off-diagonal terms (N, N) in KID units, with its variance over captions."""
    count = len(terms)
    of_caption = terms.sum(axis=1) - terms.diagonal()
    # The mean without caption i: all pairs but those that hold i, which stand in a row and in a column.
    without = (of_caption.sum() - 2 * of_caption) / ((count - 1) * (count - 2))
    half_width = NORMAL_95 * np.sqrt((count - 1) * without.var()) / KID_UNIT
    value = _mean_off_diagonal(terms) / KID_UNIT
    return Estimate(value, float(value - half_width), float(value + half_width))
