"""Whole runs on several ranks: one run, whatever their number and the engine."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from tests.forked_python import forked_python
from tests.train.many_ranks import RanksFailedError, run_ranks
from train.compose import load
from train.distributed.process_groups import ProcessGroups
from train.loop import train
from train.metrics.record import Metrics
from train.run import open_run

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[3]
FOUR = ("data.lanes=4", "train.global_batch=8", "model=phd_cswa", "model.K=3", "eval.rows=5")


def train_on(groups: ProcessGroups, overrides: list[str]) -> tuple[str | None, int, Metrics]:
    """Opens a run and trains it to its end: (why it ended, its step, the last metrics)."""
    with open_run(load(overrides), Console(file=io.StringIO()), groups) as run:
        record, metrics = train(run, Progress(disable=True))
    return record.ending, record.step, metrics


def lines(directory: Path) -> list[dict[str, Any]]:
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def curve(directory: Path, name: str = "train/loss") -> list[float]:
    return [line[name] for line in lines(directory) if name in line]


@pytest.fixture(scope="module")
def alone(small_at: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on one rank."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    run_ranks(1, train_on, small_at(directory, *FOUR, "train.max_steps=12"))
    return directory


def test_ranks_and_engines_may_change_from_start_to_start(
    small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    starts = [
        (4, ["engine=fsdp"]),
        (2, ["engine=deepspeed", "engine.stage=2"]),
        (1, ["engine=fsdp"]),
        (4, ["engine=hsdp"]),
        (2, ["engine=deepspeed", "engine.stage=3"]),
        (4, ["engine=ddp"]),
        (4, ["engine=fsdp", "engine.context=2"]),
        (2, ["engine=fsdp", "engine.tensor=2"]),
    ]
    four = *FOUR, "model.kv_heads=2"
    for number, (world_size, engine) in enumerate(starts, 1):
        overrides = small_at(tmp_path / "run", *four, f"train.max_steps={2 * number}", *engine)
        told = run_ranks(world_size, train_on, [*overrides, "schedule=constant"])
        assert {(ending, step) for ending, step, _ in told} == {("finished", 2 * number)}
    steady = tmp_path / "steady"
    length = f"train.max_steps={2 * len(starts)}"
    run_ranks(1, train_on, small_at(steady, *four, length, "schedule=constant"))
    for name in ("train/loss", "train/bits_per_byte", "optim/grad_norm", "progress/files/tokens"):
        assert curve(tmp_path / "run", name) == pytest.approx(curve(steady, name), abs=1e-5), name
    assert curve(tmp_path / "run", "eval/heldout/loss")[-1] == pytest.approx(
        curve(steady, "eval/heldout/loss")[-1], abs=1e-5
    )


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_the_same_start_twice_is_bitwise_the_same_run(
    engine: str, small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(2, train_on, small_at(whole, *FOUR, f"engine={engine}", "schedule=constant"))
    for steps in (2, 6):
        overrides = small_at(parts, *FOUR, f"engine={engine}", "schedule=constant")
        run_ranks(2, train_on, [*overrides, f"train.max_steps={steps}"])
    assert curve(parts) == curve(whole)
    assert curve(parts, "optim/grad_norm") == curve(whole, "optim/grad_norm")


def test_all_ranks_know_the_same_of_the_run(
    small_at: Callable[..., list[str]], alone: Path, tmp_path: Path
) -> None:
    told = run_ranks(2, train_on, small_at(tmp_path / "run", *FOUR, "train.max_steps=12"))
    one, two = (metrics for _, _, metrics in told)
    clocks = ("throughput/", "checkpoint/")
    assert {k: v for k, v in one.items() if not k.startswith(clocks)} == {
        k: v for k, v in two.items() if not k.startswith(clocks)
    }
    ours, theirs = lines(tmp_path / "run"), lines(alone)
    assert len(ours) == len(theirs) == 12  # the first rank alone writes
    same = [k for k in theirs[-1] if k.startswith(("train/", "eval/", "progress/", "data/", "kv/"))]
    assert len(same) >= 10
    for key in same:
        for line, other in zip(ours, theirs, strict=True):
            told, expected = line.get(key, 0), other.get(key, 0)
            is_text = isinstance(expected, str)  # a fingerprint
            assert told == (expected if is_text else pytest.approx(expected, rel=1e-5)), key
    assert ours[-1]["sample/text"] == theirs[-1]["sample/text"]


def test_the_end_of_all_text_ends_all_ranks_after_the_same_step(
    small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    settings = ("data.sources.files.epochs=1", "train.max_steps=1000", "train.seq_len=64")
    ends = []
    for world_size in (1, 2, 4):
        directory = tmp_path / f"on_{world_size}"
        told = run_ranks(world_size, train_on, small_at(directory, *FOUR, *settings))
        assert len({(ending, step) for ending, step, _ in told}) == 1
        ends.append(told[0][:2])
        assert curve(directory) == pytest.approx(curve(tmp_path / "on_1"), abs=1e-5)
        with pytest.raises(RanksFailedError, match="all text has been read so often"):
            run_ranks(world_size, train_on, small_at(directory, *FOUR, *settings))
    assert set(ends) == {("out_of_text", ends[0][1])}
    assert ends[0][1] > 3


def test_what_one_rank_cannot_read_ends_all_of_them_with_what_it_says(
    small_at: Callable[..., list[str]], alone: Path, tmp_path: Path
) -> None:
    """A part of the text belongs to one lane, and so to one rank."""
    good = [json.dumps({"text": f"{i} " + "some words " * 40}) for i in range(400)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join([*good[:240], *["broken {"] * 60, *good[240:]]) + "\n")
    source = [f"data.sources.files.paths={path}", "data.holdout=0"]
    tokenizer = ["tokenizer=file", f"tokenizer.path={alone / 'tokenizer.model'}"]
    length = ["train.max_steps=500", "hooks.log_every=100"]
    told = run_ranks(2, train_on, small_at(tmp_path / "run", *FOUR, *source, *tokenizer, *length))
    assert len({(ending, step) for ending, step, _ in told}) == 1
    assert told[0][0] == "data_failed"
    assert (tmp_path / "run" / "checkpoints" / f"step_{told[0][1]:08d}" / "COMPLETE").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.lanes=3", "train.global_batch=12"], "data.lanes=3: not divisible by the 2 ranks"),
        (
            ["train.global_batch=12", "train.micro_batch=4"],
            "not divisible by 2 ranks",
        ),
        (["engine.replicate=3"], "engine.replicate=3: must divide the number of ranks, 2"),
        (["data.sources.files.paths=/nowhere.jsonl"], "/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks_in_the_same_words(
    overrides: list[str], said: str, small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(RanksFailedError) as raised:
        run_ranks(2, train_on, small_at(tmp_path / "run", *FOUR, *overrides))
    first, second = (told.strip().splitlines()[-1] for told in raised.value.outcomes)
    assert said in first
    assert first == second
    assert not (tmp_path / "run").exists()


def test_the_runs_of_a_sweep_follow_each_other_on_all_ranks(
    small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    settings = [text for text in small_at(tmp_path, *FOUR) if not text.startswith("run.dir")]
    sweep = ["-m", "engine=deepspeed,fsdp", "train.max_steps=2"]
    with forked_python():
        done = subprocess.run(
            [sys.executable, "-m", "launch", "local", "processes=2", *settings, *sweep],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    runs = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert len(runs) == 2
    for run in runs:
        assert len(curve(run)) == 2, run
    assert (tmp_path / "runs" / "multirun.yaml").exists()
    assert done.stdout.count("the plan:") == 2  # the first rank speaks for all
