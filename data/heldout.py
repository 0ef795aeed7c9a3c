"""The rows on which a model is evaluated."""

import re
from collections.abc import Iterable

import numpy as np

from data.batch import Batch, make_batch
from data.packing import PADDING
from data.source import Document, TokenDocument
from data.sources.documents import Documents
from data.tokenizer import Tokenizer

OVERSAMPLING = 8
"""How many times more held-out text is read than is chosen from it."""

MAX_DOCUMENTS = 100_000
"""Documents of a source that are looked at; fewer rows are found if few are held out."""

PROMPT_WORDS = 4
"""Words of a document that a sample begins with."""

PROMPT_TOKENS = 40
"""Tokens that these words may have at most."""

WORD_CHARACTERS = 20
"""Longer words count as several, so that a prompt is short in every language."""


def heldout_rows(
    documents: Documents, tokenizer: Tokenizer, source: str, *, seq_len: int, limit: int
) -> Batch | None:
    """At most `limit` rows of a source's held-out documents; None if no document is held out.

    The rows are the same for every seed and number of lanes and ranks. They are chosen evenly from
    `OVERSAMPLING` times as many, so that they are of many documents even where one fills many rows.
    """
    found = documents.held_out(source, MAX_DOCUMENTS)
    stream = _stream(found, tokenizer, OVERSAMPLING * limit * seq_len)
    return _rows(documents, tokenizer, stream, seq_len, limit)


def text_rows(
    documents: Documents, tokenizer: Tokenizer, source: str, *, seq_len: int, limit: int | None
) -> Batch | None:
    """The rows of all documents of a source; None if it has none.

    Args:
        limit: how many rows are taken, the first ones; None: all, which have to fit the memory.
    """
    found = (record.document for record in documents.valid_records(source, 0, 1))
    stream = _stream(found, tokenizer, None if limit is None else limit * seq_len)
    return _rows(documents, tokenizer, stream, seq_len, limit)


def _rows(
    documents: Documents, tokenizer: Tokenizer, stream: np.ndarray, seq_len: int, limit: int | None
) -> Batch | None:
    """At most `limit` rows of a stream, evenly from it, whose documents are numbered."""
    targets = len(stream) - 1
    if not targets:
        return None
    count = -(-targets // seq_len)
    padded = np.full(count * seq_len + 1, PADDING, dtype=np.int64)
    padded[: len(stream)] = stream
    # In integers, so that the choice is the same on every machine.
    limit = count if limit is None else min(limit, count)
    chosen = np.arange(limit) * count // limit
    first = chosen * seq_len
    rows = padded[first[:, None] + np.arange(seq_len + 1)]
    # Only the last row of all can be padded, if it is among the chosen ones.
    counted = np.minimum(seq_len, targets - first)
    isolate = documents.config.documents == "isolate"
    held = make_batch(rows, counted, tokenizer, isolate=isolate)
    # A target is of its input's document, and a document's first input is the separator before it.
    numbers = np.cumsum(stream[:-1] == tokenizer.eos_id) - 1
    numbers = np.pad(numbers, (0, count * seq_len - targets), mode="edge")
    of_rows = numbers[first[:, None] + np.arange(seq_len)]
    _, consecutive = np.unique(of_rows, return_inverse=True)
    return held._replace(documents=consecutive.reshape(of_rows.shape))


def first_words(held: Batch, tokenizer: Tokenizer, *, most_tokens: int) -> str:
    """The first words of one of the held-out documents: a prompt that fits the corpus.

    Args:
        held: rows as `heldout_rows` chooses them.
        most_tokens: that the words may have.

    Returns:
        the beginning of the first document that goes on after it and whose words all have letters
        or digits; else of the first one that goes on, else of the first one.
    """
    texts = [_words(text) for row in held.rows for text in _beginnings(row, tokenizer)]
    long = [words for words in texts if len(words) > PROMPT_WORDS]
    plain = [words for words in long if all(map(_is_plain, words[:PROMPT_WORDS]))]
    prompt = "".join([*plain, *long, *texts, []][0][:PROMPT_WORDS])
    while len(tokenizer.encode(prompt)) > min(most_tokens, PROMPT_TOKENS):
        prompt = prompt[:-1]
    return prompt


def _is_plain(word: str) -> bool:
    """Whether a word says something, unlike `#`, `=` or a line of dashes."""
    return any(character.isalnum() for character in word)


def _beginnings(row: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts that begin in a row, as far as the row goes."""
    row = row[row != PADDING]
    starts = np.flatnonzero(row == tokenizer.eos_id) + 1
    return [tokenizer.decode(part[part != tokenizer.eos_id]) for part in np.split(row, starts)[1:]]


def _words(text: str) -> list[str]:
    """The words of a text, each with the white space before it.

    Text without spaces, as in Chinese, has one word for every `WORD_CHARACTERS` characters.

    >>> _words("def f(x):\\n    return 1"), [len(word) for word in _words("\\u6c49" * 50)]
    (['def', ' f(x):', '\\n    return', ' 1'], [20, 20, 10])
    """
    return re.findall(rf"\s*\S{{1,{WORD_CHARACTERS}}}", text)


def _stream(
    documents: Iterable[Document | TokenDocument], tokenizer: Tokenizer, size: int | None
) -> np.ndarray:
    """A separator, and up to `size` tokens of documents; None: all of them.

    With the separator, as if another document had just ended, the first token is a target, too.
    """
    pieces = [np.array([tokenizer.eos_id])]
    read = 0
    for document in documents:
        pieces.append(tokenizer.document_tokens(document))
        read += len(pieces[-1])
        if size is not None and read >= size:
            break
    stream = np.concatenate(pieces)
    return stream if size is None else stream[: size + 1]
