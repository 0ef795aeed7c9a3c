"""Documents' tokens, cut or fitted into rows."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

CursorT = TypeVar("CursorT")
"""What comes with each document and tells from where to read on; nothing here looks into it."""

PADDING = 0
"""The id that fills a row up. Any would do: it is no target, and no target's prediction sees it."""


class Row(NamedTuple):
    """A row of text.

    Attributes:
        tokens: [T+1] int64.
        targets: how many of its T targets count, the first ones.
        progress: the cursor of the last document that was read for it; with best fit, about.
        ahead: with best fit, the tokens of all documents that were packed together.
    """

    tokens: np.ndarray
    targets: int
    progress: Any
    ahead: int = 0


def pack(
    documents: Iterable[tuple[np.ndarray, CursorT]], seq_len: int, skip: int = 0
) -> Iterator[tuple[Row, CursorT, int]]:
    """Cut tokens into rows of T+1 that overlap by one, so that each is a target exactly once.

        documents   a a a . b b . c c c c c .        . ends a document
        rows, T=4   a a a . b
                            b b . c c
                                    c c c c .

    Args:
        documents: each document's tokens [n], its separator included, with its cursor.
        skip: tokens of the first document to leave out.

    Yields:
        a row, and where the next one starts: the cursor of its first document, and the token in
        it. The last row is filled up with padding.

    >>> tokens = [np.array([1, 1, 1, 0]), np.array([2, 2, 0]), np.array([3, 3, 3, 0])]
    >>> for row, cursor, offset in pack(zip(tokens, "abc"), seq_len=4):
    ...     print(row.tokens, row.targets, cursor, offset)
    [1 1 1 0 2] 4 b 0
    [2 2 0 3 3] 4 c 1
    [3 3 0 0 0] 2 c 4
    """
    size = seq_len + 1
    row = np.empty(size, dtype=np.int64)
    filled = 0
    for tokens, cursor in documents:
        start, skip, length = skip, 0, len(tokens)
        while start < length:
            stop = start + size - filled
            if stop > length:
                row[filled : filled + length - start] = tokens[start:]
                filled += length - start
                break
            row[filled:] = tokens[start:stop]
            start = stop - 1  # the row's last token is the first of the next
            yield Row(row, seq_len, cursor), cursor, start
            row = np.empty(size, dtype=np.int64)
            filled = 0
    # An empty document comes at the end of all text and brings the cursor of the end. A row has to
    # carry that cursor, if need be one of padding alone.
    if filled > 1 or (filled and not len(tokens)):
        row[filled:] = PADDING
        yield Row(row, filled - 1, cursor), cursor, len(tokens)


def pack_best_fit(
    documents: Iterable[tuple[np.ndarray, CursorT]],
    seq_len: int,
    skip: int = 0,
    *,
    group: int,
    separator: int,
) -> Iterator[tuple[Row, CursorT, int]]:
    """Fit whole documents into rows of T targets; only those longer than T are cut.

        documents   a a a .   b b .   c c c c c c c .   d .

        rows, T=6   c c . a a a .          every row begins with what stands before its first
                    . b b . d . 0          target: a separator, or the token before the cut
                    . c c c c c c          0 is padding, and no target

    Of `group` documents at a time, the longest comes first and goes where it leaves the least room
    (best-fit decreasing, as in arXiv 2404.10830). The rows come in the order of their first
    documents.

    Args:
        documents: each document's tokens [n], its separator included, with its cursor.
        skip: rows of the first group to leave out.
        group: documents that are fitted together.
        separator: the id that ends documents.

    Yields:
        a row, and where the next one starts: the cursor of the first document of its group, and
        how many rows of the group come before it.

    >>> texts = ("aaa.", "bb.", "ccccccc.", "d.")
    >>> documents = [(np.array(["0.abcd".index(c) for c in text]), text) for text in texts]
    >>> for row, _, _ in pack_best_fit(documents, seq_len=6, group=4, separator=1):
    ...     print("".join("0.abcd"[token] for token in row.tokens), row.targets)
    cc.aaa. 6
    .bb.d.0 5
    .cccccc 6
    """
    following = iter(documents)
    while taken := list(islice(following, group)):
        rows = _fit([tokens for tokens, _ in taken], seq_len, separator)
        cursors = [cursor for _, cursor in taken]
        ahead = sum(len(tokens) for tokens, _ in taken)
        for number in range(skip, len(rows)):
            # The first n of N rows hold about n/N of the documents, because of the rows' order.
            progress = cursors[max(0, (number + 1) * len(cursors) // len(rows) - 1)]
            yield Row(*rows[number], progress, ahead), cursors[0], number + 1
        skip = 0


class _Piece(NamedTuple):
    """Some of a document's tokens, and the one before them."""

    tokens: np.ndarray
    before: int
    document: int


def _fit(documents: list[np.ndarray], seq_len: int, separator: int) -> list[tuple[np.ndarray, int]]:
    """Rows with all tokens of some documents, each with its number of targets."""
    whole: list[_Piece] = []
    bins: list[list[_Piece]] = []
    room: list[tuple[int, int]] = []  # (tokens that are left, bin), sorted
    for number, tokens in enumerate(documents):
        if 0 < len(tokens) <= seq_len:
            whole.append(_Piece(tokens, separator, number))
            continue
        for start in range(0, len(tokens), seq_len):
            before = int(tokens[start - 1]) if start else separator
            # A part after a cut comes first in its row, which begins with the token before it.
            bins.append([piece := _Piece(tokens[start : start + seq_len], before, number)])
            insort(room, (seq_len - len(piece.tokens), len(bins) - 1))
    for piece in sorted(whole, key=lambda piece: -len(piece.tokens)):
        tightest = bisect_left(room, (len(piece.tokens), 0))
        if tightest < len(room):
            left, chosen = room.pop(tightest)
        else:
            left, chosen = seq_len, len(bins)
            bins.append([])
        bins[chosen].append(piece)
        insort(room, (left - len(piece.tokens), chosen))
    bins.sort(key=lambda pieces: min(piece.document for piece in pieces))
    return [_row(pieces, seq_len) for pieces in bins]


def _row(pieces: list[_Piece], seq_len: int) -> tuple[np.ndarray, int]:
    tokens = np.full(seq_len + 1, PADDING, dtype=np.int64)
    tokens[0], stop = pieces[0].before, 1
    for piece in pieces:
        tokens[stop : (stop := stop + len(piece.tokens))] = piece.tokens
    return tokens, stop - 1
