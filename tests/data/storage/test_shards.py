import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from conf.errors import ConfigError, TransientError
from data.config import RemoteConfig
from data.storage.retry import PermanentError, retry
from data.storage.shards import Shard, counted, list_shards
from tests.data.storage.fault_server import FaultServer

SUFFIXES = (".jsonl", ".txt")
IMPATIENT = RemoteConfig(timeout_s=0.3, retry_s=5.0)
INSIDE = (
    "a b.txt",
    "empty.txt",
    "en/1.jsonl",
    "en/10.jsonl.gz",
    "en/deep/2.jsonl.zst",
    "en/é%.txt",
)
OUTSIDE = ("notes.md", ".hidden.txt", ".git/x.txt", "en/x.jsonl.lz4", "en/txt")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with six shards, and other things that are none."""
    for name in (*INSIDE, *OUTSIDE):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if name == "empty.txt" else name.encode())
    return tmp_path / "corpus"


@pytest.fixture
def memory(corpus: Path) -> Iterator[str]:
    """The same in fsspec's memory."""
    system = fsspec.filesystem("memory")
    system.put(f"{corpus}/", "/corpus/", recursive=True)
    yield "memory://corpus"
    system.rm("/corpus", recursive=True)


@pytest.fixture(params=["local", "file", "web", "memory"])
def root(
    request: pytest.FixtureRequest,
    corpus: Path,
    memory: str,
    fault_server: Callable[..., FaultServer],
) -> str:
    """Where the corpus is."""
    match request.param:
        case "local":
            return str(corpus)
        case "file":
            return f"file://{corpus}"
        case "web":
            return f"{fault_server(corpus.parent).url}/corpus"
        case _:
            return memory


def names(shards: list[Shard]) -> list[str]:
    return [shard.name for shard in shards]


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_folder_means_the_files_in_it_at_any_depth(root: str, ending: str) -> None:
    shards = list_shards(root + ending, SUFFIXES)
    assert names(shards) == sorted(INSIDE)
    assert [s.size for s in shards] == [
        0 if name == "empty.txt" else len(name.encode()) for name in sorted(INSIDE)
    ]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("/*.txt", ["a b.txt", "empty.txt"]),
        ("/**/*.txt", ["a b.txt", "empty.txt", "en/é%.txt"]),
        ("/*/[1]*.jsonl*", ["en/1.jsonl", "en/10.jsonl.gz"]),
        ("/en/1*", ["1.jsonl", "10.jsonl.gz"]),
        ("/*", ["a b.txt", "empty.txt", "notes.md"]),
    ],
)
def test_a_glob_means_what_it_matches_and_is_named_from_where_it_begins(
    root: str, glob: str, expected: list[str]
) -> None:
    assert names(list_shards(root + glob, SUFFIXES)) == expected


def make(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_the_endings_of_files_in_a_folder_ignore_case(tmp_path: Path) -> None:
    files = ["A.JSONL", "b.Txt", "c.JSONL.GZ", "d.jsonl.Zst", "e.TXT.XZ", "f.txt.BZ2"]
    assert names(list_shards(str(make(tmp_path, *files)), SUFFIXES)) == sorted(files)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([], ""),
        (["README"], "1 without an ending"),
        (["a/x.csv", "b/c/y.CSV", "z.csv", "notes.md"], "3 .csv, 1 .md"),
        (["a.jsonl.lz4", "a.tar.gz", "b.TAR.GZ"], "2 .tar.gz, 1 .lz4"),
        ([".hidden.csv", ".git/config", "deep/.cache/x.csv"], ""),
        (["a b.csv", "é.csv", "new\nline.csv"], "3 .csv"),
    ],
)
def test_what_is_passed_over_in_a_folder_is_known_by_its_ending(
    tmp_path: Path, others: list[str], told: str
) -> None:
    listing = list_shards(str(make(tmp_path, "a.txt", "deep/b.jsonl", *others)), SUFFIXES)
    assert names(listing) == ["a.txt", "deep/b.jsonl"]
    assert counted(listing.passed_over.values()) == told


def test_a_folder_without_a_file_that_can_be_read_says_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"; there are only 2 \.csv, 1 without an ending; correct"
    ):
        list_shards(str(make(tmp_path, "a.csv", "b.csv", "README")), SUFFIXES)


TABLE = ["x.jsonl/deep/part-1.jsonl.gz", "x.jsonl/part-0.jsonl"]
SPARK = ("x.jsonl/_SUCCESS", *TABLE)


