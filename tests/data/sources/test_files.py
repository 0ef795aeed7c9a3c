import bz2
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError
from data.config import CacheConfig, FilesSource, RemoteConfig
from data.source import BadRecord, Document
from data.sources.documents import Documents
from data.sources.files import (
    CorpusFile,
    FileCorpus,
    file_corpus,
    lane_byte_ranges,
    python_corpus,
    python_files,
)
from data.sources.formats import READ_BYTES, PythonFile
from data.storage.shard_cache import ShardCache
from data.storage.stores import Shard
from tests.data.storage.fault_server import FaultServer

FORMS = ["txt", "txt.gz", "newlines", "aba", "jsonl", "jsonl.gz", "jsonl.zst", "jsonl.bz2"]
FORMS += ["jsonl.xz", "JSONL", "ndjson", "json"]
FORMS += ["parquet", "one-group"]
SEPARATORS = {"newlines": "\n\n", "aba": "aba"}
PATIENT = RemoteConfig(timeout_s=0.3, retry_s=20.0)


class CountingFile(io.RawIOBase):
    """Tells a cache how much is read of one of its files."""

    def __init__(self, file: BinaryIO, cache: "CountingCache") -> None:
        self.file = file
        self.cache = cache

    def readinto(self, buffer: Any) -> int:
        content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        self.cache.count += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()


class CountingCache(ShardCache):
    """Counts what is opened and what is read."""

    def __init__(self, config: CacheConfig, remote: RemoteConfig) -> None:
        super().__init__(config, remote)
        self.opened: list[str] = []
        self.count = 0

    def open(self, shard: Shard) -> BinaryIO:
        self.opened.append(shard.name)
        return io.BufferedReader(CountingFile(super().open(shard), self), 4096)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> CountingCache:
    return CountingCache(CacheConfig(dir=str(tmp_path_factory.mktemp("cache"))), PATIENT)


@pytest.fixture
def corpus(cache: CountingCache) -> Callable[..., FileCorpus]:
    """The corpus of a folder, or of paths, with whatever settings a test needs."""

    def build(paths: Path | str | tuple[str, ...], **settings: Any) -> FileCorpus:
        names = str(paths) if isinstance(paths, Path) else paths
        return file_corpus("books", FilesSource(kind="files", paths=names, **settings), cache, 999)

    return build


def texts_of(files: FileCorpus, lane: int = 0, lanes: int = 1) -> list[str]:
    return [record.text for record, _ in files.documents(lane, lanes)]  # type: ignore[union-attr]


def write_random(
    folder: Path, form: str, random: Random, write_file: Callable[[Path, list[str]], None]
) -> list[str]:
    """Writes a random shard and returns its texts."""
    path = folder / f"{len(os.listdir(folder)):02}.{form}"
    texts = ["".join(random.choices("abé ", k=random.choice((1, 9, 99)))) for _ in range(9)]
    texts = [f"{random.random()} {text}" for text in texts[: random.randint(0, 9)]]
    if form in SEPARATORS:
        # Full of separators that overlap each other, and of blank pieces.
        content = "".join(random.choices(["aba", "ba", "\n", "\n\n", "c", "é"], k=99))
        path.with_suffix(".txt").write_text(content, newline="")
        return [piece for piece in content.split(SEPARATORS[form]) if piece.strip()]
    if form in ("parquet", "one-group"):
        size = 99 if form == "one-group" else random.randint(1, 4)
        pq.write_table(pa.table({"text": texts}), path.with_suffix(".parquet"), row_group_size=size)
        return texts
    if form.startswith("txt"):
        texts = ["".join(texts)]
    write_file(path, texts)
    return texts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", FORMS)
