"""Four kinds of errors, and the exit code that each ends a run with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conf.exit_codes import ExitCode
from train import compose
from train.checkpoint.store import CheckpointStore
from train.experiments.ledger import result_of
from train.experiments.result import read_result
from train.main import main
from train.metrics.record import Metrics, StepRecord

# One batch in advance, and no second chance: a failure shows within a few steps.
AT_ONCE = ("data.remote.retry_s=0.2", "data.workers=1", "data.prefetch=1", "train.max_steps=500")


class AfterStep3:
    """Does something to the run's text once step 3 is done."""

    every = 1

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work

    def __call__(self, record: StepRecord) -> Metrics:
        if record.step == 3:
            self.work()
        return {}


@pytest.fixture
def text(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus, for the run alone."""
    path = tmp_path / "text.jsonl"
    path.write_bytes(corpus.read_bytes())
    return path


@pytest.fixture
def ended_with(
    small: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, text: Path
) -> Callable[..., object]:
    """The exit code of a command line that runs, and does `work` after step 3."""

    def code(work: Callable[[], object], *overrides: str) -> object:
        settings = small(f"data.sources.files.paths={text}", *AT_ONCE, *overrides)
        monkeypatch.setattr("sys.argv", ["main.py", *settings])
        with pytest.raises(SystemExit) as ended:
            compose.run(lambda config: main(config, hooks=[lambda _: AfterStep3(work)]))
        return ended.value.code

    return code


def saved_step(directory: Path) -> int:
    newest = CheckpointStore(directory / "checkpoints", keep=1).newest()
    assert newest is not None
    return newest.step


def test_text_that_is_gone_for_now_ends_with_75_and_the_run_saved(
    ended_with: Callable[..., object],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    contents = text.read_bytes()
    assert ended_with(text.unlink) == ExitCode.REQUEUE
    told = capsys.readouterr().err
    assert told.startswith("failed for now, the same command may go on later:\n")
    assert str(text) in told
    step = saved_step(tmp_path / "run")
    assert step >= 3
    result = result_of(tmp_path / "run")
    assert (result.status, result.steps) == ("unfinished", step)
    assert str(text) in result.reason
    text.write_bytes(contents)
    again = f"train.max_steps={step + 2}"
    assert ended_with(lambda: None, again) == ExitCode.FINISHED
    assert saved_step(tmp_path / "run") == step + 2
    assert result_of(tmp_path / "run").status == "finished"


def test_text_that_is_wrong_ends_with_2_and_the_run_saved(
    ended_with: Callable[..., object],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Another file of the same size: what was listed is not there any more.
    def change() -> None:
        text.write_bytes(b"x" * text.stat().st_size)

    assert ended_with(change) == ExitCode.MISUSED
    told = capsys.readouterr().err
    assert told.startswith("1 problem in the data:\n")
    assert str(text) in told
    assert saved_step(tmp_path / "run") >= 3
    result = read_result(tmp_path / "run" / "result.json")
    assert result.status == "failed"
    assert result.reason.startswith("DataError: ")


def test_a_wrong_setting_ends_with_2_before_anything_is_made(
    ended_with: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_with(lambda: None, "run.resume=must") == ExitCode.MISUSED
    assert capsys.readouterr().err.startswith("1 problem in the configuration:\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")])
def test_a_fault_of_the_program_keeps_its_traceback(
    error: Exception,
    small: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """No ValueError, torch's or ours, becomes a problem of the configuration."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["main.py", *small("train.max_steps=5")])
    with pytest.raises(type(error), match="a bug"):
        compose.run(lambda config: main(config, hooks=[lambda _: AfterStep3(fail)]))
    result = read_result(tmp_path / "run" / "result.json")
    assert (result.status, result.reason) == ("failed", f"{type(error).__name__}: {error}")
