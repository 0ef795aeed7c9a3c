"""Documents' tokens, laid end to end and cut into rows."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

Place = TypeVar("Place")


def pack(
    documents: Iterable[tuple[np.ndarray, Place]], seq_len: int, skip: int = 0
) -> Iterator[tuple[np.ndarray, Place, int]]:
    """Cuts tokens into rows of T+1 that overlap by one, so that each is a target exactly once.

        documents   a a a . b b . c c c c c .        . ends a document
        rows, T=4   a a a . b
                            b b . c c
                                    c c c c .

    Args:
        documents: each document's tokens [n], its separator included, with its place.
        skip: tokens of the first document to leave out.

    Yields:
        a row [T+1] of int64, and where the next one starts: in which document, at which token.

    >>> tokens = [np.array([1, 1, 1, 0]), np.array([2, 2, 0]), np.array([3, 3, 3, 3, 3, 0])]
    >>> for row, place, offset in pack(zip(tokens, "abc"), seq_len=4):
    ...     print(row, place, offset)
    [1 1 1 0 2] b 0
    [2 2 0 3 3] c 1
    [3 3 3 3 0] c 5
    """
    row = np.empty(seq_len + 1, dtype=np.int64)
    filled = 0
    for tokens, place in documents:
        start, skip = skip, 0
        while start < len(tokens):
            taken = tokens[start : start + seq_len + 1 - filled]
            row[filled : filled + len(taken)] = taken
            filled += len(taken)
            start += len(taken)
            if filled == seq_len + 1:
                start -= 1  # the row's last token is the first of the next
                yield row.copy(), place, start
                filled = 0