def test_lanes_end_to_end_are_the_corpus_and_go_on_exactly_from_every_position(
    form: str,
    seed: int,
    tmp_path: Path,
    corpus: Callable[..., FileCorpus],
    write_file: Callable[[Path, list[str]], None],
) -> None:
    random = Random(seed)
    shards = [write_random(tmp_path, form, random, write_file) for _ in range(random.randint(1, 7))]
    files = corpus(tmp_path, **({"separator": SEPARATORS[form]} if form in SEPARATORS else {}))
    for lanes in (1, random.randint(2, 12), 13):
        read = [list(files.documents(lane, lanes)) for lane in range(lanes)]
        records = [record for record, _ in chain(*read)]
        assert [record.text for record in records] == list(chain(*shards))  # type: ignore[union-attr]
        assert len({record.origin for record in records}) == len(records)
        for lane, items in enumerate(read):
            for i in random.sample(range(len(items)), min(len(items), 9)):
                position = json.loads(json.dumps(items[i][1]))
                assert list(files.documents(lane, lanes, position)) == items[i + 1 :]


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=9), lanes=st.integers(1, 60))
def test_lanes_have_every_byte_of_every_file_once_and_in_equal_parts(
    sizes: list[int], lanes: int
) -> None:
    borders = [0, *accumulate(sizes)]
    dealt = [
        [
            (file, byte)
            for file, part in lane_byte_ranges(borders, lane, lanes)
            for byte in part.units(part.size)
        ]
        for lane in range(lanes)
    ]
    assert list(chain(*dealt)) == [
        (f, byte) for f, size in enumerate(sizes) for byte in range(size)
    ]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def write_lines(path: Path, count: int) -> list[str]:
    texts = [f"{i} " + "text " * (i % 50) for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def test_one_file_is_read_about_once_whatever_the_number_of_lanes(
    tmp_path: Path, corpus: Callable[..., FileCorpus], cache: CountingCache
) -> None:
    texts = write_lines(tmp_path / "a.jsonl", 60_000)
    size = (tmp_path / "a.jsonl").stat().st_size
    files = corpus(tmp_path)
    assert [text for lane in range(8) for text in texts_of(files, lane, 8)] == texts
    assert size > 8_000_000
    assert cache.count < size + 8 * (READ_BYTES + 8192)


def test_going_on_reads_no_more_than_what_is_left(
    tmp_path: Path, corpus: Callable[..., FileCorpus], cache: CountingCache
) -> None:
    texts = write_lines(tmp_path / "a.jsonl", 20_000)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    texts = write_lines(tmp_path / "a.jsonl", 20_000) + texts
    files = corpus(tmp_path)
    items = list(files.documents(0, 1))
    for i in (1, 30_000, 39_990, 39_999):
        cache.count, cache.opened = 0, []
        left = list(files.documents(0, 1, items[i][1]))
        assert left == items[i + 1 :]
        assert cache.opened == ["a.jsonl", "b.jsonl"][i // 20_000 :]
        assert cache.count < sum(len(text) + 20 for text in texts[i + 1 :]) + 8192
    assert cache.count == 0, "nothing was left after the last one"


def test_files_of_other_lanes_are_not_opened(
    tmp_path: Path, corpus: Callable[..., FileCorpus], cache: CountingCache
) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    files = corpus(tmp_path)
    assert cache.opened == []
    assert texts_of(files, 2, 4) == ["text 4", "text 5"]
    assert cache.opened == ["4.txt", "5.txt"]


def test_an_empty_text_file_is_a_document_and_other_empty_files_have_none(
    tmp_path: Path, corpus: Callable[..., FileCorpus]
) -> None:
    for name in ("a.jsonl", "b.txt", "c.jsonl"):
        (tmp_path / name).touch()
    files = corpus(tmp_path)
    assert [text for lane in range(5) for text in texts_of(files, lane, 5)] == [""]


def test_lanes_in_threads_read_what_they_read_alone(
    tmp_path: Path,
    corpus: Callable[..., FileCorpus],
    write_file: Callable[[Path, list[str]], None],
    texts: list[str],
) -> None:
    for name in ("a.jsonl.gz", "b.parquet", "c.jsonl"):
        write_file(tmp_path / name, texts)
    files = corpus(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda lane: texts_of(files, lane, 8), range(8)))
    assert list(chain(*found)) == texts * 3


@pytest.mark.parametrize("form", ["jsonl", "jsonl.zst", "parquet"])
def test_a_corpus_on_a_failing_web_server_is_the_one_on_the_disk(
    form: str,
    tmp_path: Path,
    corpus: Callable[..., FileCorpus],
    write_file: Callable[[Path, list[str]], None],
    fault_server: Callable[..., FaultServer],
    texts: list[str],
) -> None:
    for i in range(3):
        write_file(tmp_path / f"{i}.{form}", [f"{i} {text}" for text in texts])
    server = fault_server(tmp_path, rate=0.2, stall_s=1.0)
    here, there = corpus(tmp_path), corpus(f"{server.url}/")
    assert there.fingerprint == here.fingerprint
    for lane in range(4):
        read = list(there.documents(lane, 4))
        assert [record.text for record, _ in read] == texts_of(here, lane, 4)  # type: ignore[union-attr]
        assert list(there.documents(lane, 4, read[3][1])) == read[4:]


def test_a_directory_is_read_recursively_in_sorted_order_without_hidden_and_other_files(
    tmp_path: Path, corpus: Callable[..., FileCorpus]
) -> None:
    for name in ("b.txt", "a/z.txt", "a/.git/no.txt", ".no.txt", "picture.png", "a/b.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts_of(corpus(tmp_path)) == ["a/b.txt", "a/z.txt", "b.txt"]


def test_paths_are_read_in_the_order_given_and_a_file_named_twice_once(
    tmp_path: Path, corpus: Callable[..., FileCorpus]
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    paths = (str(tmp_path / "c.txt"), str(tmp_path / "[ac].txt"))
    assert texts_of(corpus(paths)) == ["c", "a"]


def test_the_text_field_is_a_setting(tmp_path: Path, corpus: Callable[..., FileCorpus]) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a", "text": "no"}')
    pq.write_table(pa.table({"body": ["b"], "text": ["no"]}), tmp_path / "b.parquet")
    assert texts_of(corpus(tmp_path, text_field="body")) == ["a", "b"]


def test_a_missing_column_is_named_with_the_source(
    tmp_path: Path, corpus: Callable[..., FileCorpus]
) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError,
        match=r"data\.sources\.books\.text_field='text': .*/a\.parquet has no such field; it has b",
    ):
        texts_of(corpus(tmp_path))


def test_a_bad_record_tells_where_it_lies_in_the_unpacked_file(
    tmp_path: Path, corpus: Callable[..., FileCorpus]
) -> None:
    lines = b'{"text": "a"}\nnot json\n{"text": "b"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    first, bad_record, last = (record for record, _ in corpus(tmp_path).documents(0, 1))
    url = str(tmp_path / "a.jsonl.gz")
    assert (first, last) == (Document("a", f"{url}@0"), Document("b", f"{url}@23"))
    assert isinstance(bad_record, BadRecord)
    assert bad_record.origin == f"{url}@14"
    assert bad_record.excerpt == "not json"


def test_a_line_of_the_longest_document_is_read_however_it_is_escaped(
    tmp_path: Path, corpus: Callable[..., FileCorpus]
) -> None:
    texts = ["\x01" * 999, "x" * 90_000]  # of at most 999 bytes, and far too long
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    first, bad_record = (record for record, _ in corpus(tmp_path).documents(0, 1))
    assert isinstance(first, Document)
    assert first.text == texts[0]
    assert isinstance(bad_record, BadRecord)
    assert bad_record.reason == f"too long: more than {6 * 999 + 65536} bytes"


def test_the_fingerprint_changes_with_names_sizes_and_formats_but_not_with_the_place(
    tmp_path: Path, corpus: Callable[..., FileCorpus]
) -> None:
    for place in ("x", "y/z"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.jsonl").write_text('{"text": "a"}')
    here, there = corpus(tmp_path / "x"), corpus(tmp_path / "y/z")
    assert list(here.fingerprint) == ["data.sources.books"]
    assert here.fingerprint["data.sources.books"].startswith("1 files ")
    assert here.fingerprint == there.fingerprint
    assert here.fingerprint != corpus(tmp_path / "x", text_field="body").fingerprint
    (tmp_path / "x/a.jsonl").write_text('{"text": "longer"}')
    assert corpus(tmp_path / "x").fingerprint != there.fingerprint
    os.rename(tmp_path / "y/z/a.jsonl", tmp_path / "y/z/b.jsonl")
    assert corpus(tmp_path / "y/z").fingerprint != there.fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", ""),
        ("*.jsonl", ""),
        ("empty", ""),
        ("picture.png", r"cannot read picture\.png; expected \.txt, \.jsonl, \.ndjson, \.json or"),
        ("picture.p*", r"cannot read picture\.png; expected .*, also with \.gz, \.zst"),
    ],
)
def test_a_path_with_nothing_to_read_is_named(
    tmp_path: Path, corpus: Callable[..., FileCorpus], name: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").touch()
    path = re.escape(str(tmp_path / name))
    with pytest.raises(ConfigError) as error:
        corpus(tmp_path / name)
    [problem] = error.value.problems
    assert re.match(rf"data\.sources\.books\.paths='{path}': {message}", str(problem))


def test_all_paths_with_nothing_to_read_are_told_at_once(
    tmp_path: Path, corpus: Callable[..., FileCorpus]
) -> None:
    (tmp_path / "a.txt").touch()
    paths = tuple(str(tmp_path / name) for name in ("one.txt", "a.txt", "*.jsonl"))
    with pytest.raises(ConfigError) as error:
        corpus(paths)
    assert [problem.value for problem in error.value.problems] == [paths[0], paths[2]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "a.parquet"]
)
def test_a_truncated_file_is_named_instead_of_ending_early(
    tmp_path: Path,
    corpus: Callable[..., FileCorpus],
    write_file: Callable[[Path, list[str]], None],
    name: str,
) -> None:
    path = tmp_path / name
    write_file(path, [str(i) * 99 for i in range(500)])
    assert len(texts_of(corpus(tmp_path))) == 500
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=name):
        texts_of(corpus(tmp_path))


