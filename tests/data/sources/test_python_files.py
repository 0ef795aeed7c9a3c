from pathlib import Path

from data.config import CacheConfig, RemoteConfig
from data.source import BadRecord, Document
from data.sources.files import CorpusFile, FileCorpus
from data.sources.formats import PythonFile
from data.sources.python_files import python_corpus, source_files
from data.storage.shard_cache import ShardCache

CACHE = ShardCache(CacheConfig(), RemoteConfig())


def test_sources_are_sorted_and_tests_packages_and_empty_files_left_out(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a-/y.py", "test/t.py", "a/tests/t.py", "a/data.txt"):
        (path := tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass")
    (tmp_path / "lib/a/__init__.py").touch()
    (tmp_path / "lib/gone.py").symlink_to(tmp_path / "nowhere.py")
    names = [shard.name for shard in source_files(tmp_path / "lib")]
    assert names == ["lib/a-/y.py", "lib/a/z.py", "lib/b.py"]


def test_packages_are_read_where_their_directory_is_the_root(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/a.py").write_text("pass")
    (shard,) = source_files(tmp_path / "site-packages")
    assert shard.name == "site-packages/a.py"
    assert shard.url == str(tmp_path / "site-packages/a.py")
    assert shard.size == 4


def test_a_file_in_another_encoding_than_it_declares_harms_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# coding: latin-1\ns = 'é'\r\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"s = '\xe9'\n")
    (tmp_path / "c.py").write_bytes(b"\xef\xbb\xbfs = '\xc3\xa9'\n")
    files = tuple(CorpusFile(shard, PythonFile()) for shard in source_files(tmp_path))
    a, b, c = (record for record, _ in FileCorpus("code", files, CACHE).documents(0, 1))
    assert a == Document("# coding: latin-1\ns = 'é'\r\n", str(tmp_path / "a.py"))
    assert isinstance(b, BadRecord)
    assert b.origin == str(tmp_path / "b.py")
    assert c == Document("s = 'é'\n", str(tmp_path / "c.py"))


def test_the_standard_library_is_a_corpus_of_some_megabytes_and_packages_add_to_it() -> None:
    library = python_corpus("code", packages=False, cache=CACHE)
    everything = python_corpus("code", packages=True, cache=CACHE)
    assert 300 < len(library.files) < len(everything.files)
    assert [file for file in everything.files if file in set(library.files)] == list(library.files)
    names = {file.shard.name.split("/")[1] for file in library.files}
    assert {"ast.py", "argparse.py", "asyncio"} <= names
    assert 5e6 < sum(file.shard.size for file in library.files) < 5e7


def test_the_standard_library_is_read_once_by_all_lanes_and_hardly_has_faults() -> None:
    library = python_corpus("code", packages=False, cache=CACHE)
    records = [record for lane in range(8) for record, _ in library.documents(lane, 8)]
    assert [record.origin for record in records] == [file.shard.url for file in library.files]
    assert sum(isinstance(record, BadRecord) for record in records) < 3


def test_every_lane_reads_files_of_many_packages() -> None:
    corpus = python_corpus("code", packages=False, cache=CACHE)
    for lane in range(8):
        names = [str(record.origin) for record, _ in corpus.documents(lane, 8)]
        assert sum("/encodings/" in name for name in names) < len(names) / 2
        assert len({name.split("/")[-2] for name in names}) > 5
