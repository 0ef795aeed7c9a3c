import json
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from conf.errors import DataError
from data.config import DataConfig, DatasetsSource, FilesSource, PythonSource
from data.source import BadRecord
from data.sources.documents import Documents, is_held_out

DocumentsOf = Callable[..., Documents]


def held_out(text: str, fraction: float) -> bool:
    return is_held_out(xxh3_64_intdigest(text.encode()), fraction)


def read(documents: Documents, lane: int) -> list[str]:
    """The texts of one pass."""
    return [document.text for document, _ in documents.training("text", lane)]  # type: ignore[union-attr]


@pytest.mark.parametrize(("files", "lanes"), [(1, 4), (3, 4), (3, 2), (4, 4), (6, 4), (3, 1)])
def test_every_document_is_in_one_epoch_of_one_lane(
    documents_of: DocumentsOf, texts: list[str], kind: str, files: int, lanes: int
) -> None:
    documents = documents_of(kind, files, lanes=lanes)
    lists = [read(documents, lane) for lane in range(lanes)]
    assert Counter(chain(*lists)) == Counter(texts)


def test_a_pass_goes_on_exactly_from_every_position(documents_of: DocumentsOf, kind: str) -> None:
    documents = documents_of(kind, lanes=2)
    whole = list(documents.training("text", 1))
    for i, (_, position) in enumerate(whole):
        rest = documents.training("text", 1, json.loads(json.dumps(position)))
        assert [d for d, _ in rest] == [d for d, _ in whole[i + 1 :]]


@pytest.mark.parametrize("step", [1, 3])
def test_a_pass_can_be_interrupted_again_and_again(
    documents_of: DocumentsOf, kind: str, step: int
) -> None:
    documents = documents_of(kind, lanes=2)
    found, position = [], None
    while part := list(islice(documents.training("text", 1, position), step)):
        found += [document for document, _ in part]
        position = part[-1][1]
    assert found == [d for d, _ in documents.training("text", 1)]


def test_documents_are_split_by_their_text_alone(
    documents_of: DocumentsOf, texts: list[str]
) -> None:
    expected = [text for text in texts if held_out(text, 0.3)]
    assert 4 < len(expected) < 20
    for kind, lanes in (("txt", 1), ("jsonl", 4), ("datasets-parquet", 2)):
        documents = documents_of(kind, lanes=lanes, holdout=0.3)
        assert [d.text for d in documents.held_out("text")] == expected  # type: ignore[union-attr]
        trained = chain(*(read(documents, lane) for lane in range(lanes)))
        assert Counter(trained) + Counter(expected) == Counter(texts)


def test_a_larger_holdout_contains_a_smaller_one() -> None:
    texts = [str(i) for i in range(10_000)]
    small = {t for t in texts if held_out(t, 0.02)}
    assert small < {t for t in texts if held_out(t, 0.05)}
    assert 150 < len(small) < 250
    assert not any(held_out(t, 0.0) for t in texts)


def test_a_sample_is_of_all_parts_and_about_its_size(
    documents_of: DocumentsOf, texts: list[str]
) -> None:
    documents = documents_of(holdout=0.3)
    training = [t for t in texts if not held_out(t, 0.3)]
    assert Counter(documents.sample(10**6)) == Counter(training)
    for size in (100, 3000):
        sample = list(documents.sample(size))
        assert size <= len("".join(sample).encode()) < size + 10
        assert all(any(t.startswith(s) for t in training) for s in sample)
    assert list(documents.sample(100)) == list(documents.sample(100))
    quarters = {4 * training.index(text) // len(training) for text in sample[:-1]}
    assert quarters == {0, 1, 2, 3}


def test_a_sample_of_a_mixture_keeps_its_proportions(tmp_path: Path) -> None:
    sources = {
        name: write(tmp_path / f"{name}.jsonl", *[name * 100] * 500, weight=weight)
        for name, weight in (("a", 3.0), ("b", 1.0), ("c", 0.0))
    }
    sample = Counter("".join(Documents(config(sources)).sample(8000)))
    assert sample["c"] == 0
    assert 6000 <= sample["a"] <= 6010
    assert 2000 <= sample["b"] <= 2010


def write(path: Path, *texts: str, **settings: object) -> FilesSource:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return FilesSource(kind="files", paths=str(path), **settings)  # type: ignore[arg-type]


def config(
    sources: dict[str, FilesSource | DatasetsSource | PythonSource], **settings: object
) -> DataConfig:
    return DataConfig(sources=sources, **{"holdout": 0.0, **settings})  # type: ignore[arg-type]


def test_a_lane_without_documents_is_an_error_instead_of_an_endless_search(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "a", "b" * 100, "c")
    documents = Documents(config({"text": source}, lanes=4))
    assert [read(documents, lane) for lane in (0, 3)] == [["a", "b" * 100], ["c"]]
    with pytest.raises(DataError, match="lanes=4") as error:
        read(documents, 2)
    assert str(error.value) == (
        "data.lanes=4: a lane found no document to train on, because data.sources.text has 3 and "
        "data.holdout=0.0 holds out 0 of them. Lower data.lanes, or add documents: each lane "
        "needs one to train on, and a .txt file is one document unless a separator cuts it"
    )


def test_a_corpus_without_text_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "", "  ")
    documents = Documents(config({"text": source}))
    for attempt in (lambda: read(documents, 0), lambda: list(documents.sample(100))):
        with pytest.raises(DataError, match="no text in it") as error:
            attempt()
        assert str(error.value) == (
            f"data.sources.text: no text in it ({tmp_path}/a.jsonl; not documents: 2 empty). "
            "Choose a source with documents"
        )