def test_files_are_closed_when_reading_stops_early(
    documents_of: Callable[..., Documents],
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "separated"):
        next(documents_of(kind).corpora["text"].documents(0, 1))
    assert len(os.listdir("/proc/self/fd")) == before


COPIES = [".jsonl", ".JSONL", ".ndjson", ".NDJson", ".json", ".json.gz", ".JSON.GZ", ".jsonl.xz"]
COPIES += [".Jsonl.Bz2", ".jsonl.zst", ".jsonl.zstd", ".ndjson.gz", ".json.xz"]


def test_every_copy_of_a_folder_is_read_whatever_its_ending_of_the_same_kind(
    tmp_path: Path, corpus: Callable[..., FileCorpus], texts: list[str]
) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packers = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    packers |= {".zst": zstandard.compress, ".zstd": zstandard.compress}
    for number, ending in enumerate(COPIES):
        pack = packers.get(os.path.splitext(ending)[1].lower(), bytes)
        (tmp_path / f"{number:02}{ending}").write_bytes(pack(lines))
    files = corpus(tmp_path)
    assert texts_of(files) == texts * len(COPIES)
    assert files.remarks == []
    for number, ending in enumerate(COPIES):
        assert texts_of(corpus(tmp_path / f"{number:02}{ending}")) == texts, "named itself"


