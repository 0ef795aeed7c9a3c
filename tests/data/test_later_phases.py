"""Phases that have not begun: told of before the first batch, and free to change on resume."""

import json
from collections.abc import Callable
from itertools import islice
from random import Random

import numpy as np
import pytest

from conf.errors import ConfigError, DataError
from data.batch import Cursors
from data.config import DataConfig, FilesSource, Phase
from data.loader import Loader
from data.sources.documents import Documents
from data.stream import BatchShape, TokenStream
from data.tokenizer import Tokenizer

Streams = Callable[..., TokenStream]
SHAPE = BatchShape(global_batch=4, seq_len=13)
PER_BATCH = 4 * 13
FIRST = {"a": 2.0, "b": 1.0, "c": 0.0}


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Streams:
    """Streams over sources a, b, c and d (60 documents each) and `few` (2 documents)."""
    folder, random = tmp_path_factory.mktemp("phases"), Random(0)
    for name, count in (("a", 60), ("b", 60), ("c", 60), ("d", 60), ("few", 2)):
        lines = [f"{name}{i} " + "x " * random.randint(1, 30) for i in range(count)]
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)

    def build(
        weights: dict[str, float],
        phases: list[tuple[int, dict[str, float]]],
        cursors: Cursors | None = None,
        files: dict[str, str] | None = None,
        **settings: object,
    ) -> TokenStream:
        sources = {
            name: FilesSource(
                kind="files",
                paths=str(folder / f"{(files or {}).get(name, name)}.jsonl"),
                weight=weight,
            )
            for name, weight in weights.items()
        }
        config = DataConfig(
            sources=sources,  # type: ignore[arg-type]
            phases={
                f"p{start}": Phase(after_tokens=start, weights=changed) for start, changed in phases
            },
            **{"lanes": 2, "holdout": 0.0, "block_documents": 5, **settings},  # type: ignore[arg-type]
        )
        return TokenStream(Documents(config), tokenizer, SHAPE, seed=3, cursors=cursors)

    return build


def rows(stream: TokenStream, count: int) -> np.ndarray:
    return np.concatenate([batch.rows for batch in islice(Loader(stream), count)])


def cursors_after(stream: TokenStream, batches: int) -> Cursors:
    *_, last = islice(Loader(stream), batches)
    return json.loads(json.dumps(last.stats.cursors))


def look_at_text(stream: TokenStream) -> None:
    """What a run and inspect_data do before the first batch."""
    for name in sorted(stream.empty_lanes()):
        stream.documents.set_lane_starts(name, stream.cut_by_documents(name))


# What may change on resume

LATER = 20 * PER_BATCH
CHANGES: dict[str, tuple[dict[str, float], list[tuple[int, dict[str, float]]]]] = {
    "other weights": (FIRST, [(LATER, {"a": 0.0, "c": 3.0})]),
    "another begin": (FIRST, [(LATER - 100, {"c": 1.0})]),
    "no phase": (FIRST, []),
    "one more phase": (FIRST, [(LATER, {"c": 1.0}), (LATER + 200, {"b": 9.0})]),
    "a source that has not been read goes": ({"a": 2.0, "b": 1.0}, [(LATER, {"b": 5.0})]),
    "a new source": ({**FIRST, "d": 0.0}, [(LATER, {"d": 4.0})]),
}


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_run_whose_later_phases_change_is_the_run_that_had_them_from_the_beginning(
    streams: Streams, packing: str, change: tuple
) -> None:
    saved = streams(FIRST, [(LATER, {"c": 1.0})], packing=packing)
    whole = rows(streams(*change, packing=packing), 40)
    for batches in (1, 4, 9):
        resumed = streams(*change, cursors_after(saved, batches), packing=packing)
        told = resumed.check_resumes(json.loads(json.dumps(saved.fingerprint)))
        assert any("data.phases was" in line for line in told)
        assert np.array_equal(rows(resumed, 40 - batches), whole[4 * batches :])


def test_the_text_of_a_source_that_has_not_been_read_may_change(streams: Streams) -> None:
    phases = [(LATER, {"c": 1.0})]
    saved = streams(FIRST, phases)
    resumed = streams(FIRST, phases, cursors_after(saved, 4), files={"c": "d"})
    [told] = resumed.check_resumes(saved.fingerprint)
    assert told.startswith("data.sources.c was ")
    whole = rows(streams(FIRST, phases, files={"c": "d"}), 40)
    assert np.array_equal(rows(resumed, 36), whole[16:])


# What may not

