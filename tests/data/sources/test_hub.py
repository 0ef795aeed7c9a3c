"""What lanes read of a streamed dataset, how often, and what is wrong with it."""

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from threading import Barrier, Thread
from time import sleep
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError, TransientError
from data.config import DatasetsSource
from data.source import BadRecord, Document, Position
from data.sources import hub
from data.sources.hub import HubCorpus, _parts

TEXTS = [f"document {i} " + "word " * (i % 7) for i in range(61)]


def corpus(path: str, *files: Path, **settings: Any) -> HubCorpus:
    names = tuple(map(str, files))
    return HubCorpus(
        "web", DatasetsSource(kind="datasets", path=path, data_files=names, **settings)
    )


def texts(corpus: HubCorpus, lane: int, lanes: int, position: Position = None) -> list[str]:
    return [record.text for record, _ in corpus.documents(lane, lanes, position)]


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="session")
def json_corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HubCorpus]:
    """Texts in some number of JSON files."""

    def write(files: int, texts: list[str] = TEXTS) -> HubCorpus:
        folder = tmp_path_factory.mktemp("json")
        paths = [folder / f"{number:03}.jsonl" for number in range(files)]
        for number, path in enumerate(paths):
            share = texts[len(texts) * number // files : len(texts) * (number + 1) // files]
            path.write_text(lines([{"id": 0, "text": text} for text in share]))
        return corpus("json", *paths)

    return write


@pytest.fixture(scope="session")
def parquet_corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], HubCorpus]:
    """TEXTS in one Parquet file of 13 row groups."""
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    pq.write_table(pa.table({"id": [0] * 61, "text": TEXTS}), path, row_group_size=5)
    return lambda: corpus("parquet", path)


@pytest.fixture
def counted(json_corpus: Callable[..., HubCorpus]) -> tuple[HubCorpus, Counter[str]]:
    """TEXTS in one shard, and how often each has been read from it."""
    reads: Counter[str] = Counter()
    one = json_corpus(1)

    def count(row: dict[str, str]) -> dict[str, str]:
        reads[row["text"]] += 1
        return row

    one.stream = one.stream.map(count)
    return one, reads


def test_without_datasets_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError) as refused:
        corpus("json", tmp_path / "some.jsonl")
    [problem] = map(str, refused.value.problems)
    assert problem.startswith("data.sources.web.kind='datasets': needs the package datasets, which")
    assert problem.endswith('-m pip install "phd-transformer[hub]"')


@given(shards=st.integers(1, 400), lanes=st.integers(1, 24))
def test_every_remainder_of_every_shard_belongs_to_one_lane(shards: int, lanes: int) -> None:
    remainders: dict[int, list[tuple[int, int]]] = {shard: [] for shard in range(shards)}
    costs = []
    for lane in range(lanes):
        parts = _parts(shards, lanes, lane)
        costs.append(sum(len(part.shards) / part.readers for part in parts))
        for part in parts:
            for shard in part.shards:
                remainders[shard].append((part.readers, part.remainder))
    for of_shard in remainders.values():
        readers = len(of_shard)
        assert sorted(of_shard) == [(readers, remainder) for remainder in range(readers)]
    assert max(costs) <= min(costs) * (1 + 1 / hub.UNSHARED_SHARDS)


@pytest.mark.parametrize(("files", "lanes"), [(1, 1), (1, 8), (3, 2), (3, 8), (5, 4), (40, 2)])
def test_lanes_together_read_every_document_once(
    json_corpus: Callable[..., HubCorpus], files: int, lanes: int
) -> None:
    shared = json_corpus(files)
    by_lane = [texts(shared, lane, lanes) for lane in range(lanes)]
    assert sorted(chain.from_iterable(by_lane)) == sorted(TEXTS)
    assert max(map(len, by_lane)) - min(map(len, by_lane)) <= files
    assert [texts(json_corpus(files), lane, lanes) for lane in range(lanes)] == by_lane


def test_shards_of_one_record_are_dealt_equally(json_corpus: Callable[..., HubCorpus]) -> None:
    three = json_corpus(3, ["a", "b", "c"])
    assert sorted(texts(three, lane, 4) for lane in range(4)) == [[], ["a"], ["b"], ["c"]]


