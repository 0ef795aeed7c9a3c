"""Claims about `python train/pretokenize.py`: whatever happens, it writes the same files."""

import io
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from time import monotonic, sleep

import pytest
from rich.console import Console

from conf.errors import ConfigError, DataError
from data.config import TokensSource
from data.source import Document
from data.sources.documents import Documents
from data.sources.token_files import TokenCorpus, TokenIndex
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from tests.fork_server import fork_server
from tests.forked_python import forked_python
from tests.patience import PATIENCE_S
from tests.train.conftest import LoadedRun
from train.compose import load
from train.config import Config
from train.metrics.record import Metrics
from train.pretokenize import (
    PretokenizeArguments,
    Written,
    in_processes,
    pretokenize,
    training_arguments,
    write_part,
)

REPOSITORY = Path(__file__).parents[2]

# Some documents, and records that are none.
BAD = ["", " \n", "\ud800", "a" * 3000]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., dict[str, Written]]:
    """Writes the tokens of a config to `out`, in this test's folder."""

    def write(config: Config, out: str = "tokens", **settings: int) -> dict[str, Written]:
        settings = {"parts": 3, "processes": 1, **settings}
        given = PretokenizeArguments(out=str(tmp_path / out), **settings)
        return pretokenize(given, config, Console(file=io.StringIO()))

    return write


@pytest.fixture
def model(config: Callable[..., Config], tmp_path: Path) -> str:
    """The argument that gives a trained tokenizer."""
    settings = config()
    documents = Documents(settings.data)
    prepare_tokenizer(settings.tokenizer, documents, vocab_size=320).save(tmp_path / "a.model")
    return f"tokenizer.path={tmp_path / 'a.model'}"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_each_part_is_its_share_of_all_documents_held_out_or_not(
    config: Callable[..., Config], written: Callable[..., dict[str, Written]], tmp_path: Path
) -> None:
    settings = config("data.holdout=0.4")
    [(name, result)] = written(settings).items()
    directory = tmp_path / "tokens" / name
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    documents = Documents(settings.data)
    expected = [
        tokenizer.encode_document(document.text).tolist()
        for part in range(3)
        for document, _, _ in documents.valid_records(name, part, 3)
        if isinstance(document, Document)
    ]
    assert len(expected) == result.index.documents == 53
    corpus = TokenCorpus(name, directory)
    assert [document.tokens.tolist() for document, _ in corpus.documents(0, 1)] == expected
    assert corpus.index == result.index
    corpus.verify()


def test_the_files_do_not_depend_on_the_number_of_processes(
    config: Callable[..., Config], written: Callable[..., dict[str, Written]], tmp_path: Path
) -> None:
    written(config(), "one", processes=1)
    written(config(), "three", processes=3)
    one = contents(tmp_path / "one/files")
    assert len(one) == 3 * 2 + 2
    assert contents(tmp_path / "three/files") == one


