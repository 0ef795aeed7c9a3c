"""A user adds a hook without touching the loop: as the docs show it, in a script of their own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train import compose
from train.compose import load
from train.main import main
from train.metrics.record import Metrics, StepRecord
from train.run import Run


class WeightNorm:
    """The hook of the docs: it keeps the engine, and nothing else of the run."""

    every = 2

    def __init__(self, run: Run) -> None:
        self.engine = run.engine

    def __call__(self, record: StepRecord) -> Metrics:  # noqa: ARG002
        with self.engine.summon_full_params() as model:
            return {"weights/norm": model.embed.weight.norm().item()}


def test_its_metrics_are_logged_when_it_is_due_and_at_the_end(
    small: Callable[..., list[str]], logged: Callable[..., list[Metrics]], tmp_path: Path
) -> None:
    config = load(small("train.max_steps=5", "hooks.log_every=5"))
    assert main(config, hooks=[WeightNorm]) == 0
    lines = logged(tmp_path / "run")
    assert [line["step"] for line in lines if "weights/norm" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 5]


def test_it_is_one_more_line_of_a_script(
    small: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    logged: Callable[..., list[Metrics]],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("sys.argv", ["my_train.py", *small("train.max_steps=2")])
    with pytest.raises(SystemExit) as ended:
        compose.run(lambda config: main(config, hooks=[WeightNorm]))
    assert ended.value.code == 0
    assert "weights/norm" in logged(tmp_path / "run")[-1]


def test_a_hook_that_fails_closes_the_run(small: Callable[..., list[str]], tmp_path: Path) -> None:
    class Broken(WeightNorm):
        def __call__(self, record: StepRecord) -> Metrics:
            raise ZeroDivisionError(record.step)

    with pytest.raises(ZeroDivisionError):
        main(load(small("train.max_steps=3")), hooks=[Broken])
    assert not (tmp_path / "run" / "stacks").exists()  # the watchdog has been left
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
