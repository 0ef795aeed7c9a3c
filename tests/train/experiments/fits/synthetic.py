"""Losses that a law gives, with noise: what a fit should find again."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from train.experiments.fits.law import COPIES, Law
from train.experiments.fits.points import Point, Points

TRUTH = {"E": 0.6, "A": 20.0, "a": 0.3, "B": 60.0, "b": 0.35, "phi": 0.45}
"""Bits per byte of models with millions of parameters; phi as in arXiv 2604.21106."""

SIZES = (0.8e6, 3e6, 12e6)
LENGTHS = (1e7, 4e7, 16e7)


def synthetic(
    *,
    sizes: Sequence[float] = SIZES,
    lengths: Sequence[float] = LENGTHS,
    per_parameter: Sequence[float] = (),
    copies: Sequence[int] = (1, 2, 3),
    seeds: int = 2,
    truth: Mapping[str, float] = TRUTH,
    law: Law = COPIES,
    noise: float = 0.002,
    shift: float = 0.0,
    seed: int = 0,
) -> Points:
    """Runs of all sizes, lengths and copies.

    Args:
        sizes: parameters of the blocks.
        lengths: tokens.
        per_parameter: tokens for each parameter, instead of lengths.
        seeds: of each setting.
        noise: the standard deviation of a run's loss.
        shift: the same of what all runs of a seed have in common.
        seed: of the noise.
    """
    points = []
    for size, ratio, K, run in product(sizes, per_parameter or lengths, copies, range(seeds)):
        once = 600 * size**0.5  # an embedding grows with the width
        tokens = ratio * (size + once) if per_parameter else ratio
        group = f"{size:g} {ratio:g} {K}"
        points.append(
            Point(f"{group} {run}", group, once, size, K, tokens, 6 * K * size * tokens, 0, run)
        )
    rng = np.random.default_rng(seed)
    losses = law.loss(truth, Points(tuple(points))) + noise * rng.normal(size=len(points))
    losses += shift * rng.normal(size=seeds)[[p.seed for p in points]]
    return Points(
        tuple(p._replace(loss=x) for p, x in zip(points, map(float, losses), strict=True))
    )