@pytest.mark.parametrize("lanes", [1, 3, 8, 20])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_any_position_goes_on_exactly(
    json_corpus: Callable[..., HubCorpus],
    parquet_corpus: Callable[[], HubCorpus],
    kind: str,
    lanes: int,
) -> None:
    def build() -> HubCorpus:
        return json_corpus(3) if kind == "json" else parquet_corpus()

    whole, resumed = build(), build()
    for lane in (0, lanes - 1):
        read = list(whole.documents(lane, lanes))
        for done, (_, position) in enumerate(read, start=1):
            saved = json.loads(json.dumps(position))
            assert list(resumed.documents(lane, lanes, saved)) == read[done:]


def test_a_parquet_file_is_read_by_row_groups_where_there_are_too_few_files(
    parquet_corpus: Callable[[], HubCorpus],
) -> None:
    one = parquet_corpus()
    assert one.stream.num_shards == 1
    origins = [record.origin for record, _ in one.documents(2, 6)]
    # 13 row groups: each lane has two, and all share the last one, which has a single row.
    assert origins == [f"parquet[{group}/13]#{row}" for group in (4, 5) for row in range(5)]
    assert texts(one, 0, 1) == TEXTS


def test_lanes_that_share_a_shard_read_it_once_between_them(
    counted: tuple[HubCorpus, Counter[str]],
) -> None:
    one, reads = counted
    lanes = [one.documents(lane, 8) for lane in range(8)]
    for _ in range(8):  # 61 documents
        for lane in lanes:
            next(lane, None)
    assert reads == Counter(TEXTS)


def test_lanes_that_resume_apart_come_together(counted: tuple[HubCorpus, Counter[str]]) -> None:
    one, reads = counted
    read = [list(one.documents(lane, 4)) for lane in range(4)]
    alone = sum(reads.values())
    # The first lane has read 8 of its documents, the last none of them.
    starts = [read[0][7][1], read[1][5][1], read[2][2][1], None]
    reads.clear()
    lanes = [one.documents(lane, 4, start) for lane, start in enumerate(starts)]
    rest: list[list[Any]] = [[], [], [], []]
    for _ in range(16):
        for lane, more in zip(lanes, rest, strict=True):
            more += islice(lane, 1)
    assert rest == [read[0][8:], read[1][6:], read[2][3:], read[3]]
    # `datasets` itself goes through the shard from its beginning for every state.
    last = list(reads.values())[-8:]
    assert last == [1] * 8
    assert sum(reads.values()) < alone


