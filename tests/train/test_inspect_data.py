"""What a configuration will feed is told as it is."""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from conf.errors import ConfigError
from data.loader import Loader
from data.sources.documents import Documents
from data.stream import BatchShape, TokenStream
from data.tokenizer_training import prepare_tokenizer
from train import inspect_data, plan
from train.arguments import PlanArguments
from train.config import Config
from train.inspect_data import count, main, shown_row

Configured = Callable[..., Config]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_data, "MEASURE_S", 0.05)


def test_what_is_told_of_a_source_is_what_is_in_it(
    config: Configured, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(config()) == 0
    output = capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    size = sum(len(text.encode()) for text in texts)
    assert "53, 10 of them held out" in output or re.search(r"53, \d+ of them held out", output)
    assert f"{size:,} bytes" in output
    assert re.search(r"tokens of an epoch +│ about [\d,]+", output)
    assert f"{corpus}@0" in output
    assert "⟨/⟩" in output
    assert "quarantined: 0 of 53 records" in output
    assert re.search(r"the loader alone: [\d,]+ tokens/s with data.workers=1", output)


@pytest.mark.parametrize("bad", [0, 1, 7])
def test_each_record_is_counted_once_also_if_a_tokenizer_was_trained_on_it(
    config: Configured,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bad: int,
) -> None:
    (path := tmp_path / "text.jsonl").write_text(corpus.read_text() + "no JSON\n" * bad)
    assert main(config(f"data.sources.files.paths={path}", "tokenizer.vocab_size=300")) == 0
    assert f"quarantined: {bad} of {53 + bad} records" in capsys.readouterr().out


def test_files_that_are_passed_over_are_told_once(
    config: Configured, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(corpus.read_text())
    for name in ("a.csv", "b.CSV", "README"):
        (tmp_path / name).write_text("not read")
    (tmp_path / "b.jsonl.gz").touch()
    folder = f"data.sources.files.paths={tmp_path}"
    for command in (main, partial(plan.main, PlanArguments())):
        assert command(config(folder)) == 0
        output = capsys.readouterr().out
        assert output.count("passed over in the same folders: 2 .csv, 1 without an ending") == 1
        assert (
            output.count("1 file has 0 bytes, as an interrupted download leaves: b.jsonl.gz") == 1
        )


def test_a_run_may_be_planned_where_its_text_is_not(
    config: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(PlanArguments(), config(f"data.sources.files.paths={tmp_path}/none")) == 0
    assert "the files of data.sources.files cannot be looked at here: " in capsys.readouterr().out


def test_a_source_that_is_not_read_to_its_end_is_not_called_known(config: Configured) -> None:
    settings = config()
    documents = Documents(settings.data)
    tokenizer = prepare_tokenizer(settings.tokenizer, documents, vocab_size=320)
    whole = count(documents, tokenizer, "files", seconds=60)
    part = count(documents, tokenizer, "files", seconds=0)
    assert (whole.complete, whole.documents, part.complete, part.documents) == (True, 53, False, 1)
    assert 0 < whole.held_out < whole.documents
    assert len(whole.first) == 3


def test_a_row_is_shown_with_its_borders_and_its_padding(config: Configured) -> None:
    settings = config("data.packing=best_fit", "train.seq_len=200", "model.max_seq_len=200")
    documents = Documents(settings.data)
    tokenizer = prepare_tokenizer(settings.tokenizer, documents, vocab_size=320)
    shape = BatchShape(global_batch=4, seq_len=200)
    for batch in islice(Loader(TokenStream(documents, tokenizer, shape, seed=0)), 5):
        shown = shown_row(batch, tokenizer)
        text, _, padding = shown.partition("⟨·")
        assert shown.startswith("⟨/⟩")
        tokens = 1 + sum(len(tokenizer.encode_document(t)) for t in text.split("⟨/⟩")[1:-1])
        assert tokens + int(padding.rstrip("⟩") or 0) == 201


def test_what_cannot_be_read_is_refused(config: Configured, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.files\.paths="):
        main(config(f"data.sources.files.paths={tmp_path}/none"))
