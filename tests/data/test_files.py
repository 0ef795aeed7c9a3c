import gzip
import json
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import formats
from data.config import FilesSource
from data.documents import Documents
from data.files import FileCorpus, _first_record, local_corpus
from data.formats import SeparatedText


def corpus(paths: Path | tuple[str, ...], **settings: str) -> FileCorpus:
    names = str(paths) if isinstance(paths, Path) else paths
    return local_corpus(FilesSource(kind="files", paths=names, **settings))


def texts_of(files: FileCorpus) -> list[str]:
    return [document.text for document, _ in files.documents(0, 1)]


@given(
    files=st.lists(st.integers(0, 9), max_size=6), lanes=st.integers(1, 7), skip=st.integers(0, 9)
)
def test_records_are_dealt_to_lanes_exactly_once_and_evenly(
    files: list[int], lanes: int, skip: int
) -> None:
    dealt = [
        [
            (file, record)
            for file, count in enumerate(files)
            for record in range(_first_record(file, skip, lane, lanes), count, lanes)
        ]
        for lane in range(lanes)
    ]
    expected = [(file, record) for file, count in enumerate(files) for record in range(skip, count)]
    assert sorted(chain(*dealt)) == expected
    per_file = [[sum(f == file for f, _ in d) for d in dealt] for file in range(len(files))]
    assert all(max(counts) - min(counts) <= 1 for counts in per_file)


def test_files_of_one_document_each_are_dealt_to_lanes_in_turn(tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text(str(i))
    files = corpus(tmp_path)
    dealt = [[d.text for d, _ in files.documents(lane, 3)] for lane in range(3)]
    assert dealt == [["0", "3", "6"], ["1", "4"], ["2", "5"]]


def test_what_another_lane_reads_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "mine"}\nnot json\n')
    assert [d.text for d, _ in corpus(tmp_path).documents(0, 2)] == ["mine"]


def test_a_directory_is_read_recursively_in_sorted_order_without_hidden_and_other_files(
    tmp_path: Path,
) -> None:
    for name in ("b.txt", "a/z.txt", "a/.git/no.txt", ".no.txt", "picture.png", "a/b.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts_of(corpus(tmp_path)) == ["a/b.txt", "a/z.txt", "b.txt"]


def test_paths_are_read_in_the_order_given_and_a_file_named_twice_once(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    paths = (str(tmp_path / "c.txt"), str(tmp_path / "[ac].txt"))
    assert texts_of(corpus(paths)) == ["c", "a"]


def test_text_is_read_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufefféa\r\nb\rc\n\x00".encode())
    assert texts_of(corpus(tmp_path)) == ["éa\r\nb\rc\n\x00"]  # but for the byte order mark


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_a_separator_cuts_a_text_file_wherever_it_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(formats, "CHUNK", chunk)
    (path := tmp_path / "a.txt").write_text("one--two\r\n--é---four", newline="")
    assert list(SeparatedText("--").records(path)) == ["one", "two\r\n", "é", "-four"]


def test_null_text_and_blank_lines_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": null}\n   \n{"text": "b"}\n{"text": ""}')
    assert texts_of(corpus(tmp_path)) == ["b", ""]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\ud800b😀"}))
    assert texts_of(corpus(tmp_path)) == ["a?b😀"]


def test_the_text_field_is_a_setting(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a", "text": "no"}')
    pq.write_table(pa.table({"body": ["b", None], "text": ["no", "no"]}), tmp_path / "b.parquet")
    assert texts_of(corpus(tmp_path, text_field="body")) == ["a", "b"]


def test_identity_changes_with_names_sizes_and_formats_but_not_with_the_place(
    tmp_path: Path,
) -> None:
    for place in ("x", "y/z"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.jsonl").write_text('{"text": "a"}')
    here, there = corpus(tmp_path / "x"), corpus(tmp_path / "y/z")
    assert here.identity == there.identity
    assert here.identity != corpus(tmp_path / "x", text_field="body").identity
    (tmp_path / "x/a.jsonl").write_text('{"text": "longer"}')
    assert corpus(tmp_path / "x").identity != there.identity
    os.rename(tmp_path / "y/z/a.jsonl", tmp_path / "y/z/b.jsonl")
    assert corpus(tmp_path / "y/z").identity != there.identity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", r"no such file, no directory with \.txt, \.jsonl, \.parquet files in it,"),
        ("*.jsonl", r"no such file, .*, and no glob that matches any; correct the path \(relative"),
        ("empty", "no such file, no directory with"),
        ("picture.png", r"cannot read picture\.png; expected \.txt, \.jsonl, \.parquet"),
        ("picture.p*", r"cannot read picture\.png; expected \.txt, \.jsonl, \.parquet"),
    ],
)
def test_a_path_with_nothing_to_read_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").touch()
    with pytest.raises(ValueError, match=rf"data\.source\.paths='.*': {message}"):
        corpus(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl:2: not a line of JSON \(Expecting ':'"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: expected a JSON object such as {'text': \.\.\.}"),
        ("a.jsonl", b'{"a": 1, "b": 2}', r"text_field='text': .* has no such field; it has a, b"),
        ("a.jsonl", b'{"text": 5}', r"text_field='text': .*a\.jsonl:1 holds int there"),
        ("a.txt", b"a\xff", r"a\.txt:1: not UTF-8 at byte 1 \(invalid start byte\); convert it"),
        ("a.txt.gz", gzip.compress(b"a\xff", mtime=0), r"a\.txt\.gz:1: not UTF-8 at byte 1"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts_of(corpus(tmp_path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.parquet"])
def test_a_truncated_file_is_named_instead_of_ending_early(
    tmp_path: Path, write_file: Callable[[Path, list[str]], None], name: str
) -> None:
    path = tmp_path / name
    write_file(path, [str(i) * 99 for i in range(500)])
    assert len(texts_of(corpus(tmp_path))) == 500
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        ValueError, match=rf"{name}: cannot be read \(.*\); mend it or leave it out"
    ):
        texts_of(corpus(tmp_path))


def test_a_missing_parquet_column_is_named_with_those_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text_field='text': .*a\.parquet has no such field; it "):
        texts_of(corpus(tmp_path))


def test_files_are_closed_when_reading_stops_early(
    documents_of: Callable[..., Documents],
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "separated"):
        next(documents_of(kind).corpus.documents(0, 1))
    assert len(os.listdir("/proc/self/fd")) == before
