"""Losses of whole documents, and how sure their mean is.

The bits per byte of a text are a ratio of two sums over its documents,

    R = sum nats_i / sum bytes_i / ln 2

and documents, not tokens, are what was drawn: the tokens of a document resemble each other. So the
standard error is that of a ratio over documents (W. Cochran, Sampling Techniques, section 6.4):

    se(R) = sqrt(n / (n - 1) * sum (nats_i - r bytes_i)^2) / sum bytes_i / ln 2,    r = R ln 2
"""

from math import log, sqrt

import numpy as np
import xxhash

from data.batch import Batch
from data.tokenizer import Tokenizer


def bytes_of_documents(text: Batch, tokenizer: Tokenizer) -> np.ndarray:
    """The UTF-8 bytes of the counted targets of each of `text.documents`, int64 (documents,)."""
    assert text.documents is not None
    sizes = tokenizer.byte_lengths.take(text.rows[:, 1:])
    if text.mask is not None:
        sizes = sizes * text.mask
    # Weights are float64, which is exact up to 2^53 bytes.
    return np.bincount(text.documents.ravel(), weights=sizes.ravel()).astype(np.int64)


def fingerprint_of(text: Batch) -> str:
    """A hash (xxh3, 128 bits) of the rows on which a model is evaluated.

    Another text, tokenizer, length or number of rows gives another one. Whether documents see each
    other does not: that is a way to read the same rows.
    """
    hashed = xxhash.xxh3_128(str(text.rows.shape).encode())
    hashed.update(text.rows.astype("<i8").tobytes())
    return hashed.hexdigest()


def bits_per_byte_of_documents(nats: np.ndarray, sizes: np.ndarray) -> tuple[float, float | None]:
    """The bits per byte of a text, and their standard error over its documents.

    Args:
        nats: (documents,), the summed cross-entropy of each.
        sizes: (documents,), the UTF-8 bytes of each.

    Returns:
        the two; the standard error is None of fewer than two documents.

    >>> bits_per_byte_of_documents(np.array([8, 16]) * log(2), np.array([8, 8]))
    (1.5, 0.5)
    """
    count, size = len(nats), float(sizes.sum())
    ratio = float(nats.sum()) / size
    if count < 2:
        return ratio / log(2), None
    squares = float(np.square(nats - ratio * sizes).sum())
    error = sqrt(count / (count - 1) * squares) / size
    return ratio / log(2), error / log(2)


def bits_per_byte(nats: float, size: int) -> float:
    """Convert the cross-entropy of a text to bits per byte.

    Args:
        nats: summed over the text.
        size: bytes of the text in UTF-8.

    >>> bits_per_byte(log(2) * 24, 8)
    3.0
    """
    return nats / log(2) / size