@pytest.mark.parametrize(
    ("glob", "expected", "passed_over"),
    [
        ("*.jsonl", [*TABLE, "y.jsonl"], "1 without an ending"),
        ("*.jsonl/", [*TABLE, "y.jsonl"], "1 without an ending"),
        ("x.*", TABLE, "1 without an ending"),
        ("x.jsonl/part-*", ["part-0.jsonl"], ""),
        ("year=*", ["year=1/a.txt", "year=2/b.txt"], "1 .csv"),
        ("*", [*TABLE, "y.jsonl"], "2 folders, 1 without an ending"),
        ("year=*/*.txt", ["year=1/a.txt", "year=2/b.txt"], ""),
        ("**/*.txt", ["year=1/a.txt", "year=2/b.txt"], ""),
        ("year=*/**", ["year=1/a.txt", "year=2/b.txt", "year=2/c.csv"], ""),
    ],
)
def test_a_glob_reads_the_folders_that_it_matches(
    tmp_path: Path, glob: str, expected: list[str], passed_over: str
) -> None:
    folder = make(tmp_path / "a", *SPARK, "y.jsonl", "year=1/a.txt", "year=2/b.txt", "year=2/c.csv")
    listing = list_shards(f"{folder}/{glob}", SUFFIXES)
    assert names(listing) == expected
    assert counted(listing.passed_over.values()) == passed_over


def test_a_folder_of_a_glob_is_the_same_in_any_store(root: str) -> None:
    expected = ["en/1.jsonl", "en/10.jsonl.gz", "en/deep/2.jsonl.zst", "en/é%.txt"]
    assert names(list_shards(f"{root}/e[n]", SUFFIXES)) == expected


def test_a_file_is_itself_whatever_its_suffix(root: str) -> None:
    (shard,) = list_shards(f"{root}/notes.md", SUFFIXES)
    assert (shard.name, shard.size) == ("notes.md", len("notes.md"))


def test_what_does_not_exist_is_an_error_that_names_it(root: str) -> None:
    for missing in ("/nothing", "/*.parquet", "/nothing/*.txt"):
        with pytest.raises(ConfigError, match=r"correct it") as error:
            list_shards(root + missing, SUFFIXES)
        assert repr(root + missing) in str(error.value)
    with pytest.raises(ConfigError, match=r"\.parquet files in it \(also with \.gz, "):
        list_shards(root, (".parquet",))


def test_a_moved_corpus_keeps_its_names(corpus: Path) -> None:
    before = list_shards(str(corpus), SUFFIXES)
    shutil.move(corpus, corpus.parent / "elsewhere")
    after = list_shards(str(corpus.parent / "elsewhere"), SUFFIXES)
    assert [s[1:] for s in after] == [s[1:] for s in before]
    assert {s.url for s in after}.isdisjoint(s.url for s in before)


def test_a_path_may_be_relative_to_here_or_to_home(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.parent)
    monkeypatch.setenv("HOME", str(corpus.parent))
    expected = list_shards(str(corpus), SUFFIXES)
    assert list_shards("corpus", SUFFIXES) == list_shards("~/corpus", SUFFIXES) == expected
    with pytest.raises(ConfigError, match=f"relative paths start at {corpus.parent}"):
        list_shards("corpse", SUFFIXES)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("train.json", "no such file or folder; train.jsonl is there"),
        ("Train.jsonl", "no such file or folder; train.jsonl is there"),
        ("quite-another", "no such file or folder; correct it$"),
        ("nowhere/train.jsonl", "no such file, and no folder {0}/nowhere; correct it$"),
        ("nowhere/*.jsonl", "there is no {0}/nowhere/; correct it$"),
        ("linked", "{0}/linked/gone.jsonl is a link to /elsewhere/gone.jsonl, which is not there"),
    ],
)
def test_a_path_that_is_not_there_is_told_with_what_is(
    path: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "gone.jsonl").symlink_to("/elsewhere/gone.jsonl")
    with pytest.raises(ConfigError, match=told.format(tmp_path)) as refusal:
        list_shards(str(tmp_path / path), SUFFIXES)
    assert "relative paths" not in str(refusal.value)


def test_a_pipe_is_no_file_of_a_corpus(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"a\.jsonl is no file but a pipe, .*: copy it to one"):
        list_shards(str(tmp_path / "a.jsonl"), SUFFIXES)
    with pytest.raises(ConfigError, match=r"a\.jsonl is no file but a pipe"):
        list_shards(str(tmp_path), SUFFIXES)
    with pytest.raises(ConfigError, match="/dev/null is no file but a pipe, a socket or a device"):
        list_shards("/dev/null", SUFFIXES)


def test_a_path_that_exists_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "[ab].txt").write_text("x")
    assert names(list_shards(str(tmp_path / "[ab].txt"), SUFFIXES)) == ["[ab].txt"]


