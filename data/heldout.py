"""The rows on which a model is judged."""

from typing import NamedTuple

import numpy as np

from data.packing import PADDING, document_starts
from data.sources.documents import Documents
from data.tokenizer import Tokenizer

SPREAD = 8
"""How many times more held-out text is read than is chosen from it."""

MOST_DOCUMENTS = 100_000
"""Documents of a source that are looked at for it: where few are held out, the rows are fewer."""


class HeldOut(NamedTuple):
    """Held-out text in rows.

    Attributes:
        rows: [R, T+1] int64; inputs are `rows[:, :-1]`, targets `rows[:, 1:]`.
        mask: [R, T] bool, false for targets that only fill the last row.
        starts: [R, T] int64, where in its row each input's document begins; None: documents are
            not told apart.
        target_bytes: UTF-8 bytes that the targets stand for.
    """

    rows: np.ndarray
    mask: np.ndarray
    starts: np.ndarray | None
    target_bytes: int


def heldout_rows(
    documents: Documents, tokenizer: Tokenizer, source: str, *, seq_len: int, limit: int
) -> HeldOut | None:
    """At most `limit` rows of a source's held-out documents: all, or evenly chosen from the
    beginning; None where no document is held out.

    The same rows for every seed and number of lanes and ranks. Chosen from `SPREAD` times as many,
    they are of many documents even where one fills many rows.
    """
    stream = _stream(documents, tokenizer, source, SPREAD * limit * seq_len)
    targets = len(stream) - 1
    if not targets:
        return None
    count = -(-targets // seq_len)
    padded = np.full(count * seq_len + 1, PADDING, dtype=np.int64)
    padded[: len(stream)] = stream
    chosen = np.arange(count) if count <= limit else np.arange(limit) * count // limit
    place = chosen[:, None] * seq_len + np.arange(seq_len + 1)
    rows, mask = padded[place], place[:, 1:] <= targets
    isolated = documents.config.documents == "isolate"
    starts = document_starts(rows, tokenizer.eos_id) if isolated else None
    return HeldOut(rows, mask, starts, int(tokenizer.byte_lengths[rows[:, 1:][mask]].sum()))


def _stream(documents: Documents, tokenizer: Tokenizer, source: str, size: int) -> np.ndarray:
    """Up to `size` held-out tokens and, before them, a separator.

    With that, as if another document had just ended, the first token is a target too.
    """
    pieces = [np.array([tokenizer.eos_id])]
    room = size
    for document in documents.held_out(source, MOST_DOCUMENTS):
        pieces.append(tokenizer.document_tokens(document))
        room -= len(pieces[-1])
        if room <= 0:
            break
    return np.concatenate(pieces)[: size + 1]
