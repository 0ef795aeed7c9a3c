import io
import json
import tracemalloc
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conf.errors import DataError
from data.config import DatasetsSource
from data.source import BadRecord, Document, Record
from data.sources import formats
from data.sources.formats import (
    ByteRange,
    Format,
    JsonLines,
    Parquet,
    PythonFile,
    SeparatedText,
    TextFile,
    pieces,
)
from data.sources.hub import HubCorpus
from data.storage.transport import ShardUnavailableError

LIMIT = 10_000
JSONL = JsonLines("text", LIMIT)
PARQUET = Parquet("text", "books")
SEPARATORS = (b"|", b"ab", b"aa", b"aba", b"aabaa", b"abab", b"aaa|")


def whole(content: bytes) -> ByteRange:
    size = max(1, len(content))
    return ByteRange(0, size, size)


def read(form: Format, content: bytes, byte_range: ByteRange | None = None) -> list[Record]:
    items = form.records(io.BytesIO(content), "u", byte_range or whole(content))
    return [record for record, _ in items]


def parquet(table: pa.Table | dict[str, Any], **options: Any) -> bytes:
    table = pa.table(table) if isinstance(table, dict) else table
    pq.write_table(table, file := io.BytesIO(), **options)
    return file.getvalue()


@given(units=st.integers(0, 99), size=st.integers(1, 99), cuts=st.lists(st.integers(0, 99)))
def test_ranges_side_by_side_have_each_unit_once_where_it_begins(
    units: int, size: int, cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, size) for cut in cuts), size]
    ranges = [ByteRange(start, stop, size) for start, stop in pairwise(borders)]
    assert list(chain(*(part.units(units) for part in ranges))) == list(range(units))
    for part in ranges:
        assert all(part.start <= unit * size / units < part.stop for unit in part.units(units))
        assert part.units(size) == range(part.start, part.stop)


def split(content: bytes, separator: bytes) -> list[tuple[int, bytes, int]]:
    """The slow twin: where `bytes.split` finds pieces of the whole, and what they are."""
    found, start = [], 0
    for piece in content.split(separator):
        found.append((start, piece, min(start + len(piece) + len(separator), len(content))))
        start += len(piece) + len(separator)
    return found


@given(
    content=st.text("ab|", max_size=60).map(str.encode),
    separator=st.sampled_from(SEPARATORS),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    chunk=st.integers(1, 70),
    reach=st.integers(1, 70),
)
def test_pieces_from_any_byte_on_are_those_of_the_whole_file(
    content: bytes, separator: bytes, cuts: list[int], chunk: int, reach: int
) -> None:
    borders = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "READ_BYTES", chunk)
        patch.setattr(formats, "SCAN_SEPARATORS", reach)
        found = [
            list(pieces(io.BytesIO(content), separator, range(start, stop), limit=99))
            for start, stop in pairwise(borders)
        ]
    assert list(chain(*found)) == [
        piece for piece in split(content, separator) if piece[0] < len(content)
    ]
    for (start, stop), inside in zip(pairwise(borders), found, strict=True):
        assert all(start <= place < stop for place, _, _ in inside)


@given(
    content=st.text("ab|", max_size=60).map(str.encode),
    limit=st.integers(0, 9),
    chunk=st.integers(1, 70),
    first=st.integers(0, 60),
)
@example(content=b"bbbbbbbbbbbbab|", limit=1, chunk=4, first=0)
def test_of_a_piece_beyond_the_limit_one_byte_more_than_that_is_kept(
    content: bytes, limit: int, chunk: int, first: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "READ_BYTES", chunk)
        found = list(pieces(io.BytesIO(content), b"ab", range(first, len(content)), limit))
    assert found == [
        (start, piece[: limit + 1], after)
        for start, piece, after in split(content, b"ab")
        if first <= start < len(content)
    ]


