"""The rows on which a model is judged."""

from typing import NamedTuple

import numpy as np

from data.documents import Documents
from data.tokenizer import Tokenizer

SPREAD = 8
"""How many times more held-out text is read than is chosen from it."""


class HeldOut(NamedTuple):
    """Held-out text in rows.

    Attributes:
        rows: [R, T+1] int64; inputs are `rows[:, :-1]`, targets `rows[:, 1:]`.
        mask: [R, T] bool, false for targets that only fill the last row.
        target_bytes: UTF-8 bytes that the targets stand for.
    """

    rows: np.ndarray
    mask: np.ndarray
    target_bytes: int


def heldout_rows(
    documents: Documents, tokenizer: Tokenizer, *, seq_len: int, limit: int
) -> HeldOut:
    """At most `limit` rows of the held-out documents: all, or evenly chosen from the beginning.

    The same rows for every seed and number of lanes and ranks. Chosen from `SPREAD` times as many,
    they are of many documents even where one fills many rows.

    Raises:
        ValueError: no document is held out.
    """
    stream = _stream(documents, tokenizer, SPREAD * limit * seq_len)
    targets = len(stream) - 1
    count = -(-targets // seq_len)
    padded = np.full(count * seq_len + 1, tokenizer.eos_id, dtype=np.int64)
    padded[: len(stream)] = stream
    chosen = np.arange(count) if count <= limit else np.arange(limit) * count // limit
    place = chosen[:, None] * seq_len + np.arange(seq_len + 1)
    rows, mask = padded[place], place[:, 1:] <= targets
    return HeldOut(rows, mask, int(tokenizer.byte_lengths[rows[:, 1:][mask]].sum()))


def _stream(documents: Documents, tokenizer: Tokenizer, size: int) -> np.ndarray:
    """Up to `size` held-out tokens and, before them, a separator.

    With that, as if another document had just ended, the first token is a target too.
    """
    pieces = [np.array([tokenizer.eos_id])]
    room = size
    for document in documents.held_out():
        pieces.append(tokenizer.encode_document(document.text))
        room -= len(pieces[-1])
        if room <= 0:
            break
    if len(pieces) == 1:
        raise ValueError(
            f"data.holdout={documents.config.holdout}: holds out none of the documents of "
            "data.source; raise it, or add documents"
        )
    return np.concatenate(pieces)[: size + 1]
