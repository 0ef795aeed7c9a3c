"""Newton-Schulz iterations, which make a matrix nearly orthogonal (arXiv 2409.20325)."""

from collections import Counter
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, baddbmm
from torch.linalg import vector_norm

# Those of `torch.optim.Muon`, from Keller Jordan's post: the steepest slope at 0, for few steps.
A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7

BATCH = 2**22
"""Numbers in a batch of matrices. On CUDA, the product of so many takes about as long as the launch
of its kernel, at sides of 384 and more. Larger batches would only take more memory."""


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Map the singular values of matrices to about 1, of which none but products are needed.

        X = U S V'       the singular value decomposition, with S divided by the norm of X
        U p(..p(S)) V'   p(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5, `steps` times

    After five steps, singular values of at least 1 / 500 of the norm are 0.68 to 1.20. The
    products have the dtype of x: in bfloat16, this is `torch.optim.Muon`'s, bit for bit.

    Args:
        x: matrices (count, m, n), each for itself, which are overwritten.
        steps: iterations.

    Returns:
        (count, m, n), in the dtype of x.
    """
    tall = x.shape[1] > x.shape[2]
    wide = x.mT if tall else x
    wide.div_(vector_norm(wide, dim=(1, 2), keepdim=True).clamp(min=EPS))
    for _ in range(steps):
        gram = wide @ wide.mT
        # X <- a X + (b G + c G G) X, with G = X X', of which the shorter side is the size.
        wide = baddbmm(wide, baddbmm(gram, gram, gram, beta=B, alpha=C), wide, beta=A)
    return wide.mT if tall else wide


def newton_schulz_flops(shape: torch.Size, steps: int) -> int:
    """FLOPs of `newton_schulz` of a matrix with sides m <= n: 4 m^2 n + 2 m^3 for each step."""
    short, long = sorted(shape)
    return steps * (4 * short * short * long + 2 * short**3)


def batch_size(shape: torch.Size) -> int:
    """The most matrices of a batch."""
    return max(1, BATCH // prod(shape))


def muon_step_bytes(
    shapes: Sequence[torch.Size], dtype: torch.dtype, *, ranks: int, shards: int, flat: bool
) -> int:
    """The most that a step of Muon takes of a rank's memory beside weights, gradients and moments.

    It is at the end of one of three parts: the last direction, the largest batch, the way back.

    Args:
        shapes: of the matrices.
        dtype: of the products.
        ranks, shards: see `train.engines.matrix_exchange`.
        flat: whether all matrices lie in one tensor, as with ZeRO.
    """
    numbers = [prod(shape) for shape in shapes]
    here, owned = sum(numbers) // shards, sum(numbers) // ranks if ranks > 1 else 0
    largest = here if flat else max(numbers) // shards
    # What was given, the matrices before and after an iteration, and two squares.
    scratch = max(
        min(count, batch_size(shape)) * (3 * prod(shape) + 2 * min(shape) ** 2)
        for shape, count in Counter(shapes).items()
    )
    back = owned + 2 * here if ranks > 1 else 0
    return dtype.itemsize * here + max(
        8 * largest, dtype.itemsize * (2 * owned + scratch), dtype.itemsize * back
    )
