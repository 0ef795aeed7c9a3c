import json
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest

from conf.errors import ConfigError, Problem
from data.batch import Batch, Cursors
from data.config import DataConfig, Phase, PythonSource
from data.fingerprint import check_fingerprint
from data.loader import Loader
from data.packing import PADDING
from data.shuffle import Shuffle
from data.sources.documents import Documents
from data.stream import BatchShape, TokenStream
from data.tokenizer import Tokenizer

T = 13
DocumentsOf = Callable[..., Documents]


def stream(
    documents: Documents,
    tokenizer: Tokenizer,
    cursors: Cursors | None = None,
    *,
    seed: int = 5,
    **shape: int,
) -> TokenStream:
    batch = BatchShape(**{"global_batch": 8, "seq_len": T, **shape})
    return TokenStream(documents, tokenizer, batch, seed=seed, cursors=cursors)


def taken(batches: Iterator[Batch] | TokenStream, count: int) -> list[Batch]:
    return list(islice(Loader(batches) if isinstance(batches, TokenStream) else batches, count))


def equal(some: list[Batch], others: list[Batch]) -> bool:
    assert len(some) == len(others)
    return all(
        np.array_equal(a.rows, b.rows)
        and same(a.mask, b.mask)
        and same(a.document_starts, b.document_starts)
        and a.stats.target_bytes == b.stats.target_bytes
        for a, b in zip(some, others, strict=True)
    )


