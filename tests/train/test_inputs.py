"""Data and a tokenizer that are not there are told before the plan is printed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from conf.errors import ConfigError, DataError
from data.tokenizer import Tokenizer
from train import export, generate
from train.arguments import ExportArguments, GenerateArguments
from train.compose import load
from train.inputs import check_inputs
from train.main import main
from train.start.tokenizer_of_weights import tokenizer_of_weights

FILES = "data.sources.files.paths"
TOKENS = "data.sources.tokens.path"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([f"{FILES}=nosuch.jsonl"], [f"{FILES}='nosuch.jsonl'"]),
        ([f"{FILES}='*.parquet'"], [f"{FILES}='*.parquet'"]),
        ([f"{FILES}=[a.txt,b.txt]"], [f"{FILES}='a.txt'", f"{FILES}='b.txt'"]),
        (["data=tokens", f"{TOKENS}=nosuch"], [f"{TOKENS}='nosuch'"]),
        (["data=python", "tokenizer.path=a.model"], ["tokenizer.path='a.model'"]),
        (
            [f"{FILES}=nosuch", "tokenizer.path=a.model"],
            [f"{FILES}='nosuch'", "tokenizer.path='a.model'"],
        ),
    ],
)
def test_what_is_not_there_is_told_before_the_plan(
    capsys: pytest.CaptureFixture[str], overrides: list[str], told: list[str]
) -> None:
    data = [] if overrides[0].startswith("data=") else ["data=files"]
    config = load([*data, *overrides, "engine.device=cpu"])
    with pytest.raises(ConfigError) as refusal:
        main(config)
    assert [str(problem).partition(":")[0] for problem in refusal.value.problems] == told
    assert "the plan" not in capsys.readouterr().out
    assert not config.run_dir.exists()


def test_what_is_there_and_no_input_is_told_too(
    small: Callable[..., list[str]], nowhere: Path
) -> None:
    (nowhere / "no.model").write_text("[model]")
    with pytest.raises(ConfigError, match=r"tokenizer\.path='no\.model': cannot be used"):
        check_inputs(load(small("tokenizer.path=no.model")))
    (nowhere / "half").mkdir()
    (nowhere / "half" / "unfinished.json").write_text("{}")
    with pytest.raises((ConfigError, DataError), match="half"):
        check_inputs(load(["data=tokens", f"{TOKENS}=half"]))


@pytest.mark.parametrize(
    ("start_from", "told"),
    [
        ("nosuch", "nosuch: no such directory; give that of a run, of one of its check"),
        ("weights.safetensors", "weights.safetensors: not a directory; give the one"),
        ("run", "run: the run has no complete checkpoint yet; let it train on"),
        ("run/checkpoints", "these are the checkpoints of a run; give the run, run, or one of"),
    ],
)
def test_weights_that_are_not_there_are_told_before_the_plan(
    small: Callable[..., list[str]],
    nowhere: Path,
    capsys: pytest.CaptureFixture[str],
    start_from: str,
    told: str,
) -> None:
    (nowhere / "weights.safetensors").write_bytes(b"")
    (nowhere / "run").mkdir()
    (nowhere / "run" / "config.yaml").write_text("{}")
    if "checkpoints" in start_from:
        (nowhere / "run/checkpoints/step_00000003").mkdir(parents=True)
    config = load(small(f"run.start_from={start_from}"))
    with pytest.raises(DataError, match=told):
        main(config)
    assert capsys.readouterr().out == ""
    # Other commands look for the tokenizer of the weights, and have no remark on it to make.
    with pytest.raises(DataError, match=told):
        tokenizer_of_weights(start_from, Console())
    assert capsys.readouterr().out == ""


def test_what_lies_elsewhere_is_not_asked_for() -> None:
    check_inputs(load(["data=files", f"{FILES}=https://nosuch.invalid/a.jsonl"]))
    check_inputs(load(["data=c4"]))


def test_a_run_that_was_begun_has_a_tokenizer_of_its_own(
    small: Callable[..., list[str]],
) -> None:
    config = load(small("tokenizer.path=lost.model"))
    config.run_dir.mkdir()
    (config.run_dir / "tokenizer.model").write_bytes(b"the run's own")
    check_inputs(config)
    with pytest.raises(ConfigError, match=r"lost\.model"):
        check_inputs(load(small("tokenizer.path=lost.model", "run.resume=never")))


def test_a_tokenizer_too_large_for_the_model_is_told_early(
    small: Callable[..., list[str]], opened: Callable, tmp_path: Path
) -> None:
    tokenizer: Tokenizer = opened(load(small())).tokenizer
    tokenizer.save(tmp_path / "own.model")
    new = (f"tokenizer.path={tmp_path / 'own.model'}", "run.resume=never")
    check_inputs(load(small(*new)))
    with pytest.raises(ConfigError, match=r"more than model\.vocab_size=64"):
        check_inputs(load(small(*new, "model.vocab_size=64")))


def test_a_tilde_in_any_path_is_the_home_directory(
    config, trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = trained(config('run.dir="~/runs/a"', "model=vanilla", "train.max_steps=1")).run
    assert run.directory == tmp_path / "runs/a"
    assert export.main(ExportArguments(run="~/runs/a", out="~/exported")) == 0
    assert generate.main(GenerateArguments(run="~/runs/a", prompt="a", max_tokens=1)) == 0
    start = config('run.dir="~/runs/b"', 'run.start_from="~/exported"', "model=phd")
    check_inputs(start)
    trained(start)
    assert not (tmp_path / "~").exists()