NO_LINES = [
    b"[]",
    b'[{"text": "a"}, {"text": "b"}]',
    b'{\n  "dataset": "books",\n  "text": "no"\n}\n',
    b'\xef\xbb\xbf \n[\n{"text": "a"}\n]',
    b"[" + b"1, " * 9999 + b"1]",
]
LINES = [
    b'{"text": "a"}',
    b'\n\n  {"text": "a"}\n{"text": "b"}\n',
    b'\xef\xbb\xbf{"text": "a"}\n',
    b'{"text": "' + b"a" * 9999 + b'"}\n',
    b'{"text": "the first line is broken\n{"text": "b"}\n',
]


@pytest.mark.parametrize("content", [*LINES, *NO_LINES])
def test_json_in_a_folder_is_read_if_it_holds_lines_and_told_of_otherwise(
    tmp_path: Path, corpus: Callable[..., FileCorpus], content: bytes
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "b.txt").write_text("b")
    files = corpus(tmp_path)
    names = [file.shard.name for file in files.files]
    if content in LINES:
        assert (names, files.remarks) == (["a.json", "b.txt"], [])
    else:
        assert names == ["b.txt"]
        [remark] = files.remarks
        assert remark.endswith("folders: 1 .json that hold no JSON lines")
    named = corpus((str(tmp_path / "a.json"), str(tmp_path)))
    assert [file.shard.name for file in named.files] == ["a.json", "b.txt"]
    assert named.remarks == [], "what is named itself is read"


