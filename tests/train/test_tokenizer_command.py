"""Claims about `train.tokenizer`: what is trained, what is told of it, and that a run takes it."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
from rich.console import Console

from conf.errors import ConfigError
from data.sources.documents import Documents
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from tests.forked_python import forked_python
from train.compose import CONF, load, split
from train.config import Config
from train.tokenizer import (
    TokenizerArguments,
    encode,
    make_tokenizer,
    print_report,
)

COMMAND = CONF.parent / "train" / "tokenizer.py"


def run(*overrides: str, forked: bool = True) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(CONF.parent)}
    command = [sys.executable, "-W", "error", str(COMMAND), *overrides]
    with forked_python() if forked else nullcontext():
        return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_it_trains_what_a_run_would_train_for_itself(config: Callable[..., Config]) -> None:
    settings = config("tokenizer.vocab_size=300")
    report = make_tokenizer(settings)
    documents = Documents(settings.data)
    own = prepare_tokenizer(settings.tokenizer, documents, vocab_size=320)
    assert report.tokenizer.fingerprint == own.fingerprint


def test_without_a_size_it_has_as_many_pieces_as_the_model_has_room_for(
    config: Callable[..., Config],
) -> None:
    assert make_tokenizer(config("model.vocab_size=310")).tokenizer.vocab_size == 310


def test_the_report_is_of_the_sample_and_of_held_out_text(config: Callable[..., Config]) -> None:
    settings = config()
    report = make_tokenizer(settings)
    documents = Documents(settings.data)
    sample = list(documents.sample(settings.tokenizer.sample_bytes))
    held_out = [document.text for document in documents.held_out("files")]
    assert len(sample) + len(held_out) == 53
    assert (report.documents, report.size) == (len(sample), len("".join(sample).encode()))
    assert report.sample[:3] == encode(report.tokenizer, sample)[:3]
    assert report.held_out is not None
    assert report.held_out[:3] == encode(report.tokenizer, held_out)[:3]


def test_encoding_counts_documents_bytes_and_tokens(config: Callable[..., Config]) -> None:
    tokenizer = make_tokenizer(config()).tokenizer
    texts = ["é 😀 original", "hidden"]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    found = encode(tokenizer, texts)
    assert found[:3] == (2, 2 + 1 + 4 + 1 + 8 + 6, tokens)
    assert found.seconds > 0


def test_where_nothing_is_held_out_the_report_says_so(config: Callable[..., Config]) -> None:
    report = make_tokenizer(config("data.holdout=0"))
    assert report.held_out is None
    print_report(report, Console(file=(text := io.StringIO()), width=200))
    assert "none of held-out text" in text.getvalue()


def test_a_mixture_is_measured_on_held_out_text_of_each_source_by_weight(
    config: Callable[..., Config], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.tokenizer.MEASURED", 8 * 1600)
    more = ["data.sources.more.kind=files", f"data.sources.more.paths={corpus}"]
    settings = config(*more, "data.sources.more.weight=3")
    sizes = [len(d.text.encode()) for d in Documents(settings.data).held_out("more")]
    ends = list(accumulate(sizes))
    found = make_tokenizer(settings).held_out
    assert found is not None
    # The documents of each source until its quarter, or three, of 1600 bytes are full.
    assert found.size == sum(next(end for end in ends if end >= part) for part in (400, 1200))
    without = make_tokenizer(config(*more, "data.sources.more.weight=0")).held_out
    assert without is not None
    assert without.size == next(end for end in ends if end >= 1600)


def test_a_given_tokenizer_is_not_trained_again(config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.path='a\.model': is trained already"):
        make_tokenizer(config("tokenizer.path=a.model"))


@pytest.mark.process
def test_a_run_takes_what_the_command_wrote(
    small: Callable[..., list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "new folder" / "a.model"
    done = run(*small("tokenizer.vocab_size=310"), f"out={path}")
    assert (done.returncode, done.stderr) == (0, "")
    told = f"written: '{path}'\nuse it: tokenizer=file tokenizer.path='{path}' model.vocab_size=320"
    assert told in done.stdout
    tokenizer = Tokenizer.load(path)
    for told in ("bytes per token", "MB/s", "tokens/s", "310", tokenizer.fingerprint):
        assert told in done.stdout
    settings = load(small("tokenizer=file", f"tokenizer.path='{path}'", "model.vocab_size=320"))
    taken = prepare_tokenizer(settings.tokenizer, Documents(settings.data), vocab_size=320)
    assert taken.fingerprint == tokenizer.fingerprint


def test_nothing_is_overwritten(small: Callable[..., list[str]], tmp_path: Path) -> None:
    (path := tmp_path / "a.model").write_text("mine")
    with pytest.raises(ConfigError, match=r"out=.*a\.model': is there already; give another path"):
        split(TokenizerArguments, small(f"out={path}"))
    with pytest.raises(ConfigError, match=r"out='': expected the path"):
        split(TokenizerArguments, small("out="))


@pytest.mark.process
def test_data_without_text_is_one_screen_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    out = tmp_path / "a.model"
    data = ("data=files", f"data.sources.files.paths={tmp_path}/empty.jsonl")
    done = run(*data, f"out={out}", forked=False)  # this Python imports all in its own order
    assert (done.returncode, done.stdout) == (2, "")
    assert "data.sources.files" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