def test_a_long_row_of_overlapping_separators_is_cut_as_from_its_beginning() -> None:
    content = b"x" + b"\n" * 5001 + b"y"
    for start in (2, 2500, 4999, 5001, 5002):
        found = list(pieces(io.BytesIO(content), b"\n\n", range(start, len(content)), limit=9))
        assert found == [piece for piece in split(content, b"\n\n") if piece[0] >= start]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter: line 1 column 13 (char 12)"),
        (b"hello", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"[" * 9999, "not JSON: maximum recursion depth exceeded"),
        (b"[1]", "not a JSON object but a list"),
        (b'"text"', "not a JSON object but a string"),
        (b"null", "not a JSON object but null"),
        (b'{"id": 1, "url": ""}', "no field 'text'; it has id, url"),
        (b"{}", "no field 'text'; it has none at all"),
        (b'{"text": null}', "field 'text' holds null, not text"),
        (b'{"text": 5}', "field 'text' holds a number, not text"),
        (b'{"text": 5.0}', "field 'text' holds a number, not text"),
        (b'{"text": true}', "field 'text' holds a boolean, not text"),
        (b'{"text": ["a"]}', "field 'text' holds a list, not text"),
        (b'{"text": {"a": 1}}', "field 'text' holds an object, not text"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        (b'{"text": "\xc3"}', "not UTF-8: invalid continuation byte at byte 10"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8: invalid continuation byte at byte 10"),
        (b'{"text": "%s"}' % (b"x" * LIMIT), f"too long: more than {LIMIT} bytes"),
    ],
)
def test_a_bad_line_is_a_bad_record_at_its_byte_and_its_neighbours_are_unharmed(
    line: bytes, reason: str
) -> None:
    before, after = '{"text": "é"}\r\n'.encode(), b'{"text": "z"}'
    first, bad_record, last = read(JSONL, before + line + b"\n" + after)
    assert first == Document("é", "u@0")
    assert last == Document("z", f"u@{len(before) + len(line) + 1}")
    assert isinstance(bad_record, BadRecord)
    assert bad_record.reason.startswith(reason)
    assert bad_record.origin == f"u@{len(before)}"
    assert bad_record.excerpt == line.decode(errors="replace")[:200]


def test_names_of_fields_are_told_in_a_reason_that_is_short_and_can_be_written() -> None:
    fields = {f"\ud800{i}": i for i in range(1000)}
    (bad_record,) = read(JSONL, json.dumps(fields).encode()[: LIMIT - 1].rsplit(b",", 1)[0] + b"}")
    assert isinstance(bad_record, BadRecord)
    assert bad_record.reason.startswith("no field 'text'; it has ?0, ?1, ?2")
    assert len(bad_record.reason.encode()) < 300


def test_lines_may_be_blank_or_end_in_any_way_and_begin_with_a_byte_order_mark() -> None:
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \t\n{"text": "\\ud83d\\ude00"}\n\n{"text": ""}'
    assert read(JSONL, content) == [
        Document("a", "u@0"),
        Document("😀", "u@24"),
        Document("", "u@50"),
    ]
    assert read(JSONL, b"\xef\xbb\xbf\n") == read(JSONL, b"") == read(JSONL, b"\n") == []


def test_text_is_read_byte_for_byte_and_blank_pieces_are_no_records() -> None:
    content = "\ufeff--a\r\nb\rc\n\x00 é--\n -- --z\ufeff--".encode()
    assert read(SeparatedText("--", LIMIT), content) == [
        Document("a\r\nb\rc\n\x00 é", "u@5"),
        Document("z\ufeff", "u@25"),
    ]


def test_bad_text_is_a_bad_record_at_its_byte_and_its_neighbours_are_unharmed() -> None:
    content = b"a--b\xff--" + b"c" * (LIMIT + 1) + b"--d"
    assert read(SeparatedText("--", LIMIT), content) == [
        Document("a", "u@0"),
        BadRecord("not UTF-8: invalid start byte at byte 1", "u@3", "b\ufffd"),
        BadRecord(f"too long: more than {LIMIT} bytes", "u@7", "c" * 200),
        Document("d", f"u@{LIMIT + 10}"),
    ]


def test_a_whole_text_file_is_one_record_of_the_range_that_it_begins_in() -> None:
    content = "\ufeffa\r\n\ufeffb\n".encode()
    form = TextFile(LIMIT)
    assert read(form, content, ByteRange(0, 1, 10)) == [Document("a\r\n\ufeffb\n", "u")]
    assert (
        read(form, content, ByteRange(1, 10, 10)) == read(form, content, ByteRange(0, 0, 10)) == []
    )
    assert read(form, b"") == [Document("", "u")]
    assert read(form, b"a\xff") == [
        BadRecord("not UTF-8: invalid start byte at byte 1", "u", "a\ufffd")
    ]
    assert read(form, b"x" * LIMIT) == [Document("x" * LIMIT, "u")]
    too_long = BadRecord(f"too long: more than {LIMIT} bytes", "u", "x" * 200)
    assert read(form, b"x" * (LIMIT + 1)) == [too_long]