def test_links_are_followed_but_not_in_circles_nor_into_nothing(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/1.txt").write_text("x")
    (tmp_path / "near/in").mkdir(parents=True)
    (tmp_path / "near/far").symlink_to(tmp_path / "far")
    (tmp_path / "near/in/up").symlink_to(tmp_path / "near")
    (tmp_path / "near/gone.md").symlink_to(tmp_path / "gone")
    assert names(list_shards(str(tmp_path / "near"), SUFFIXES)) == ["far/1.txt"]
    (tmp_path / "near/gone.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"gone\.txt is a link to"):
        list_shards(str(tmp_path / "near"), SUFFIXES)


def test_a_tag_changes_with_the_contents(root: str, corpus: Path) -> None:
    before = list_shards(f"{root}/en/1.jsonl", SUFFIXES)
    if root.startswith("memory"):
        fsspec.filesystem("memory").pipe("/corpus/en/1.jsonl", b"EN/1.jsonl")
    else:
        (corpus / "en/1.jsonl").write_bytes(b"EN/1.jsonl")
        os.utime(corpus / "en/1.jsonl", (0, 0))
    after = list_shards(f"{root}/en/1.jsonl", SUFFIXES)
    assert after[0][:3] == before[0][:3]
    assert after[0].tag != before[0].tag


def test_a_faulty_server_hides_nothing(
    corpus: Path, fault_server: Callable[..., FaultServer]
) -> None:
    for number in range(30):
        (corpus / f"en/deep/{number}.txt").write_text("x")
    server = fault_server(corpus, rate=0.3, faults=("busy", "reset", "truncated", "stall"), seed=3)
    found = list_shards(server.url, SUFFIXES, IMPATIENT)
    assert [s[1:3] for s in found] == [s[1:3] for s in list_shards(str(corpus), SUFFIXES)]
    assert server.faults.total() > 10


def test_a_file_that_is_missing_for_a_moment_is_found(
    corpus: Path, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(corpus, rate=0.2, faults=("missing",), seed=3)
    assert names(list_shards(server.url, SUFFIXES)) == sorted(INSIDE)
    assert server.faults["missing"] > 1


def test_a_missing_file_does_not_keep_one_waiting(
    corpus: Path, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(corpus)
    with pytest.raises(ConfigError, match="HTTP 404"):
        list_shards(f"{server.url}/nothing.txt", SUFFIXES)
    assert server.requests("/nothing.txt") <= 4  # two looks more, lest it is missing for a moment


def test_a_server_that_is_busy_for_too_long_may_be_asked_again_later(
    corpus: Path, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(corpus, rate=1.0, faults=("busy",))
    with pytest.raises(TransientError, match=r"^sources=.*HTTP 503.*start the run again"):
        list_shards(server.url, SUFFIXES, RemoteConfig(retry_s=0.3), setting="sources")


def test_a_server_that_refuses_is_an_error_of_the_settings_at_once(
    corpus: Path, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(corpus, rate=1.0, faults=("forbidden",))
    with pytest.raises(ConfigError, match="HTTP 403"):
        list_shards(server.url, SUFFIXES)
    assert server.faults.total() == 1


def test_a_url_that_cannot_be_one_is_an_error_of_the_settings_at_once() -> None:
    with pytest.raises(ConfigError, match="control characters"):
        list_shards("http://127.0.0.1:9/a b.txt", SUFFIXES)


@pytest.mark.parametrize("path", ["file.txt/inside", "a" * 300, "loop"])
def test_a_path_that_cannot_exist_is_an_error_of_the_settings(path: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="cannot be listed"):
        list_shards(str(tmp_path / path), SUFFIXES, RemoteConfig(retry_s=0.1))


def test_a_server_that_is_not_there_is_an_error_when_the_time_is_over() -> None:
    begin = time.monotonic()
    with pytest.raises(TransientError, match=r"127\.0\.0\.1:9/x.*refused.*can be reached"):
        list_shards("http://127.0.0.1:9/x.txt", SUFFIXES, RemoteConfig(timeout_s=1, retry_s=0.5))
    assert time.monotonic() - begin > 0.4


@pytest.mark.parametrize(
    ("url", "says"), [("s3://bucket/a.txt", "s3fs"), ("gopher://a/b.txt", "Protocol not known")]
)
def test_a_store_that_cannot_be_reached_from_here_is_told_at_once(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        list_shards(url, SUFFIXES)


@pytest.mark.parametrize("error", [PermanentError("no"), PermissionError("no")])
def test_what_is_final_is_not_tried_again(error: Exception) -> None:
    tries = []

    def action() -> None:
        tries.append(error)
        raise error

    with pytest.raises(type(error)):
        retry(action, 60)
    assert len(tries) == 1
