"""Weights and the tokenizer that they were trained with belong together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from conf.errors import ConfigError
from data.tokenizer import Tokenizer
from tests.train.conftest import LoadedRun
from train.checkpoint.load_run import load_run
from train.config import Config
from train.hf.pretrained import save_pretrained
from train.pretokenize import PretokenizeArguments, pretokenize
from train.run import Run

pytest.importorskip("safetensors")


class Given:
    """A model directory with its tokenizer, and settings of a new run on another text."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, settings: list[str]) -> None:
        self.directory = directory
        self.tokenizer = tokenizer
        self.settings = settings


@pytest.fixture
def given(config, opened: Callable[[Config], Run], tmp_path: Path) -> Given:
    run = opened(config("model=vanilla", f"run.dir={tmp_path / 'first'}"))
    directory = tmp_path / "weights"
    save_pretrained(directory, run.engine.model.config, run.engine.model.state_dict())
    run.tokenizer.save(directory / "tokenizer.model")
    text = tmp_path / "other.jsonl"
    lines = [f"{i} quite another text, of Latin words: et cetera " * (i % 9) for i in range(1, 60)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings = ["model=phd", f"run.start_from={directory}", f"data.sources.files.paths={text}"]
    return Given(directory, run.tokenizer, settings)


def another(config, opened: Callable[[Config], Run], given: Given, tmp_path: Path) -> Path:
    """The tokenizer that the other text would get."""
    settings = [setting for setting in given.settings if "start_from" not in setting]
    run = opened(config(*settings, f"run.dir={tmp_path / 'alone'}"))
    assert run.tokenizer.fingerprint != given.tokenizer.fingerprint
    assert run.tokenizer.vocab_size <= given.tokenizer.vocab_size
    return run.directory / "tokenizer.model"


@pytest.mark.parametrize("others", [[], ["{path}"], ["{size}"]], ids=["none", "path", "size"])
def test_the_tokenizer_of_the_weights_is_that_of_the_run(
    config, given: Given, opened, others: list[str]
) -> None:
    path = f"tokenizer.path={given.directory}/tokenizer.model"
    size = f"tokenizer.vocab_size={given.tokenizer.vocab_size}"
    run = opened(config(*given.settings, *(text.format(path=path, size=size) for text in others)))
    assert run.tokenizer.fingerprint == given.tokenizer.fingerprint


def test_what_is_pretokenized_for_weights_has_their_tokenizer(
    config, given: Given, tmp_path: Path
) -> None:
    args = PretokenizeArguments(out=str(tmp_path / "tokens"), processes=1, parts=1)
    written = pretokenize(args, config(*given.settings), Console(quiet=True))
    assert written["files"].index.tokenizer == given.tokenizer.fingerprint


def test_another_tokenizer_than_that_of_the_weights_is_refused(
    config, given: Given, opened, tmp_path: Path
) -> None:
    other = another(config, opened, given, tmp_path)
    for wrong, told in (
        (f"tokenizer.path={other}", r"tokenizer\.path=.*: is another tokenizer than that of the"),
        ("tokenizer.vocab_size=270", r"tokenizer\.vocab_size=270: the tokenizer of run\.start_fr"),
    ):
        with pytest.raises(ConfigError, match=told):
            opened(config(*given.settings, wrong))


def test_tokens_of_another_tokenizer_than_that_of_the_weights_are_refused(
    config, given: Given, opened, tmp_path: Path
) -> None:
    other = another(config, opened, given, tmp_path)
    args = PretokenizeArguments(out=str(tmp_path / "tokens"), processes=1, parts=1)
    settings = [s for s in given.settings if "start_from" not in s]
    settings.append(f"tokenizer.path={other}")
    pretokenize(args, config(*settings), Console(quiet=True))
    tokens = ["~data.sources.files", f"data.sources.t={{kind:tokens,path:{tmp_path}/tokens/files}}"]
    with pytest.raises(ConfigError, match=r"its tokens are not those of the tokenizer of run\.st"):
        opened(config(*given.settings[:2], *tokens))


@pytest.mark.parametrize("content", [None, b"", b"of another format", b"\x0a\x03abc"])
def test_a_directory_without_a_tokenizer_to_compare_is_warned_of(
    config, given: Given, trained: Callable[..., LoadedRun], content: bytes | None
) -> None:
    path = given.directory / "tokenizer.model"
    path.unlink() if content is None else path.write_bytes(content)
    done = trained(config(*given.settings, "train.max_steps=1"))
    output = " ".join(done.output.split())
    assert "nothing says whether its weights were trained with the tokenizer" in output


def test_a_resumed_run_needs_the_directory_no_more(
    config, given: Given, trained: Callable[..., LoadedRun]
) -> None:
    trained(config(*given.settings, "train.max_steps=1"))
    shutil.rmtree(given.directory)
    done = trained(config(*given.settings, "train.max_steps=2"))
    assert done.run.tokenizer.fingerprint == given.tokenizer.fingerprint


def test_a_run_whose_tokenizer_was_replaced_is_loaded_with_its_own(
    config, given: Given, opened, trained: Callable[..., LoadedRun], tmp_path: Path
) -> None:
    run = trained(config("train.max_steps=1")).run
    shutil.copy(another(config, opened, given, tmp_path), run.directory / "tokenizer.model")
    loaded = load_run(run.directory, torch.device("cpu"))
    assert loaded.tokenizer.fingerprint == run.tokenizer.fingerprint