def test_a_lane_that_falls_out_of_the_window_reads_for_itself(
    counted: tuple[HubCorpus, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, reads = counted
    expected = [texts(one, lane, 2) for lane in range(2)]
    reads.clear()
    monkeypatch.setattr(hub, "HELD_CHARACTERS", 3 * (hub.RECORD_CHARACTERS + 60))
    fast, slow = one.documents(0, 2), one.documents(1, 2)
    ahead = [record.text for record, _ in islice(fast, 20)]
    behind = [record.text for record, _ in slow]
    assert [ahead + [record.text for record, _ in fast], behind] == expected
    assert max(reads.values()) > 1


def test_what_is_held_is_bounded_and_gone_with_the_lanes(
    counted: tuple[HubCorpus, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = counted
    monkeypatch.setattr(hub, "HELD_CHARACTERS", 10 * (hub.RECORD_CHARACTERS + 60))
    lanes: list[Iterator[Any]] = [one.documents(lane, 2) for lane in range(2)]
    for lane in lanes:
        next(lane)
    [sharing] = one._shared.values()
    for _ in range(20):
        next(lanes[0])
    held = [len(one_pass.held) for one_pass in sharing._passes]
    assert len(held) == 1
    assert 10 <= held[0] <= 12
    del lane
    lanes.clear()
    gc.collect()
    assert list(sharing._passes) == []


def test_threads_that_share_a_shard_read_what_each_would_alone(
    counted: tuple[HubCorpus, Counter[str]],
) -> None:
    def slow(row: dict[str, str]) -> dict[str, str]:
        sleep(0.001)  # another thread's turn
        return row

    one, reads = counted
    expected = [texts(one, lane, 8) for lane in range(8)]
    reads.clear()
    one.stream = one.stream.map(slow)
    found: dict[int, list[str]] = {}
    together = Barrier(8)

    def read(lane: int) -> None:
        records = one.documents(lane, 8)
        found[lane] = []
        for _ in range(min(map(len, expected))):  # as the lanes of a batch do
            together.wait()
            found[lane].append(next(records)[0].text)  # type: ignore[union-attr]
        together.wait()
        found[lane] += [record.text for record, _ in records]  # type: ignore[union-attr]
        together.wait()

    threads = [Thread(target=read, args=(lane,)) for lane in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[lane] for lane in range(8)] == expected
    assert set(reads.values()) == {1}
    assert len(reads) == len(TEXTS)


def test_a_record_without_text_is_a_bad_one_and_the_rest_goes_on(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text(lines([{"text": "a"}, {"text": None}, {"text": "b"}]))
    records = [record for record, _ in corpus("json", file).documents(0, 1)]
    reason = "field 'text' holds null, not text"
    origins = [f"json[0/1]#{number}" for number in range(3)]
    assert records == [
        Document("a", origins[0]),
        BadRecord(reason, origins[1], "None"),
        Document("b", origins[2]),
    ]


def test_records_of_another_type_are_bad_ones(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text(lines([{"text": 7}]))
    [(bad_record, _)] = corpus("json", file).documents(0, 1)
    assert bad_record == BadRecord(
        "field 'text' holds a value of type int, not text", "json[0/1]#0", "7"
    )


def test_a_field_that_a_dataset_is_known_to_lack_is_refused_with_those_it_has(
    parquet_corpus: Callable[[], HubCorpus],
) -> None:
    files = parquet_corpus().source.data_files
    assert files is not None
    with pytest.raises(
        DataError,
        match=r"data\.sources\.web\.text_field='body': parquet has no such field; it has id, text",
    ):
        corpus("parquet", *map(Path, files), text_field="body")


def test_a_field_that_only_reading_finds_missing_is_a_bad_record(
    json_corpus: Callable[..., HubCorpus],
) -> None:
    one = json_corpus(1)
    one.stream = one.stream.map(lambda row: {"body": row["text"]}, remove_columns=["id", "text"])
    bad_record, _ = next(one.documents(0, 1))
    assert bad_record == BadRecord("no field 'text'; it has body", "json[0/1]#0")


def test_a_damaged_file_ends_reading_with_the_settings_named(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text(lines([{"text": "a"}]) + "{broken\n")
    with pytest.raises(DataError, match=r"data\.sources\.web\.path='json', .*kind: files"):
        list(corpus("json", file).documents(0, 1))


def test_a_damaged_table_is_no_failure_of_the_network(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), path := tmp_path / "a.parquet", compression="zstd")
    content = bytearray(path.read_bytes())
    content[20:60] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.sources\.web\.path='parquet', .*cannot read it"):
        list(corpus("parquet", path).documents(0, 1))


def test_no_lane_takes_a_failure_for_the_end(json_corpus: Callable[..., HubCorpus]) -> None:
    def fail(row: dict[str, str]) -> dict[str, str]:
        if row["text"] == TEXTS[4]:
            raise ConnectionError("unreachable")
        return row

    one = json_corpus(1)
    one.stream = one.stream.map(fail)
    lanes = [one.documents(lane, 2) for lane in range(2)]
    assert [next(lane)[0].text for lane in lanes for _ in range(2)] == [
        TEXTS[i] for i in (0, 2, 1, 3)
    ]
    for lane in lanes:
        with pytest.raises(TransientError, match=r"cannot read it \(unreachable\); check the net"):
            next(lane)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_files": "missing.jsonl"}, r"data_files='missing\.jsonl': .* cannot read it \("),
        ({"split": "test"}, r"split='test', .* cannot read it \(.*Available splits: \['train'\]"),
    ],
)
def test_what_cannot_be_opened_is_named(
    json_corpus: Callable[..., HubCorpus],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"path": "json", "data_files": json_corpus(1).source.data_files, **settings}
    with pytest.raises(ConfigError, match=r"data\.sources\.web\.path='json', .*" + message):
        HubCorpus("web", DatasetsSource(kind="datasets", **given))


def test_the_fingerprint_holds_everything_known_that_decides_the_documents(
    json_corpus: Callable[..., HubCorpus],
) -> None:
    assert json_corpus(2).fingerprint["data.sources.web.shards"] == 2
    fingerprint = json_corpus(3).fingerprint
    assert fingerprint["data.sources.web.path"] == "json"
    assert len(fingerprint["data.sources.web.data_files"]) == 3
    assert fingerprint["data.sources.web.shards"] == 3
    assert len(json.loads(json.dumps(fingerprint))) == 7