@pytest.mark.parametrize("separator", [b"\n", b"<|end|>"])
def test_a_line_that_is_far_too_long_is_passed_in_bounded_memory(separator: bytes) -> None:
    file = io.BytesIO(b"x" * 50_000_000 + separator + b"y")
    tracemalloc.start()
    found = list(pieces(file, separator, range(51_000_000), LIMIT))
    inside = list(pieces(file, separator, range(1_000_000, 51_000_000), LIMIT))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [start for start, _, _ in found] == [0, 50_000_000 + len(separator)]
    assert inside == found[1:]
    assert peak < 2_000_000


def test_nothing_is_read_on_when_a_byte_range_lies_within_one_record() -> None:
    file = io.BytesIO(b"x" * 50_000_000 + b"\n")
    assert list(pieces(file, b"\n", range(1_000_000, 2_000_000), LIMIT)) == []
    assert file.tell() < 3_000_000


def test_python_files_are_decoded_as_they_declare() -> None:
    latin = "# coding: latin-1\ns = 'é'\r\n"
    assert read(PythonFile(), latin.encode("latin-1")) == [Document(latin, "u")]
    assert read(PythonFile(), b"\xef\xbb\xbfs = '\xc3\xa9'\n") == [Document("s = 'é'\n", "u")]


@pytest.mark.parametrize(
    ("content", "details"),
    [
        (b"s = '\xe9'\n", "invalid or missing encoding declaration"),
        (b"#\n#\ns = '\xe9'\n", "'utf-8' codec can't decode byte 0xe9"),
        (b"# coding: no-such\n", "unknown encoding: no-such"),
        (b"# coding: hex\n", "'hex' is not a text encoding"),
        (b"# coding: ascii\n'\xc3\xa9'\n", "'ascii' codec can't decode byte"),
    ],
)
def test_a_python_file_in_another_encoding_than_it_declares_is_a_bad_record(
    content: bytes, details: str
) -> None:
    (bad_record,) = read(PythonFile(), content)
    assert isinstance(bad_record, BadRecord)
    assert bad_record.reason.startswith(f"not in the encoding that it declares: {details}")
    assert bad_record[1:] == ("u", content.decode(errors="replace"))