def test_a_folder_of_json_that_holds_no_lines_is_refused_by_name(
    tmp_path: Path, corpus: Callable[..., FileCorpus]
) -> None:
    (tmp_path / "a.json").write_bytes(b"[]")
    with pytest.raises(
        ConfigError, match=r"paths='.*': no file in it can be read; there are only 1"
    ):
        corpus(tmp_path)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([], None),
        (["a.csv"], "1 .csv"),
        (["a.csv", "x/b.csv", "x/y/c.CSV", "README"], "3 .csv, 1 without an ending"),
    ],
)
def test_what_is_passed_over_is_told_once_by_ending(
    tmp_path: Path, corpus: Callable[..., FileCorpus], others: list[str], told: str | None
) -> None:
    for name in ("a.txt", "x/b.txt", *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    # A folder that is named twice, and one within it, hold each file once.
    files = corpus((str(tmp_path), f"{tmp_path}/", f"{tmp_path}/x"))
    assert len(files.files) == 2
    if told is None:
        assert files.remarks == []
    else:
        assert files.remarks == [
            "data.sources.books: 2 files are read; passed over in the same folders: " + told
        ]


@pytest.mark.parametrize("ending", ["jsonl.gz", "txt.zst", "jsonl.xz", "jsonl.bz2", "jsonl"])
def test_a_file_of_no_bytes_is_told(
    tmp_path: Path, corpus: Callable[..., FileCorpus], ending: str
) -> None:
    (tmp_path / "a.txt").write_text("text")
    for number in range(5):
        (tmp_path / f"b{number}.{ending}").touch()
    [remark] = corpus(tmp_path).remarks
    assert remark.startswith("data.sources.books: 5 files have 0 bytes, as an interrupted download")
    assert remark.endswith(f": b0.{ending}, b1.{ending}, b2.{ending}, ...")
    assert texts_of(corpus(tmp_path))[0] == "text"


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_xz_is_read_to_the_end_of_its_last_stream(
    tmp_path: Path, corpus: Callable[..., FileCorpus], streams: int
) -> None:
    lines = b'{"text": "a"}\n' + b" " * 3_000_000 + b"\n"  # more than is unpacked at a time
    packed = b"\0\0\0\0".join([lzma.compress(lines)] * streams)
    (tmp_path / "a.jsonl.xz").write_bytes(packed + b"\0" * 8)
    assert texts_of(corpus(tmp_path)) == ["a"] * streams


@pytest.mark.parametrize("damage", ["junk behind it", "a byte in it", "cut within the second"])
def test_damaged_xz_is_named(
    tmp_path: Path, corpus: Callable[..., FileCorpus], damage: str
) -> None:
    packed = lzma.compress(b'{"text": "a"}\n' * 999)
    spoilt = packed[:40] + bytes([packed[40] ^ 1]) + packed[41:]
    contents = {
        "junk behind it": packed + b"junk",
        "a byte in it": spoilt,
        "cut within the second": packed + packed[:20],
    }
    (tmp_path / "a.jsonl.xz").write_bytes(contents[damage])
    with pytest.raises(DataError, match=r"a\.jsonl\.xz: damaged or truncated \(.+\); get it again"):
        texts_of(corpus(tmp_path))


def test_lanes_have_about_equal_parts_where_only_some_files_are_compressed(
    tmp_path: Path, cache: ShardCache
) -> None:
    random = Random(0)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl"):
        words = [f"w{random.randint(0, 300)}" for _ in range(40_000)]
        texts = [" ".join(words[i : i + 40]) for i in range(0, len(words), 40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    corpus = file_corpus("x", FilesSource(kind="files", paths=str(tmp_path)), cache, 10_000)
    counts = [sum(1 for _ in corpus.documents(lane, 6)) for lane in range(6)]
    assert sum(counts) == 3000
    assert max(counts) < 1.5 * min(counts)


def test_a_separator_may_be_spelled_with_escapes(tmp_path: Path, cache: ShardCache) -> None:
    (tmp_path / "a.txt").write_text("one\n\n\ttwo\n\n\tthree")
    source = FilesSource(kind="files", paths=str(tmp_path), separator="\\n\\n\\t")
    corpus = file_corpus("x", source, cache, 1000)
    assert [record.text for record, _ in corpus.documents(0, 1)] == ["one", "two", "three"]


# Python's own files


def test_sources_are_sorted_and_tests_packages_and_empty_files_left_out(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a-/y.py", "test/t.py", "a/tests/t.py", "a/data.txt"):
        (path := tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass")
    (tmp_path / "lib/a/__init__.py").touch()
    (tmp_path / "lib/gone.py").symlink_to(tmp_path / "nowhere.py")
    names = [shard.name for shard in python_files(tmp_path / "lib")]
    assert names == ["lib/a-/y.py", "lib/a/z.py", "lib/b.py"]


def test_packages_are_read_where_their_directory_is_the_root(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/a.py").write_text("pass")
    (shard,) = python_files(tmp_path / "site-packages")
    assert shard.name == "site-packages/a.py"
    assert shard.url == str(tmp_path / "site-packages/a.py")
    assert shard.size == 4


def test_a_file_in_another_encoding_than_it_declares_harms_no_other(
    tmp_path: Path, cache: ShardCache
) -> None:
    (tmp_path / "a.py").write_bytes("# coding: latin-1\ns = 'é'\r\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"s = '\xe9'\n")
    (tmp_path / "c.py").write_bytes(b"\xef\xbb\xbfs = '\xc3\xa9'\n")
    files = tuple(CorpusFile(shard, PythonFile()) for shard in python_files(tmp_path))
    a, b, c = (record for record, _ in FileCorpus("code", files, cache).documents(0, 1))
    assert a == Document("# coding: latin-1\ns = 'é'\r\n", str(tmp_path / "a.py"))
    assert isinstance(b, BadRecord)
    assert b.origin == str(tmp_path / "b.py")
    assert c == Document("s = 'é'\n", str(tmp_path / "c.py"))


def test_the_standard_library_is_a_corpus_of_some_megabytes_and_packages_add_to_it(
    cache: ShardCache,
) -> None:
    library = python_corpus("code", packages=False, cache=cache)
    everything = python_corpus("code", packages=True, cache=cache)
    assert 300 < len(library.files) < len(everything.files)
    assert [file for file in everything.files if file in set(library.files)] == list(library.files)
    names = {file.shard.name.split("/")[1] for file in library.files}
    assert {"ast.py", "argparse.py", "asyncio"} <= names
    assert 5e6 < sum(file.shard.size for file in library.files) < 5e7


def test_the_standard_library_is_read_once_by_all_lanes_and_hardly_has_bad_records(
    cache: ShardCache,
) -> None:
    library = python_corpus("code", packages=False, cache=cache)
    records = [record for lane in range(8) for record, _ in library.documents(lane, 8)]
    assert [record.origin for record in records] == [file.shard.url for file in library.files]
    assert sum(isinstance(record, BadRecord) for record in records) < 3


def test_every_lane_reads_files_of_many_packages(cache: ShardCache) -> None:
    corpus = python_corpus("code", packages=False, cache=cache)
    for lane in range(8):
        names = [str(record.origin) for record, _ in corpus.documents(lane, 8)]
        assert sum("/encodings/" in name for name in names) < len(names) / 2
        assert len({name.split("/")[-2] for name in names}) > 5