def test_what_is_no_document_is_written_down_and_left_out(
    config: Callable[..., Config], written: Callable[..., dict[str, Written]], tmp_path: Path
) -> None:
    good = [f"{i} these are good words" for i in range(40)]
    path = write_lines(tmp_path / "mixed.jsonl", [*good[:20], *BAD, *good[20:]])
    settings = config(f"data.sources.files.paths={path}", "data.max_document_bytes=2000")
    index = written(settings)["files"].index
    assert (index.documents, index.quarantined) == (40, len(BAD))
    assert index.bytes == len("".join(good))
    files = sorted((tmp_path / "tokens/files").glob("*.quarantine.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert len({json.loads(line)["origin"] for line in lines}) == len(lines) == len(BAD)
    shards = {shard.name: shard.quarantined for shard in index.shards}
    assert {file.name[:5]: len(file.read_text().splitlines()) for file in files} == {
        name: count for name, count in shards.items() if count
    }


def test_too_many_records_that_are_no_documents_end_the_writing(
    config: Callable[..., Config],
    written: Callable[..., dict[str, Written]],
    model: str,
    tmp_path: Path,
) -> None:
    path = write_lines(tmp_path / "bad.jsonl", ["good words"] + [""] * 200)
    with pytest.raises(ValueError, match=r"^data\.max_quarantined=0\.02: ") as error:
        written(config(f"data.sources.files.paths={path}", model))
    assert "quarantine.jsonl" in str(error.value)
    assert not (tmp_path / "tokens/files/index.json").exists()


def test_nothing_is_written_twice(
    config: Callable[..., Config], written: Callable[..., dict[str, Written]], tmp_path: Path
) -> None:
    first = written(config())["files"]
    assert first.tokens_per_s is not None
    directory = tmp_path / "tokens/files"
    times = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    (directory / "index.json").rename(directory / "unfinished.json")  # as before its last step
    again = written(config())["files"]
    assert again == Written(first.index, None)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == times


def test_a_directory_of_other_settings_is_refused(
    config: Callable[..., Config], written: Callable[..., dict[str, Written]], tmp_path: Path
) -> None:
    written(config())
    before = contents(tmp_path / "tokens/files")
    for change, parts, message in (
        ([], 4, "parts was 3 and is now 4"),
        (["tokenizer.vocab_size=300"], 3, "tokenizer was '"),
        (["data.max_document_bytes=5000"], 3, "max_document_bytes was 16000000 and is now 5000"),
    ):
        with pytest.raises(ValueError, match="holds tokens that were made otherwise: ") as error:
            written(config(*change), parts=parts)
        assert message in str(error.value)
    assert contents(tmp_path / "tokens/files") == before


def test_text_that_changes_while_it_is_tokenised_is_refused(
    config: Callable[..., Config],
    written: Callable[..., dict[str, Written]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes(corpus.read_bytes())
    settings = config(f"data.sources.files.paths={text}")
    written(settings)
    directory = tmp_path / "tokens/files"
    (directory / "index.json").rename(directory / "unfinished.json")
    before = contents(directory)
    assert write_part(settings.data, directory, 1).name == "00001"
    with text.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"data\.sources\.files: has changed since .* was begun"):
        write_part(settings.data, directory, 1)
    assert contents(directory) == before


def test_tokens_are_not_made_of_tokens(written: Callable[..., dict[str, Written]]) -> None:
    tokens = ["data=tokens", "data.sources.tokens.path=somewhere"]
    with pytest.raises(ConfigError, match=r"sources\.tokens\.kind='tokens': is tokens already"):
        written(load(tokens))


def test_a_source_without_text_is_refused(
    config: Callable[..., Config],
    written: Callable[..., dict[str, Written]],
    model: str,
    tmp_path: Path,
) -> None:
    path = write_lines(tmp_path / "empty.jsonl", ["", " "])
    with pytest.raises(DataError, match=r"data\.sources\.files: no text in it; choose"):
        written(config(f"data.sources.files.paths={path}", model))
    assert not (tmp_path / "tokens/files/index.json").exists()


MIXTURE = [
    "data.sources.a={kind: files, paths: a.txt, weight: 0.25, epochs: 2}",
    "data.sources.b={kind: python}",
    "data.phases.late={after_tokens: 1000, weights: {a: 0.75}}",
    "data.packing=best_fit",
]


@pytest.mark.parametrize(
    ("overrides", "out", "count"),
    [
        (["data=python"], "tokens", 2),
        (["data=python", "data.holdout=0.1", "data.shuffle=false"], "../my tokens, 1", 4),
        (["data=python", "data.sources.python.epochs=3", "data.cache.dir=a b"], "/t", 4),
        (["data=python", *MIXTURE], "tokens", 2 + 3 * 2 + 2 + 3),
    ],
)
def test_the_command_that_trains_on_the_tokens_changes_the_sources_alone(
    overrides: list[str], out: str, count: int
) -> None:
    before = load(overrides).data
    arguments = training_arguments(before, PretokenizeArguments(out=out).directory)
    after = load(shlex.split(shlex.join(arguments))).data
    assert {**vars(after), "sources": 0} == {**vars(before), "sources": 0}
    names = ["tokens"] if len(before.sources) == 1 else list(before.sources)
    assert after.sources == {
        name: TokensSource(
            kind="tokens", path=f"{out}/{source}", weight=text.weight, epochs=text.epochs
        )
        for name, (source, text) in zip(names, before.sources.items(), strict=True)
    }
    assert len(arguments) == count


def test_a_run_on_tokens_is_the_run_on_their_text(
    config: Callable[..., Config],
    written: Callable[..., dict[str, Written]],
    trained: Callable[..., LoadedRun],
    logged: Callable[..., list[Metrics]],
    tmp_path: Path,
) -> None:
    """To the last digit with one lane and one part: then the documents' order is the text's."""
    on_text = config("data.lanes=1")
    written(on_text, parts=1)
    tokens = TokensSource(kind="tokens", path=str(tmp_path / "tokens/files"))
    on_tokens = replace(
        on_text,
        data=replace(on_text.data, sources={"files": tokens}),
        run=replace(on_text.run, dir=str(tmp_path / "on_tokens")),
    )
    expected, found = trained(on_text).run, trained(on_tokens).run
    assert len(logged(expected.directory)) == 6
    assert logged(found.directory) == logged(expected.directory)
    assert found.tokenizer.fingerprint == expected.tokenizer.fingerprint


Process = subprocess.Popen[str]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts the command as a user does, on text that takes it a few seconds."""
    started: list[Process] = []
    rng, words = Random(1), [f"word{i}" for i in range(500)]
    texts = [" ".join(rng.choices(words, k=2000)) for _ in range(480)]
    path = write_lines(tmp_path / "long.jsonl", texts)

    def start(out: str, *others: str, forked: bool = True) -> Process:
        overrides = [
            "data=files",
            f"data.sources.files.paths={path}",
            "tokenizer.sample_bytes=50000",
        ]
        script = str(REPOSITORY / "train/pretokenize.py")
        given = [*overrides, f"out={out}", "parts=32", *others]
        with forked_python() if forked else nullcontext():
            process = subprocess.Popen(
                [sys.executable, "-W", "error", script, *given],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in living(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for_shards(directory: Path, number: int, process: Process) -> TokenIndex:
    """Returns when so many shards are written, and some are not."""
    deadline = monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, process.communicate()
        assert monotonic() < deadline, "no shard is written"
        if (directory / "unfinished.json").exists():
            index = TokenIndex.load(directory / "unfinished.json")
            if len(index.shards) >= number:
                return index
        sleep(0.01)


def living(session: int) -> list[int]:
    """The processes of a session that are not dead."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_session, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(of_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for_end(process: Process) -> None:
    """Returns when no process that the command started lives on; that takes no time."""
    deadline = monotonic() + PATIENCE_S
    while living(process.pid):
        assert monotonic() < deadline, "a worker outlives the command"
        sleep(0.01)


def _begin(file: Path) -> None:
    file.touch()
    sleep(PATIENCE_S)
    file.with_suffix(".ended").touch()


def _fail_after(file: Path) -> None:
    while not file.exists():
        sleep(0.01)
    raise LookupError("as it shall")


@pytest.mark.process
def test_a_failure_ends_the_workers_and_no_other_process_of_ours(tmp_path: Path) -> None:
    other = fork_server().Process(target=sleep, args=(PATIENCE_S,))
    other.start()
    before = set(multiprocessing.active_children())
    file = tmp_path / "work.begun"
    jobs = [partial(_begin, file), partial(_fail_after, file)]
    try:
        with pytest.raises(LookupError, match="as it shall"):
            list(in_processes(jobs, workers=2))
        assert set(multiprocessing.active_children()) == before >= {other}
        assert not file.with_suffix(".ended").exists()
    finally:
        other.kill()
        other.join()
    assert other.exitcode == -signal.SIGKILL


@pytest.mark.process
def test_a_killed_command_goes_on_to_the_same_files(
    command: Callable[..., Process], tmp_path: Path
) -> None:
    whole = command("whole", "processes=2")
    output, errors = whole.communicate()
    assert (whole.returncode, errors) == (0, "")

    killed = command("killed", "processes=1")
    wait_for_shards(tmp_path / "killed/files", 2, killed)
    killed.kill()
    killed.wait()
    wait_for_end(killed)
    # It may have written more between the look and the kill.
    index = TokenIndex.load(tmp_path / "killed/files/unfinished.json")
    assert index.missing
    kept = {shard.name: (tmp_path / f"killed/files/{shard.name}.tokens") for shard in index.shards}
    times = {name: path.stat().st_mtime_ns for name, path in kept.items()}

    interrupted = command("killed", "processes=1")
    wait_for_shards(tmp_path / "killed/files", len(times) + 1, interrupted)
    os.killpg(interrupted.pid, signal.SIGINT)  # as Ctrl-C does
    text, errors = interrupted.communicate()
    assert (interrupted.returncode, errors) == (128 + signal.SIGINT, "")
    assert text.startswith("interrupted: the same command goes on")
    wait_for_end(interrupted)

    again = command("killed", "processes=2")
    last, errors = again.communicate()
    assert (again.returncode, errors) == (0, "")
    assert contents(tmp_path / "killed/files") == contents(tmp_path / "whole/files")
    assert {name: path.stat().st_mtime_ns for name, path in kept.items()} == times

    first, advice = output.splitlines()
    assert first.startswith("files: 480 documents, ")
    assert " bytes per token), 0 records quarantined, " in first
    assert last.splitlines()[0].split(" quarantined")[0] == first.split(" quarantined")[0]
    assert advice == (
        "train on it: python train/main.py data=tokens data.sources.tokens.path=whole/files"
    )


@pytest.mark.process
def test_a_wrong_command_is_refused_on_one_screen(command: Callable[..., Process]) -> None:
    process = command("out", "processes=0", "data.lanes=0")
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("2 problems in the configuration:\n")
    assert "Traceback" not in errors


@pytest.mark.process
def test_a_python_of_its_own_imports_all_that_the_command_needs(
    command: Callable[..., Process], tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    data = f"data.sources.files.paths={tmp_path}/empty.jsonl"
    process = command("out", data, forked=False)
    output, errors = process.communicate()
    assert process.returncode == 2
    assert output.startswith("data.sources.files: 1 file has 0 bytes")
    assert "data.sources.files" in errors
    assert "Traceback" not in errors
