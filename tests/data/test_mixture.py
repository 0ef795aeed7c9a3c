import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, FilesSource, Phase
from data.mixture import Lane, LaneCursor, SourceState
from data.sources.documents import Documents
from data.tokenizer import Tokenizer

Reader = Callable[..., Lane]


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Reader:
    """A lane over sources `a`, `b`, `c`, whose documents say where they are from."""
    folder, random = tmp_path_factory.mktemp("mixture"), Random(0)
    for name, words in (("a", 40), ("b", 10), ("c", 90)):
        lines = [f"{name}{i} " + "x " * random.randint(1, words) for i in range(24)]
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)

    def build(
        weights: dict[str, float],
        *,
        epochs: dict[str, int] | None = None,
        number: int = 0,
        **settings: object,
    ) -> Lane:
        sources = {
            name: FilesSource(
                kind="files",
                paths=str(folder / f"{name}.jsonl"),
                weight=weight,
                epochs=(epochs or {}).get(name),
            )
            for name, weight in weights.items()
        }
        config = DataConfig(
            sources=sources,
            **{"lanes": 2, "holdout": 0.0, "block_documents": 5, **settings},  # type: ignore[arg-type]
        )
        return Lane(Documents(config), tokenizer, seed=3, number=number)

    return build


def documents_of(lane: Lane, count: int, start: LaneCursor | None = None) -> list[tuple[str, int]]:
    """The name of each document and how many tokens it has."""
    read = islice(lane.read(start), count)
    return [(lane.tokenizer.decode(tokens).split(" ")[0], len(tokens)) for tokens, _ in read]


def tokens_by_source(documents: list[tuple[str, int]]) -> Counter[str]:
    tokens: Counter[str] = Counter()
    for name, count in documents:
        tokens[name[0]] += count
    return tokens


@pytest.mark.parametrize(
    "weights", [{"a": 1, "b": 1}, {"a": 3, "b": 1, "c": 2}, {"a": 0.7, "c": 0.1}]
)
def test_each_source_has_its_share_of_the_tokens(lane: Reader, weights: dict[str, float]) -> None:
    tokens = tokens_by_source(documents_of(lane(weights), 3000))
    total = sum(tokens.values())
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs(tokens[name] - share * total) < 200


@pytest.mark.parametrize("documents", [1, 5, 50])
def test_shares_are_right_from_the_first_document_on(lane: Reader, documents: int) -> None:
    tokens: Counter[str] = Counter()
    for seed in range(200):
        reader = lane({"a": 3, "b": 1})
        reader = Lane(reader.documents, reader.tokenizer, seed=seed, number=0)
        tokens += tokens_by_source(documents_of(reader, documents))
    assert 0.6 < tokens["a"] / sum(tokens.values()) < 0.9


def test_lanes_seeds_and_phases_begin_at_different_places_of_the_turn(lane: Reader) -> None:
    reader = lane({"a": 40, "b": 1}, lanes=1)
    firsts = []
    for seed, number in [(3, n) for n in range(30)] + [(s, 0) for s in range(30)]:
        own = Lane(_Whole(reader.documents.config), reader.tokenizer, seed=seed, number=number)
        names = [name[0] for name, _ in documents_of(own, 400)]
        firsts.append(names.index("b"))
    assert len(set(firsts[:30])) > 5
    assert len(set(firsts[30:])) > 5
    assert 0 < sum(first < 3 for first in firsts) < 60


class _Whole(Documents):
    """Documents of which every lane reads all, so that only its number makes a difference."""

    def training(self, name: str, lane: int, position: object = None):  # type: ignore[no-untyped-def]
        del lane
        return super().training(name, 0, position)


@settings(max_examples=40)
@given(seed=st.integers(0, 9), at=st.integers(0, 150), phased=st.booleans())
def test_it_goes_on_exactly_from_every_cursor(
    lane: Reader, seed: int, at: int, phased: bool
) -> None:
    phases = {
        "mid": Phase(after_tokens=3000, weights={"b": 5.0, "a": 0.1}),
        "end": Phase(after_tokens=6000, weights={"a": 1.0}),
    }
    reader = lane(
        {"a": 2, "b": 1, "c": 1}, epochs={"b": 2, "c": 1}, phases=phases if phased else {}
    )
    reader = Lane(reader.documents, reader.tokenizer, seed=seed, number=1)
    whole = list(islice(reader.read(), 160))
    cursor = LaneCursor.from_json(json.loads(json.dumps(whole[at][1].to_json())))
    assert cursor == whole[at][1]
    rest = list(islice(reader.read(cursor), 160 - at))
    assert [(t.tolist(), c) for t, c in rest] == [(t.tolist(), c) for t, c in whole[at:]]


