"""A long record, or few of them, leave no lane empty: lanes are then cut by documents."""

import json
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import DataError
from data.batch import Cursors
from data.config import CacheConfig, DataConfig, FilesSource, Phase
from data.loader import Loader
from data.sources.documents import Documents, NoTrainingDocumentsError
from data.sources.lanes import first_documents
from data.stream import BatchShape, TokenStream
from data.tokenizer import Tokenizer

LANES = 4
MOST = 200_000  # bytes of a document
LENGTHS = {"long": MOST - 100, "too long": 3 * MOST}  # the second one is quarantined


@given(sizes=st.lists(st.integers(1, 10**6), max_size=40), lanes=st.integers(1, 12))
def test_each_lane_begins_at_another_document_and_none_is_longer_than_it_must_be(
    sizes: list[int], lanes: int
) -> None:
    firsts = first_documents(sizes, lanes)
    if len(sizes) < lanes:
        assert firsts is None
        return
    assert firsts is not None
    assert firsts[0] == 0
    assert firsts == sorted(set(firsts))
    parts = [sizes[a:b] for a, b in zip(firsts, [*firsts[1:], len(sizes)], strict=True)]
    assert len(parts) == lanes
    assert all(parts)
    if max(sizes) * lanes <= sum(sizes):  # then a lane has its part, give or take a document
        assert all(sum(part) <= sum(sizes) / lanes + max(sizes) for part in parts)


def write(folder: Path, form: str, texts: list[str], write_file: Callable) -> None:
    if form == "files":
        for number, text in enumerate(texts):
            (folder / f"{number:03}.txt").write_text(text)
    elif form == "one-row-parquet":
        for number, text in enumerate(texts):
            path = folder / f"{number:03}.parquet"
            pq.write_table(pa.table({"text": [text]}), path, compression="NONE")
    else:
        write_file(folder / f"a.{form}", texts)


def stream_over(
    folder: Path, tokenizer: Tokenizer, cursors: Cursors | None = None, rank: int = 0, of: int = 1
) -> TokenStream:
    source = FilesSource(
        kind="files", paths=str(folder), separator="<|end|>" if list(folder.glob("a.txt")) else None
    )
    config = DataConfig(
        sources={"text": source},
        lanes=LANES,
        holdout=0.1,
        block_documents=5,
        max_document_bytes=MOST,
        cache=CacheConfig(dir=str(folder.parent / "cache")),
    )
    shape = BatchShape(global_batch=LANES, seq_len=13, rank=rank, world_size=of)
    return TokenStream(Documents(config), tokenizer, shape, seed=3, cursors=cursors)


def fill(stream: TokenStream) -> None:
    for name in sorted(stream.empty_lanes()):
        stream.documents.set_lane_starts(name, stream.cut_by_documents(name))


def rows(stream: TokenStream, count: int) -> np.ndarray:
    return np.concatenate([batch.rows for batch in islice(Loader(stream), count)])


def short_texts() -> list[str]:
    random = Random(1)
    return [f"{i} " + "word " * random.randint(3, 20) for i in range(60)]


FORMS = ["jsonl", "jsonl.gz", "separated", "files", "one-row-parquet"]