def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def lane_tokens(documents: Documents, tokenizer: Tokenizer, seed: int, lane: int) -> np.ndarray:
    """The slow twin: three epochs of a lane's tokens, all in memory."""
    config = documents.config
    texts = [document.text for document, _ in documents.training("text", lane)]
    shuffle = Shuffle(f"{seed} {lane} text", config.block_documents, config.shuffle)
    pieces = []
    for epoch in range(3):
        for block in range(-(-len(texts) // config.block_documents)):
            held = texts[block * config.block_documents :][: config.block_documents]
            for place in shuffle.order(epoch, block, len(held)):
                pieces += [tokenizer.encode(held[place]), [tokenizer.eos_id]]
    return np.concatenate(pieces)


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_are_the_lanes_tokens_in_order(
    documents_of: DocumentsOf, tokenizer: Tokenizer, shuffle: bool
) -> None:
    documents = documents_of(shuffle=shuffle)
    batches = taken(stream(documents, tokenizer), 20)
    for lane in range(4):
        tokens = lane_tokens(documents, tokenizer, 5, lane)
        rows = np.concatenate([batch.rows[lane::4] for batch in batches])
        twin = [tokens[i * T : i * T + T + 1] for i in range(40)]
        assert np.array_equal(rows, np.array(twin))


def test_it_goes_on_exactly_from_every_batch(
    documents_of: DocumentsOf, tokenizer: Tokenizer, kind: str
) -> None:
    documents = documents_of(kind)
    whole = taken(stream(documents, tokenizer), 45)
    assert whole[-1].stats.epoch("text") >= 1
    places = [batch.stats.cursors["0"] for batch in whole]
    states = [place["sources"]["text"] for place in places]
    assert any(
        p["skip"] and s["document"] and s["block"] for p, s in zip(places, states, strict=True)
    )
    for i in range(0, 42, 7 if kind.startswith("datasets") else 1):
        saved = json.loads(json.dumps(whole[i].stats.cursors))
        again = Documents(documents.config)
        assert equal(taken(stream(again, tokenizer, saved), 3), whole[i + 1 : i + 4])


def test_it_can_be_interrupted_after_every_batch(
    documents_of: DocumentsOf, tokenizer: Tokenizer, kind: str
) -> None:
    documents, batches, cursors = documents_of(kind), [], None
    for _ in range(30):
        batches += taken(stream(documents, tokenizer, cursors), 1)
        cursors = json.loads(json.dumps(batches[-1].stats.cursors))
    assert equal(batches, taken(stream(documents, tokenizer), 30))


def test_python_files_go_on_exactly(tokenizer: Tokenizer) -> None:
    documents = Documents(
        DataConfig(sources={"python": PythonSource(kind="python")}, block_documents=4)
    )
    whole = taken(stream(documents, tokenizer, seq_len=2048), 30)
    cursors = whole[11].stats.cursors
    assert equal(taken(stream(documents, tokenizer, cursors, seq_len=2048), 18), whole[12:])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_one_stream_whatever_their_number(
    documents_of: DocumentsOf, tokenizer: Tokenizer, world_size: int
) -> None:
    documents = documents_of()
    whole = taken(stream(documents, tokenizer), 6)
    ranks = [
        taken(stream(documents, tokenizer, rank=r, world_size=world_size), 6)
        for r in range(world_size)
    ]
    for step, batch in enumerate(whole):
        rows = np.empty_like(batch.rows)
        for rank in range(world_size):
            rows[rank::world_size] = ranks[rank][step].rows
        assert np.array_equal(rows, batch.rows)
        assert sum(rank[step].stats.target_bytes for rank in ranks) == batch.stats.target_bytes
        cursors = {k: v for rank in ranks for k, v in rank[step].stats.cursors.items()}
        assert cursors == batch.stats.cursors


def test_a_run_goes_on_with_another_number_of_ranks(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    documents = documents_of()
    whole = taken(stream(documents, tokenizer), 6)
    saved: Cursors = {}
    for rank in range(4):
        saved |= taken(stream(documents, tokenizer, rank=rank, world_size=4), 3)[-1].stats.cursors
    again = [taken(stream(documents, tokenizer, saved, rank=r, world_size=2), 3) for r in range(2)]
    for step in range(3):
        assert np.array_equal(again[0][step].rows, whole[3 + step].rows[0::2])
        assert np.array_equal(again[1][step].rows, whole[3 + step].rows[1::2])


def test_a_lane_goes_on_exactly_in_batches_of_another_shape(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    documents = documents_of(lanes=1)
    first = taken(stream(documents, tokenizer, global_batch=1), 3)
    rest = taken(
        stream(documents, tokenizer, first[-1].stats.cursors, global_batch=2, seq_len=7), 2
    )
    targets = [row[1:] for batch in (*first, *rest) for row in batch.rows]
    twin = lane_tokens(documents, tokenizer, 5, 0)[1:]
    assert np.array_equal(np.concatenate(targets), twin[: 3 * T + 4 * 7])


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 9])
def test_workers_change_nothing(
    documents_of: DocumentsOf, tokenizer: Tokenizer, workers: int
) -> None:
    batches = stream(documents_of(), tokenizer)
    with Loader(batches, workers=workers, depth=3) as loader:
        assert equal(taken(loader, 20), taken(batches, 20))


@pytest.mark.parametrize("isolated", [True, False])
def test_best_fit_goes_on_exactly_and_masks_its_padding(
    documents_of: DocumentsOf, tokenizer: Tokenizer, isolated: bool
) -> None:
    documents = documents_of(packing="best_fit", documents="isolate" if isolated else "concatenate")
    whole = taken(stream(documents, tokenizer, seq_len=40), 30)
    for i in range(29):
        saved = json.loads(json.dumps(whole[i].stats.cursors))
        assert equal(
            taken(stream(documents, tokenizer, saved, seq_len=40), 1), whole[i + 1 : i + 2]
        )
    padded = 0
    for batch in whole:
        assert batch.mask is not None
        padded += (~batch.mask).sum()
        assert batch.stats.targets == batch.mask.sum() < batch.mask.size
        lengths = tokenizer.byte_lengths[batch.rows[:, 1:]]
        assert batch.stats.target_bytes == lengths[batch.mask].sum()
        assert (batch.document_starts is None) == (not isolated)
    assert padded > 0


def test_padding_stands_for_no_bytes_whatever_its_id_means(
    documents_of: DocumentsOf, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = tokenizer.byte_lengths.copy()
    plain = taken(stream(documents_of(packing="best_fit"), tokenizer, seq_len=40), 5)
    lengths[PADDING] = 1000
    monkeypatch.setattr(tokenizer, "byte_lengths", lengths)
    again = taken(stream(documents_of(packing="best_fit"), tokenizer, seq_len=40), 5)
    assert [batch.stats.target_bytes for batch in again] == [
        batch.stats.target_bytes for batch in plain
    ]


def test_isolated_documents_begin_with_their_separator(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    [batch] = taken(stream(documents_of(documents="isolate"), tokenizer), 1)
    assert batch.document_starts is not None
    for row, starts in zip(batch.rows[:, :-1], batch.document_starts, strict=True):
        borders = np.flatnonzero(row == tokenizer.eos_id)
        assert set(starts) == {0, *borders}


def test_seeds_and_epochs_differ(documents_of: DocumentsOf, tokenizer: Tokenizer) -> None:
    documents = documents_of(lanes=1, block_documents=100)
    rows = [taken(stream(documents, tokenizer, seed=s), 1)[0].rows for s in (1, 2)]
    assert not np.array_equal(*rows)
    texts = [d.text for d, _ in documents.training("text", 0)]
    shuffle = Shuffle("1 0 text", 100)
    orders = [[texts[i] for i in shuffle.order(epoch, 0, 41)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(texts)


def test_target_bytes_are_those_of_the_targets_text(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    for batch in taken(stream(documents_of(), tokenizer), 5):
        ids = [i for i in batch.rows[:, 1:].flatten().tolist() if i != tokenizer.eos_id]
        lengths = [int(tokenizer.byte_lengths[i]) for i in ids]
        assert batch.stats.target_bytes == sum(lengths)
        assert batch.rows.shape == (8, T + 1)
        assert batch.rows.dtype == np.int64


def test_the_epoch_is_that_of_the_slowest_lane(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    epochs = []
    for batch in taken(stream(documents_of(), tokenizer), 40):
        lanes = batch.stats.lanes.values()
        epochs.append(sorted(lane.sources["text"].cursor.epoch for lane in lanes))
        assert batch.stats.epoch("text") == epochs[-1][0]
        assert batch.stats.tokens("text") == sum(lane.sources["text"].tokens for lane in lanes)
    assert [0, 0, 0, 1] in epochs
    assert epochs[-1][0] >= 1


def test_held_out_documents_are_never_trained_on(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    documents = documents_of(lanes=1, holdout=0.3)
    batches = taken(stream(documents, tokenizer, global_batch=1, seq_len=500), 20)
    assert batches[-1].stats.epoch("text") >= 1
    ids = np.concatenate([batch.rows[0, :-1] for batch in batches])
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    trained = {tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]}
    assert trained == {d.text for d, _ in documents.training("text", 0)}
    assert trained.isdisjoint({d.text for d in documents.held_out("text")})


def test_a_batch_that_cannot_be_dealt_equally_is_refused(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch=6: [^\0]*data\.lanes=4: not divis"):
        stream(documents_of(), tokenizer, global_batch=6, world_size=3)


def test_the_fingerprint_is_json_and_tells_every_change(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    documents = documents_of()
    now = stream(documents, tokenizer).fingerprint
    check_fingerprint(json.loads(json.dumps(now)), now)
    check_fingerprint(now, stream(documents, tokenizer, global_batch=16, seq_len=5).fingerprint)
    others = [
        stream(documents_of(files=2), tokenizer),
        stream(documents_of(kind="datasets-jsonl"), tokenizer),
        stream(documents_of(lanes=2), tokenizer),
        stream(documents_of(shuffle=False), tokenizer),
        stream(documents_of(block_documents=4), tokenizer),
        stream(documents_of(holdout=0.1), tokenizer),
        stream(documents_of(max_document_bytes=99), tokenizer),
        stream(documents_of(packing="best_fit"), tokenizer),
        stream(documents_of(documents="isolate"), tokenizer),
        stream(documents_of(phases={"x": Phase(after_tokens=9, weights={"text": 2.0})}), tokenizer),
        stream(documents, tokenizer, seed=6),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="in the data of a run that goes on"):
            check_fingerprint(now, other.fingerprint)


def test_rows_of_another_length_are_other_data_for_best_fit_alone(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    documents = documents_of(packing="best_fit")
    now = stream(documents, tokenizer).fingerprint
    with pytest.raises(
        ConfigError, match=r"data\.packing='best_fit in rows of 5': was 'best_fit in rows of 13'"
    ):
        check_fingerprint(now, stream(documents, tokenizer, seq_len=5).fingerprint)


def test_another_limit_of_epochs_is_no_other_data(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    once, twice = (stream(documents_of(epochs=n), tokenizer) for n in (1, 2))
    check_fingerprint(once.fingerprint, twice.fingerprint)


def test_cursors_of_other_data_can_be_told_by_the_fingerprint_before_they_are_used(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    saved = stream(documents_of(lanes=2), tokenizer)
    cursors = taken(saved, 1)[0].stats.cursors
    now = stream(documents_of(lanes=4), tokenizer, cursors)
    with pytest.raises(ConfigError, match=r"data\.lanes=4: was 2 when this run began"):
        check_fingerprint(saved.fingerprint, now.fingerprint)


def test_a_changed_fingerprint_says_what_changed() -> None:
    with pytest.raises(ConfigError) as error:
        check_fingerprint({"data.lanes": 8, "seed": 0, "x": 1}, {"data.lanes": 4, "seed": 0})
    hint = "restore it, or start a new run with another run.name"
    assert error.value.problems == (
        Problem("data.lanes", 4, "was 8 when this run began", hint),
        Problem("x", None, "was 1 when this run began", hint),
    )