def test_the_cursor_counts_tokens_and_epochs_of_each_source(lane: Reader) -> None:
    reader = lane({"a": 1, "b": 2})
    read = list(islice(reader.read(), 200))
    tokens = tokens_by_source(documents_of(reader, 199))
    last = read[-1][1].sources
    assert {name: last[name].tokens for name in "ab"} == dict(tokens)
    own = {name: len(list(reader.documents.training(name, 0))) for name in "ab"}
    names = Counter(name[0] for name, _ in documents_of(reader, 199))
    for name in "ab":
        # A pass that was read to its end is complete when the next one is begun.
        assert names[name] // own[name] - last[name].cursor.epoch in (0, 1)


def test_a_used_up_source_leaves_its_share_to_the_others(lane: Reader) -> None:
    reader = lane({"a": 1, "b": 5}, epochs={"b": 2})
    documents = documents_of(reader, 300)
    times = Counter(name for name, _ in documents if name[0] == "b")
    own = {d.text.split(" ")[0] for d, _ in reader.documents.training("b", 0)}  # type: ignore[union-attr]
    assert times == Counter(dict.fromkeys(own, 2))
    assert {name[0] for name, _ in documents[-100:]} == {"a"}


def test_when_all_sources_are_used_up_the_text_ends(lane: Reader) -> None:
    reader = lane({"a": 1, "b": 1}, epochs={"a": 1, "b": 3})
    read = reader.read()
    own = {name: len(list(reader.documents.training(name, 0))) for name in "ab"}
    documents = list(read)
    assert len(documents) == own["a"] + 3 * own["b"] + 1
    nothing, end = documents[-1]
    assert len(nothing) == 0
    assert [end.sources[name].cursor.epoch for name in "ab"] == [1, 3]
    assert [(t.tolist(), c) for t, c in reader.read(end)] == [([], end)]
    rest = list(reader.read(documents[-2][1]))
    assert [c for _, c in rest] == [c for _, c in documents[-2:]]


def test_phases_change_the_weights_when_their_tokens_are_reached(lane: Reader) -> None:
    start = 40_000
    phases = {"anneal": Phase(after_tokens=start, weights={"a": 0.0, "c": 4.0})}
    reader = lane({"a": 1, "b": 1, "c": 0}, phases=phases)
    before, after, total = Counter[str](), Counter[str](), 0
    for name, count in documents_of(reader, 3000):
        (before if total * reader.documents.config.lanes < start else after)[name[0]] += count
        total += count
    assert before["c"] == 0
    assert abs(before["a"] - before["b"]) < 200
    assert after["a"] == 0
    assert abs(after["c"] - 4 * after["b"]) < 4 * (200)


def test_one_source_is_read_as_it_is(lane: Reader) -> None:
    reader = lane({"a": 0.5}, shuffle=False, number=1)
    own = [d.text.split(" ")[0] for d, _ in reader.documents.training("a", 1)]  # type: ignore[union-attr]
    assert [name for name, _ in documents_of(reader, 30)] == (own * 3)[:30]


def test_a_fresh_cursor_has_read_nothing() -> None:
    cursor = LaneCursor({"a": SourceState()})
    assert cursor.to_json() == {
        "sources": {
            "a": {
                "epoch": 0,
                "block": 0,
                "position": None,
                "document": 0,
                "tokens": 0,
                "earlier": 0,
            }
        },
        "phase": 0,
        "skip": 0,
    }


def test_lanes_of_other_numbers_read_other_documents(lane: Reader, tmp_path: Path) -> None:
    del tmp_path
    names = [{n for n, _ in documents_of(lane({"a": 1}, number=number), 24)} for number in (0, 1)]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == {f"a{i}" for i in range(24)}
