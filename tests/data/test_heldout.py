from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.batch import IGNORED_TARGET, Batch, document_starts, make_batch
from data.heldout import OVERSAMPLING, first_words, heldout_rows
from data.sources.documents import Documents
from data.tokenizer import Tokenizer

DocumentsOf = Callable[..., Documents]


@pytest.fixture(scope="module")
def documents(documents_of: DocumentsOf) -> Documents:
    return documents_of("jsonl", holdout=0.5)


def counted(batch: Batch) -> np.ndarray:
    """The targets that count, in their order."""
    return batch.targets[batch.targets != IGNORED_TARGET]


@given(seq_len=st.integers(1, 300))
def test_every_token_of_every_held_out_document_is_a_target_once(
    documents: Documents, tokenizer: Tokenizer, seq_len: int
) -> None:
    texts = [d.text for d in documents.held_out("text")]
    held = heldout_rows(documents, tokenizer, "text", seq_len=seq_len, limit=10_000)
    assert held
    twin = np.concatenate([tokenizer.encode_document(text) for text in texts])
    assert np.array_equal(counted(held), twin)
    assert held.stats
    assert (held.stats.targets, held.stats.positions) == (len(twin), held.targets.size)
    assert held.stats.target_bytes == len("".join(texts).encode())
    assert held.rows.shape == (-(-len(twin) // seq_len), seq_len + 1)


@given(seq_len=st.integers(1, 300), limit=st.sampled_from([3, 10_000]))
def test_each_target_is_of_its_document(
    documents: Documents, tokenizer: Tokenizer, seq_len: int, limit: int
) -> None:
    held = heldout_rows(documents, tokenizer, "text", seq_len=seq_len, limit=limit)
    assert held
    assert held.documents is not None
    of_target = held.documents[held.targets != IGNORED_TARGET]
    parts = [counted(held)[of_target == number] for number in range(of_target.max() + 1)]
    texts = [tokenizer.encode_document(d.text) for d in documents.held_out("text")]
    if limit == 10_000:
        assert all(map(np.array_equal, parts, texts))
        assert len(parts) == len(texts)
    left = iter(" ".join(map(str, text)) for text in texts)
    for part in parts:  # in their order, and of one document each
        assert len(part)
        assert any(" ".join(map(str, part[:seq_len])) in text for text in left)


@given(limit=st.integers(1, 12))
def test_fewer_rows_are_chosen_evenly_from_several_times_as_many(
    documents: Documents, tokenizer: Tokenizer, limit: int
) -> None:
    whole = heldout_rows(documents, tokenizer, "text", seq_len=8, limit=10_000)
    assert whole
    everything = whole.rows
    count = min(OVERSAMPLING * limit, len(everything))
    assert count > limit
    held = heldout_rows(documents, tokenizer, "text", seq_len=8, limit=limit)
    assert held
    assert np.array_equal(held.rows, everything[[i * count // limit for i in range(limit)]])
    assert held.stats
    assert held.stats.target_bytes == tokenizer.byte_lengths[counted(held)].sum()


def test_the_rows_are_the_same_for_every_kind_of_source_and_number_of_lanes(
    documents_of: DocumentsOf, documents: Documents, tokenizer: Tokenizer
) -> None:
    expected = heldout_rows(documents, tokenizer, "text", seq_len=16, limit=9)
    assert expected
    for kind, lanes in (("txt", 1), ("parquet", 8), ("datasets-jsonl", 2)):
        other = documents_of(kind, holdout=0.5, lanes=lanes, shuffle=False)
        held = heldout_rows(other, tokenizer, "text", seq_len=16, limit=9)
        assert held
        assert np.array_equal(held.rows, expected.rows)


def test_where_nothing_is_held_out_there_are_no_rows(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    documents = documents_of(holdout=0.0)
    assert heldout_rows(documents, tokenizer, "text", seq_len=16, limit=9) is None


def test_documents_are_told_apart_where_they_are_isolated(
    documents_of: DocumentsOf, documents: Documents, tokenizer: Tokenizer
) -> None:
    isolated = documents_of("jsonl", holdout=0.5, documents="isolate")
    held = heldout_rows(isolated, tokenizer, "text", seq_len=16, limit=9)
    plain = heldout_rows(documents, tokenizer, "text", seq_len=16, limit=9)
    assert held
    assert plain
    assert np.array_equal(held.rows, plain.rows)
    assert plain.document_starts is None
    assert np.array_equal(held.document_starts, document_starts(held.rows, tokenizer.eos_id))


def rows_of(tokenizer: Tokenizer, *texts: str) -> Batch:
    """One row of these documents, as `heldout_rows` begins one."""
    tokens = [np.array([tokenizer.eos_id]), *(tokenizer.encode_document(text) for text in texts)]
    row = np.concatenate(tokens)[None]
    return make_batch(row, np.array([row.shape[1] - 1]), tokenizer, isolate=False)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["def f(x):\n    return x + 1"], "def f(x):\n    return x"),
        (["  indented text is kept as it is"], "  indented text is kept"),
        (["short", "the second document is longer"], "the second document is"),
        (["short"], "short"),
        (["# # # comment first", "----- -- - -- --", "import os\nimport sys\n"], "# # # comment"),
        (
            ["#\n# a.py: first", 'b = [\n  "c",\n]', "import os\nimport sys\n\nx"],
            "import os\nimport sys",
        ),
        (["漢" * 200], "漢" * 10),  # of three tokens each
        (["a 😀 b c d </s> e"], "a 😀 b c"),
        (["a 😀 b c d", "é 1 </s> b c"], "é 1 </s> b"),
    ],
)
def test_the_first_words_are_those_of_a_document_that_goes_on(
    written: list[str], expected: str, tokenizer: Tokenizer
) -> None:
    assert first_words(rows_of(tokenizer, *written), tokenizer, most_tokens=30) == expected


@given(most=st.integers(0, 12))
def test_the_first_words_have_no_more_tokens_than_there_is_room_for(
    documents: Documents, tokenizer: Tokenizer, most: int
) -> None:
    held = heldout_rows(documents, tokenizer, "text", seq_len=32, limit=4)
    assert held
    assert len(tokenizer.encode(first_words(held, tokenizer, most_tokens=most))) <= most
