"""The rows on which a model is evaluated."""

import numpy as np

from data.batch import Batch, make_batch
from data.packing import PADDING
from data.sources.documents import Documents
from data.tokenizer import Tokenizer

OVERSAMPLING = 8
"""How many times more held-out text is read than is chosen from it."""

MAX_DOCUMENTS = 100_000
"""Documents of a source that are looked at; fewer rows are found if few are held out."""


def heldout_rows(
    documents: Documents, tokenizer: Tokenizer, source: str, *, seq_len: int, limit: int
) -> Batch | None:
    """At most `limit` rows of a source's held-out documents; None if no document is held out.

    The rows are the same for every seed and number of lanes and ranks. They are chosen evenly from
    `OVERSAMPLING` times as many, so that they are of many documents even where one fills many rows.
    """
    stream = _stream(documents, tokenizer, source, OVERSAMPLING * limit * seq_len)
    targets = len(stream) - 1
    if not targets:
        return None
    count = -(-targets // seq_len)
    padded = np.full(count * seq_len + 1, PADDING, dtype=np.int64)
    padded[: len(stream)] = stream
    # In integers, so that the choice is the same on every machine.
    chosen = np.arange(count) if count <= limit else np.arange(limit) * count // limit
    first = chosen * seq_len
    rows = padded[first[:, None] + np.arange(seq_len + 1)]
    # Only the last row of all can be padded, if it is among the chosen ones.
    counted = np.minimum(seq_len, targets - first)
    isolate = documents.config.documents == "isolate"
    return make_batch(rows, counted, tokenizer, isolate=isolate)


def _stream(documents: Documents, tokenizer: Tokenizer, source: str, size: int) -> np.ndarray:
    """A separator, and up to `size` held-out tokens.

    With the separator, as if another document had just ended, the first token is a target, too.
    """
    pieces = [np.array([tokenizer.eos_id])]
    room = size
    for document in documents.held_out(source, MAX_DOCUMENTS):
        pieces.append(tokenizer.document_tokens(document))
        room -= len(pieces[-1])
        if room <= 0:
            break
    return np.concatenate(pieces)[: size + 1]