LONG = 500


def bad_lines() -> dict[str, bytes]:
    """A line of each kind that is no document, by what is wrong with it."""
    return {
        "not JSON": b'{"text": "cut off',
        "not an object": b'["text"]',
        "no field": b'{"txt": "a"}',
        "not text": b'{"text": 17}',
        "null": b'{"text": null}',
        "empty": b'{"text": " \\n\\t"}',
        "too long": json.dumps({"text": "x" * (LONG + 1)}).encode(),
        "not UTF-8": b'{"text": "\xff\xfe"}',
        "half a surrogate pair": b'{"text": "\\ud83d alone"}',
    }


@pytest.mark.parametrize("lanes", [1, 3])
def test_exactly_the_bad_documents_are_quarantined_by_position(tmp_path: Path, lanes: int) -> None:
    kinds = list(bad_lines().values())
    lines, bad = [], {}
    offset = 0
    for number in range(4000):
        line = json.dumps({"text": f"document {number} {'y' * (number % 97)}"}).encode()
        if number % 100 == 37:
            line = kinds[number // 100 % len(kinds)]
            bad[offset] = line
        lines.append(line)
        offset += len(line) + 1
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = FilesSource(kind="files", paths=str(path))
    documents = Documents(config({"text": source}, lanes=lanes, max_document_bytes=LONG))
    documents.quarantine.write_to(tmp_path / "quarantine.jsonl")
    for _ in range(2):
        texts = list(chain(*(read(documents, lane) for lane in range(lanes))))
        assert texts == [json.loads(line)["text"] for line in lines if line not in kinds]
    written = [
        json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()
    ]
    assert sorted(bad_record["origin"] for bad_record in written) == sorted(
        f"{path}@{at}" for at in bad
    )
    assert len(bad) == 40


@pytest.mark.parametrize("kind", bad_lines())
def test_what_is_wrong_is_told(tmp_path: Path, kind: str) -> None:
    line = bad_lines()[kind]
    good = b'{"text": "good"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, line, good]))
    source = FilesSource(kind="files", paths=str(tmp_path))
    documents = Documents(config({"text": source}, lanes=1, max_document_bytes=LONG))
    assert read(documents, 0) == ["good", "good"]
    [bad_record] = documents.quarantine.bad_records.values()
    words = {
        "not an object": "object",
        "no field": "no field 'text'; it has txt",
        "not text": "a number, not text",
        "null": "null",
        "half a surrogate pair": "surrogate",
    }
    assert isinstance(bad_record, BadRecord)
    assert words.get(kind, kind) in bad_record.reason
    assert bad_record.origin == f"{tmp_path}/a.jsonl@{len(good) + 1}"
    assert len(bad_record.excerpt) <= 2000


def test_too_many_bad_documents_stop_the_run(tmp_path: Path) -> None:
    lines = [b'{"text": "good"}', b"bad"] * 50
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = FilesSource(kind="files", paths=str(tmp_path))
    documents = Documents(config({"text": source}, lanes=1, max_quarantined=0.4))
    with pytest.raises(DataError, match=r"data\.max_quarantined=0\.4: 21 of 42 records"):
        read(documents, 0)
    documents = Documents(config({"text": source}, lanes=1, max_quarantined=0.5))
    assert read(documents, 0) == ["good"] * 50


def test_a_document_is_measured_in_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "é" * 10, "e" * 20, "é" * 11)
    documents = Documents(config({"text": source}, lanes=1, max_document_bytes=20))
    assert read(documents, 0) == ["é" * 10, "e" * 20]


def test_good_records_are_counted_while_they_are_read_and_when_reading_ends(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *(f"text {i}" for i in range(250)))
    documents = Documents(config({"text": source}, lanes=1))
    training = documents.training("text", 0)
    list(islice(training, 230))
    assert 200 <= documents.quarantine.records <= 230
    training.close()  # type: ignore[attr-defined]
    assert documents.quarantine.records == 230
    read(documents, 0)
    assert documents.quarantine.records == 480