@pytest.mark.parametrize(
    "kind", [*formats.TEXT_TYPES[:-1], pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_a_column_holds_text_in_any_of_arrows_types(kind: pa.DataType) -> None:
    content = parquet({"text": pa.array(["a", "é", "a"]).cast(kind), "id": [1, 2, 3]})
    assert read(PARQUET, content) == [
        Document("a", "u#0"),
        Document("é", "u#1"),
        Document("a", "u#2"),
    ]


def test_a_bad_value_is_a_bad_record_at_its_row_and_its_neighbours_are_unharmed() -> None:
    values = pa.array([b"a", b"b\xff", None, "\ufeffd".encode()]).view(pa.string())
    assert read(PARQUET, parquet({"text": values}, row_group_size=2)) == [
        Document("a", "u#0"),
        BadRecord("not UTF-8: invalid start byte at byte 1", "u#1", "b\ufffd"),
        BadRecord("field 'text' holds null, not text", "u#2"),
        Document("d", "u#3"),
    ]


def test_a_table_without_any_text_is_one_of_nulls() -> None:
    null = "field 'text' holds null, not text"
    content = parquet({"text": [None, None]})
    assert read(PARQUET, content) == [BadRecord(null, "u#0"), BadRecord(null, "u#1")]
    assert read(PARQUET, parquet({"text": []})) == []


def test_a_column_that_is_missing_or_holds_no_text_is_an_error_of_the_settings() -> None:
    with pytest.raises(
        DataError, match=r"^data\.sources\.books\.text_field='text': u has no such field; it has i"
    ):
        read(PARQUET, parquet({"id": [1], "body": ["a"]}))
    with pytest.raises(
        DataError,
        match=r"^data\.sources\.books\.text_field='text': u holds list<.*> there; choose a column",
    ):
        read(PARQUET, parquet({"text": [["a"]]}))


@pytest.mark.parametrize("byte", [5, 500, 1500, -6, -1])
def test_a_damaged_table_is_an_error_that_names_it(byte: int) -> None:
    content = bytearray(parquet({"text": [str(i) for i in range(999)]}, write_page_checksum=True))
    content[byte] ^= 255
    with pytest.raises(DataError, match=r"^u: damaged, Parquet cannot be read \(.*\); mend it or"):
        read(PARQUET, bytes(content))


class CountingFile(io.BytesIO):
    """Counts the bytes that are read from it."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.count = 0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.count += len(content)
        return content


def random_table(rows: int, **options: Any) -> tuple[list[str], bytes]:
    texts = [format(i * 2654435761 % 2**64, "b") * 9 for i in range(rows)]
    table = {"text": texts, "other": texts[::-1]}
    return texts, parquet(table, compression="none", use_dictionary=False, **options)


def test_of_a_table_only_the_row_groups_and_the_column_of_the_byte_range_are_read() -> None:
    texts, content = random_table(2000, row_group_size=100)
    file = CountingFile(content)
    byte_range = ByteRange(len(content) // 2, len(content), len(content), first_unit=1650)
    items = list(PARQUET.records(file, "u", byte_range))
    assert [(record.text, after) for record, after in items] == [  # type: ignore[union-attr]
        (text, row + 1) for row, text in enumerate(texts) if row >= 1650
    ]
    footer = 64 << 10
    assert sum(map(len, texts[1600:])) < file.count < sum(map(len, texts[1600:])) * 1.1 + footer


def lanes_of(form: Format, content: bytes, lanes: int) -> tuple[list[Iterator[Any]], list[Any]]:
    files = [CountingFile(content) for _ in range(lanes)]
    borders = [len(content) * lane // lanes for lane in range(lanes + 1)]
    byte_ranges = [ByteRange(start, stop, len(content)) for start, stop in pairwise(borders)]
    return [form.records(f, "u", s) for f, s in zip(files, byte_ranges, strict=True)], files


def test_a_row_group_is_decoded_once_for_all_lanes_that_are_in_it() -> None:
    texts, content = random_table(4000, row_group_size=4000)
    form = Parquet("text", "books")
    lanes, files = lanes_of(form, content, 8)
    found: list[list[str]] = [[] for _ in lanes]
    for _ in range(500):
        for lane, texts_of_lane in zip(lanes, found, strict=True):
            texts_of_lane.append(next(lane)[0].text)
    assert list(chain(*found)) == texts
    assert sum(file.count for file in files) < sum(map(len, texts)) * 1.1 + 8 * (64 << 10)
    for lane in lanes:
        assert next(lane, None) is None
    assert not form._groups._groups, "a row group is freed with its last reader"


def test_threads_that_enter_a_row_group_together_decode_it_once() -> None:
    texts, content = random_table(4000, row_group_size=4000)
    lanes, files = lanes_of(Parquet("text", "books"), content, 8)
    found: list[list[str]] = [[] for _ in lanes]
    together = Barrier(8)

    def run(number: int) -> None:
        together.wait()
        found[number].append(next(lanes[number])[0].text)
        together.wait()
        found[number].extend(record.text for record, _ in lanes[number])

    threads = [Thread(target=run, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(chain(*found)) == texts
    assert sum(file.count for file in files) < sum(map(len, texts)) * 1.1 + 8 * (64 << 10)


def test_what_is_wrong_with_the_file_itself_passes_through_arrow_as_it_is(tmp_path: Path) -> None:
    (path := tmp_path / "a").write_bytes(random_table(500)[1])

    class Lost(io.FileIO):
        def readinto(self, buffer: Any) -> int:  # noqa: ARG002 - the signature of its kind
            raise ShardUnavailableError("gone")

    with (
        io.BufferedReader(Lost(path)) as file,
        pytest.raises(ShardUnavailableError, match=r"^gone$"),
    ):
        list(PARQUET.records(file, "u", ByteRange(0, 1, 1)))


# Fields within records, and columns of one name

NESTED: list[tuple[str, Any, str | None]] = [
    ("data.text", {"data": {"text": "a"}}, "a"),
    ("data.text", {"data": {"text": "a"}, "text": "no"}, "a"),
    ("data.text", {"data.text": "a", "data": {"text": "no"}}, "a"),
    ("data.text", {"data.text": "a"}, "a"),
    ("a.b.c.d", {"a": {"b": {"c": {"d": "a"}}}}, "a"),
    ("text", {"text": "a", "data": {"text": "no"}}, "a"),
    ("data.text", {"data": None}, None),
    ("data.text", {"data": {"text": None}}, None),
]


@pytest.mark.parametrize(("name", "record", "text"), NESTED)
def test_a_text_field_may_lie_within_another_in_every_format(
    name: str, record: dict[str, Any], text: str | None, tmp_path: Path
) -> None:
    # With a second record, since Arrow takes the types of fields from the values.
    records = [record, record if text else {"data": {"text": "b"}}]
    lines = "".join(json.dumps(item) + "\n" for item in records)
    (path := tmp_path / "a.jsonl").write_text(lines)
    source = DatasetsSource(kind="datasets", path="json", data_files=str(path), text_field=name)
    found = {
        "JSON lines": read(JsonLines(name, LIMIT), lines.encode()),
        "Parquet": read(Parquet(name, "books"), parquet(pa.Table.from_pylist(records))),
        "datasets": [item for item, _ in HubCorpus("books", source).documents(0, 1)],
    }
    for first, second in found.values():
        assert isinstance(second, Document)
        if text is None:
            assert isinstance(first, BadRecord)
        else:
            assert isinstance(first, Document)
            assert first.text == text


@pytest.mark.parametrize("name", ["text", "data.text"])
@pytest.mark.parametrize("twice", [["id"], ["id", "n"], ["n"]])
def test_other_columns_of_one_name_do_not_matter(name: str, twice: list[str]) -> None:
    texts = pa.array(["a", "b"])
    column = texts if name == "text" else pa.StructArray.from_arrays([texts], names=["text"])
    others = [other for other in twice for _ in range(2)]
    table = pa.Table.from_arrays(
        [column, *(pa.array([1, 2]) for _ in others)], names=[name.partition(".")[0], *others]
    )
    found = read(Parquet(name, "books"), parquet(table))
    assert [record.text for record in found] == ["a", "b"]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["text", "data.text"])
@pytest.mark.parametrize("count", [2, 3])
def test_columns_of_the_name_of_the_text_are_refused_if_they_are_several(
    name: str, count: int
) -> None:
    texts = pa.array(["a", "b"])
    column = texts if name == "text" else pa.StructArray.from_arrays([texts], names=["text"])
    table = pa.Table.from_arrays([column] * count, names=[name.partition(".")[0]] * count)
    wording = rf"text_field='{name}': u has {count} columns named '(text|data)'; rename one"
    with pytest.raises(DataError, match=wording):
        read(Parquet(name, "books"), parquet(table))


def test_a_column_that_holds_no_text_is_told_with_those_that_do() -> None:
    table = {"data": [{"text": "a", "n": 1}], "id": [1], "title": ["b"]}
    for name in ("data", "data.n", "id"):
        with pytest.raises(DataError, match=r"a column that holds text: data\.text, title$"):
            read(Parquet(name, "books"), parquet(table))
    with pytest.raises(DataError, match=r"no such field; it has data, id, title, data\.text$"):
        read(Parquet("data.body", "books"), parquet(table))


# Byte order marks and other encodings


@pytest.mark.parametrize("form", [JSONL, SeparatedText("|", LIMIT), TextFile(LIMIT), PARQUET])
def test_a_byte_order_mark_is_no_part_of_a_document(form: Format) -> None:
    contents = {
        JsonLines: '\ufeff{"text": "\ufeffone"}\n{"text": "\\ufefftwo"}\n'.encode(),
        SeparatedText: "\ufeffone|\ufefftwo".encode(),
        TextFile: "\ufeffone".encode(),
        Parquet: parquet({"text": ["\ufeffone", "two"]}),
    }
    found = [record.text for record in read(form, contents[type(form)])]  # type: ignore[union-attr]
    assert found == (["one"] if isinstance(form, TextFile) else ["one", "two"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", [JSONL, SeparatedText("\n\n", LIMIT), TextFile(LIMIT)])
def test_text_in_utf_16_is_named_as_such(form: Format, encoding: str) -> None:
    text = '{"text": "one line of text"}\n{"text": "and another, \u4e2d\u6587"}\n'
    found = read(form, text.encode(encoding))
    reasons = {record.reason for record in found if len(record.excerpt) > 4}  # type: ignore[union-attr]
    name = encoding[:6].upper()
    assert reasons == {f"{name}, not UTF-8: convert it, for example with iconv -f {name} -t UTF-8"}