BEGAN = 5 * PER_BATCH


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
@pytest.mark.parametrize(
    "phases",
    [
        [(BEGAN, {"c": 2.0}), (LATER, {"c": 0.0})],  # this one has begun
        [(BEGAN + 1, {"c": 1.0}), (LATER, {"c": 0.0})],
        [(LATER, {"c": 0.0})],
        [(BEGAN, {"c": 1.0}), (8 * PER_BATCH, {"c": 0.0})],  # would have begun
    ],
)
def test_a_phase_that_has_begun_or_would_have_may_not_change(
    streams: Streams, packing: str, phases: list[tuple[int, dict[str, float]]]
) -> None:
    saved = streams(FIRST, [(BEGAN, {"c": 1.0}), (LATER, {"c": 0.0})], packing=packing)
    resumed = streams(FIRST, phases, cursors_after(saved, 12), packing=packing)
    with pytest.raises(
        ConfigError, match=r"restore it \(what applies after token [\d,]+ may change"
    ):
        resumed.check_resumes(saved.fingerprint)


def test_with_best_fit_all_that_was_packed_together_counts_as_read(streams: Streams) -> None:
    saved = streams(FIRST, [(LATER, {"c": 1.0})], packing="best_fit")
    cursors = cursors_after(saved, 2)
    before, read = (
        2 * max(sum(s["tokens"] for s in c["sources"].values()) + ahead * c["ahead"] for c in lanes)
        for lanes in [cursors.values()]
        for ahead in (0, 1)
    )
    assert 0 <= before < read < LATER
    for start, allowed in ((before + 1, False), (read, False), (read + 1, True)):
        resumed = streams(FIRST, [(start, {"c": 1.0})], cursors, packing="best_fit")
        if allowed:
            assert resumed.check_resumes(saved.fingerprint)
        else:
            with pytest.raises(ConfigError, match=rf"after token {read:,} may change"):
                resumed.check_resumes(saved.fingerprint)


def test_the_text_of_a_source_that_was_read_may_not_change(streams: Streams) -> None:
    saved = streams(FIRST, [(BEGAN, {"c": 1.0})])
    for name in "abc":
        resumed = streams(FIRST, [(BEGAN, {"c": 1.0})], cursors_after(saved, 12), {name: "d"})
        with pytest.raises(ConfigError, match=rf"data\.sources\.{name}="):
            resumed.check_resumes(saved.fingerprint)


def test_a_best_fit_checkpoint_that_does_not_say_how_far_it_read_allows_no_change(
    streams: Streams,
) -> None:
    saved = streams(FIRST, [(LATER, {"c": 1.0})], packing="best_fit")
    cursors = {
        lane: {key: value for key, value in cursor.items() if key != "ahead"}
        for lane, cursor in cursors_after(saved, 1).items()
    }
    same = streams(FIRST, [(LATER, {"c": 1.0})], cursors, packing="best_fit")
    assert same.check_resumes(saved.fingerprint) == []
    other = streams(FIRST, [(LATER, {"c": 2.0})], cursors, packing="best_fit")
    with pytest.raises(ConfigError, match=r"data\.phases=.*: was "):
        other.check_resumes(saved.fingerprint)


# What a later phase needs


@pytest.mark.parametrize("start", [1, LATER, 10**12])
def test_a_later_phase_whose_source_is_too_small_for_the_lanes_is_told_at_the_beginning(
    streams: Streams, start: int
) -> None:
    weights = {"a": 1.0, "few": 0.0}
    stream = streams(weights, [(start, {"few": 1.0})], lanes=4)
    with pytest.raises(DataError) as error:
        look_at_text(stream)
    message = str(error.value)
    assert "data.phases give data.sources.few a weight later in the run" in message
    assert "data.sources.few has 2 and" in message
    assert "lower data.lanes, add documents to it, or leave it out of data.phases" in message
    look_at_text(streams(weights, [(start, {"a": 2.0})], lanes=4))
    look_at_text(streams(weights, [(start, {"few": 1.0})], lanes=1))


def test_a_run_that_goes_on_is_told_only_what_it_may_change(streams: Streams) -> None:
    weights = {"a": 1.0, "few": 0.0}
    saved = streams(weights, [], lanes=4)
    resumed = streams(weights, [(LATER, {"few": 1.0})], cursors_after(saved, 2), lanes=4)
    resumed.check_resumes(saved.fingerprint)
    with pytest.raises(DataError) as error:
        look_at_text(resumed)
    assert "Now add documents to it, or leave it out of data.phases" in str(error.value)
    # Each of the two is allowed.
    more = [(LATER, {"few": 1.0})]
    bigger = streams(weights, more, cursors_after(saved, 2), {"few": "b"}, lanes=4)
    bigger.check_resumes(saved.fingerprint)
    look_at_text(bigger)
    without = streams(weights, [], cursors_after(saved, 2), lanes=4)
    assert without.check_resumes(saved.fingerprint) == []
    look_at_text(without)


def test_text_of_a_later_phase_is_not_held_open_until_then(streams: Streams) -> None:
    stream = streams(FIRST, [(LATER, {"c": 1.0})])
    look_at_text(stream)
    assert {name for name, _ in stream.documents._begun} == {"a", "b"}