@pytest.mark.parametrize("place", [0, 30, 60])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_one_long_record_leaves_no_lane_empty_and_the_others_are_dealt_equally(
    tmp_path: Path,
    tokenizer: Tokenizer,
    write_file: Callable,
    form: str,
    length: str,
    place: int,
) -> None:
    texts = short_texts()
    texts.insert(place, "long " * (LENGTHS[length] // 5))
    (folder := tmp_path / "corpus").mkdir()
    write(folder, form, texts, write_file)
    stream = stream_over(folder, tokenizer)
    assert stream.empty_lanes() == {"text"}
    with pytest.raises(NoTrainingDocumentsError):
        [next(stream.documents.training("text", lane)) for lane in range(LANES)]
    fill(stream)
    assert stream.empty_lanes() == set()
    documents = stream.documents
    lanes = [[d for d, _ in documents.training("text", lane)] for lane in range(LANES)]
    held_out = list(documents.held_out("text"))
    found = [document.text for document in chain(*lanes, held_out)]  # type: ignore[union-attr]
    kept = texts if length == "long" else [text for text in texts if len(text) < MOST]
    assert sorted(found) == sorted(kept), "each document once"
    trained = found[: len(found) - len(held_out)]
    assert trained == [text for text in kept if text in trained], "in order"
    shorts = sorted(sum(len(d.text) < 1000 for d in lane) for lane in lanes)  # type: ignore[union-attr]
    # A long document takes a lane; the short ones before it in its own lane may be few.
    assert shorts[1] > 0.5 * shorts[-1]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_a_stream_cut_by_documents_goes_on_exactly_and_is_the_same_on_all_ranks(
    tmp_path: Path, tokenizer: Tokenizer, write_file: Callable, form: str, length: str
) -> None:
    texts = short_texts()
    texts.insert(20, "long " * (LENGTHS[length] // 5))
    (folder := tmp_path / "corpus").mkdir()
    write(folder, form, texts, write_file)
    fill(whole := stream_over(folder, tokenizer))
    saved = json.loads(json.dumps(whole.fingerprint))
    assert len(saved["data.sources.text.lanes"]) == LANES
    expected = rows(whole, 160)  # several epochs of the shorter lanes
    for batches in (1, 29, 93):
        *_, last = islice(Loader(begun := stream_over_filled(folder, tokenizer)), batches)
        assert json.loads(json.dumps(begun.fingerprint)) == saved
        resumed = stream_over(folder, tokenizer, json.loads(json.dumps(last.stats.cursors)))
        assert resumed.check_resumes(saved) == []
        assert resumed.empty_lanes() == set(), "nothing is read for it"
        assert np.array_equal(rows(resumed, 160 - batches), expected[LANES * batches :])
    for rank in range(2):
        part = stream_over(folder, tokenizer, rank=rank, of=2)
        part.documents.set_lane_starts("text", saved["data.sources.text.lanes"])
        assert np.array_equal(rows(part, 160), expected[rank::2])


def stream_over_filled(folder: Path, tokenizer: Tokenizer) -> TokenStream:
    fill(stream := stream_over(folder, tokenizer))
    return stream


def test_a_source_without_an_empty_lane_stays_cut_by_bytes(
    tmp_path: Path, tokenizer: Tokenizer, write_file: Callable
) -> None:
    (folder := tmp_path / "corpus").mkdir()
    write(folder, "jsonl", short_texts(), write_file)
    untouched, filled = (stream_over(folder, tokenizer) for _ in range(2))
    fill(filled)
    assert filled.fingerprint == untouched.fingerprint
    assert "data.sources.text.lanes" not in filled.fingerprint
    assert np.array_equal(rows(filled, 60), rows(untouched, 60))


def test_lanes_that_were_read_before_stay_cut_as_they_were(
    tmp_path: Path, tokenizer: Tokenizer, write_file: Callable
) -> None:
    """A checkpoint that says nothing of lanes is of a stream that was cut by bytes."""
    (folder := tmp_path / "corpus").mkdir()
    texts = short_texts()
    texts.insert(30, "long " * (LENGTHS["long"] // 5))
    write(folder, "jsonl", texts, write_file)
    by_bytes = stream_over(folder, tokenizer)
    has_text = partial(by_bytes.documents.has_training_documents, "text", keep=False)
    empty = [n for n in range(LANES) if not has_text(n)]
    assert 0 < len(empty) < LANES
    cursors = {str(lane): {"sources": {}, "phase": 0, "skip": 0} for lane in range(LANES)}
    resumed = stream_over(folder, tokenizer, cursors)
    assert resumed.check_resumes(json.loads(json.dumps(by_bytes.fingerprint))) == []
    assert resumed.empty_lanes() == set()
    with pytest.raises(DataError, match="a lane found no document"):
        next(resumed.documents.training("text", empty[0]))


def test_a_source_that_only_a_later_phase_reads_is_cut_by_documents_too(
    tmp_path: Path, tokenizer: Tokenizer, write_file: Callable
) -> None:
    for name, texts in (("a", short_texts()), ("b", ["long " * 9000, *short_texts()])):
        write_file(tmp_path / f"{name}.jsonl", texts)

    def stream(cursors: Cursors | None = None) -> TokenStream:
        sources = {
            name: FilesSource(kind="files", paths=str(tmp_path / f"{name}.jsonl"), weight=weight)
            for name, weight in (("a", 1.0), ("b", 0.0))
        }
        config = DataConfig(
            sources=sources,  # type: ignore[arg-type]
            phases={"later": Phase(after_tokens=400, weights={"b": 9.0})},
            lanes=LANES,
            holdout=0.0,
        )
        shape = BatchShape(global_batch=LANES, seq_len=13)
        return TokenStream(Documents(config), tokenizer, shape, seed=3, cursors=cursors)

    by_bytes = stream()
    assert by_bytes.empty_lanes() == {"b"}
    fill(whole := stream())
    assert set(whole.documents.lane_starts) == {"b"}
    assert whole.documents.has_training_documents("b", LANES - 1, keep=False)
    expected = rows(whole, 60)
    # One that was begun before lanes were cut by documents, and has not read of b yet, may be.
    *_, last = islice(Loader(stream()), 3)
    resumed = stream(last.stats.cursors)
    resumed.check_resumes(by_bytes.fingerprint)
    fill(resumed)
    assert np.array_equal(rows(resumed, 57), expected[12:])


def test_fewer_documents_than_lanes_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, write_file: Callable
) -> None:
    (folder := tmp_path / "corpus").mkdir()
    write(folder, "jsonl", ["one", "two", "three"], write_file)
    with pytest.raises(DataError, match=r"data\.lanes=4: .* each lane needs one to train on"):
        fill(stream_over(folder, tokenizer))
