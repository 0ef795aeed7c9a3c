"""What goes wrong on one rank is everybody's, and costs what it has to."""

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import sleep
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from conf.exit_codes import ExitCode
from phd.loss import Loss
from tests.train.many_ranks import RanksFailedError, run_ranks
from train.compose import load
from train.distributed.process_groups import ProcessGroups
from train.distributed.signals import StopSignal
from train.experiments.result import read_result
from train.loop import train
from train.main import train_to_the_end
from train.run import Run, open_run

pytestmark = pytest.mark.process

FOUR = ("data.lanes=4", "train.global_batch=8", "model=phd_cswa", "eval.rows=16", "seed=3")


def lines(directory: Path) -> list[dict[str, Any]]:
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def curve(directory: Path, name: str = "train/loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in lines(directory) if name in line}


def run_with(groups: ProcessGroups, overrides: list[str], prepare: Callable[[Run], Run]) -> Any:
    with open_run(load(overrides), Console(file=io.StringIO()), groups) as run:
        record, _ = train(prepare(run), Progress(disable=True))
    return record.ending, record.step


# Bad steps


def poisoned(
    groups: ProcessGroups, overrides: list[str], number: int, victim: int, what: str
) -> Any:
    """The training's `number`th micro-batch of rank `victim` has a loss or gradient of NaN."""
    count = 0

    def poison(_: nn.Module, __: Any, loss: Loss) -> Loss | None:
        nonlocal count
        count += torch.is_grad_enabled()
        if count != number or not torch.is_grad_enabled() or groups.rank != victim:
            return None
        bad = loss.total * torch.nan
        if what == "loss":
            return Loss(bad, bad.detach(), loss.targets)
        return Loss(bad, loss.cross_entropy, loss.targets)

    def prepare(run: Run) -> Run:
        run.engine.model_with_loss.register_forward_hook(poison)
        return run

    return run_with(groups, overrides, prepare)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("engine", ["engine=fsdp", "engine=ddp", "engine=deepspeed"])
def test_one_nan_on_one_rank_costs_one_step_on_all(
    engine: str, what: str, small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    settings = [*FOUR, "train.max_steps=6", "schedule=constant", "checkpoint.every=1"]
    many = small_at(tmp_path / "many", *settings, engine)
    ends = run_ranks(2, poisoned, many, 4, 1, what)
    assert ends == [("finished", 6)] * 2
    run_ranks(1, poisoned, small_at(tmp_path / "one", *settings), 4, 0, what)
    ours, theirs = (curve(tmp_path / name) for name in ("many", "one"))
    if what == "loss":
        assert ours.pop(4) is theirs.pop(4) is None
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5)
    assert curve(tmp_path / "many", "train/bad_steps") == {4: 1, 5: 1, 6: 1}
    written = sorted((tmp_path / "many" / "bad_steps").rglob("*.json"))
    assert [path.name for path in written] == ["rank_0.json", "rank_1.json"]
    for rank, path in enumerate(written):
        told = json.loads(path.read_text())
        assert (told["step"], told["batch"], told["rank"]) == (4, 4, rank)
        assert len(told["rows"]) == 4
        assert {"embed", "blocks.0", "norm"} <= told["layers"].keys()


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text, and in its middle a document of noise."""
    rng = Random(0)
    phrase = "original copies stay in the cache and hidden ones do not"
    words = phrase.split()
    texts = [" ".join(rng.choices(words, k=25)) for _ in range(600)]
    texts[370] = "".join(rng.choices("QWXZ[]{}#@!?;:<>|~^$%&*0123456789", k=45))
    path = tmp_path_factory.mktemp("outlier") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def whole(groups: ProcessGroups, overrides: list[str]) -> tuple[int, str]:
    told = io.StringIO()
    console = Console(file=told, width=500)
    return train_to_the_end(load(overrides), console, groups, StopSignal()), told.getvalue()


@pytest.fixture
def spiking(small_at, outlier: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The overrides of a run that meets the noise, under a policy."""

    def overrides(policy: str, *others: str) -> list[str]:
        return small_at(
            tmp_path / policy,
            *FOUR,
            f"data.sources.files.paths={outlier}",
            "data.shuffle=false",
            "data.holdout=0",
            "model.vocab_size=400",
            "faults.spike=4",
            "faults.window=16",
            f"faults.policy={policy}",
            "train.max_steps=50",
            "schedule=constant",
            "optim.lr=1e-2",
            "checkpoint.every=10",
            *others,
        )

    return overrides


def bad_step(run: Path) -> dict[str, Any]:
    [part, *_] = sorted((run / "bad_steps").rglob("rank_0.json"))
    return json.loads(part.read_text())


def test_a_spike_is_skipped_by_all_ranks_alike(spiking, tmp_path: Path) -> None:
    told = run_ranks(2, whole, spiking("skip"))
    assert [code for code, _ in told] == [ExitCode.FINISHED] * 2
    assert "is bad: its " in told[0][1]
    bad = bad_step(tmp_path / "skip")
    assert bad["batch"] == bad["step"]
    alone = run_ranks(1, whole, [*spiking("skip"), f"run.dir={tmp_path / 'alone'}"])
    assert alone[0][0] == ExitCode.FINISHED
    assert bad_step(tmp_path / "alone")["step"] == bad["step"]
    ours, theirs = (list(curve(tmp_path / name).values()) for name in ("skip", "alone"))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_rollback_passes_over_the_batch_and_nothing_else(spiking, tmp_path: Path) -> None:
    told = run_ranks(2, whole, spiking("rollback"))
    assert [code for code, _ in told] == [ExitCode.FINISHED] * 2
    assert "going back to the last checkpoint" in told[0][1]
    run_ranks(1, whole, spiking("skip"))
    bad = bad_step(tmp_path / "rollback")["step"]
    assert bad == bad_step(tmp_path / "skip")["step"]
    steps, skipping = curve(tmp_path / "rollback"), curve(tmp_path / "skip")
    assert list(steps) == list(range(1, 51))
    before = [steps[n] for n in range(1, bad)]
    assert before == pytest.approx([skipping[n] for n in range(1, bad)], abs=1e-5)
    # What one skips as a step, the other does not count as one.
    after = [steps[n] for n in range(bad, 50)]
    assert after == pytest.approx([skipping[n + 1] for n in range(bad, 50)], abs=1e-5)


def test_abort_ends_all_ranks_and_saves_nothing_new(spiking, tmp_path: Path) -> None:
    told = run_ranks(2, whole, spiking("abort"))
    assert [code for code, _ in told] == [ExitCode.CRASHED] * 2
    assert "faults.policy=abort" in told[0][1]
    result = read_result(tmp_path / "abort" / "result.json")
    assert result.status == "diverged"
    assert "faults.policy=abort" in result.reason
    bad = bad_step(tmp_path / "abort")["step"]
    newest = max((tmp_path / "abort" / "checkpoints").glob("step_*")).name
    assert int(newest.removeprefix("step_")) <= bad


# Signals


def signalled(
    groups: ProcessGroups, overrides: list[str], learning: bool, number: int, how: int
) -> Any:
    """Rank 1 gets a signal in its `number`th forward pass that is for learning, or is not."""
    passes = 0

    def before(*_: Any) -> None:
        nonlocal passes
        passes += torch.is_grad_enabled() == learning
        if passes == number and torch.is_grad_enabled() == learning and groups.rank == 1:
            passes += 1
            os.kill(os.getpid(), how)

    def prepare(run: Run) -> Run:
        run.engine.model.blocks[0].register_forward_pre_hook(before)
        return run

    return run_with(groups, overrides, prepare)


PLACES = {
    "between micro-batches": (["train.micro_batch=1"], True, 4 * 2 + 2),
    "in an evaluation": (["train.micro_batch=1", "eval.every=2"], False, 3),
    "while sampling": (
        ["data.holdout=0", "hooks.sample.every=2", "hooks.sample.tokens=40"],
        False,
        5,
    ),
}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_to_one_rank_ends_all_where_they_are(
    place: str, how: signal.Signals, small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    settings, learning, number = PLACES[place]
    run = tmp_path / "run"
    overrides = small_at(run, *FOUR, "train.max_steps=100000", "schedule=constant", *settings)
    told = run_ranks(2, signalled, overrides, learning, number, int(how))
    assert told == [(how.name, 2)] * 2
    assert (run / "checkpoints" / "step_00000002" / "COMPLETE").exists()
    assert not {"eval/heldout/loss", "sample/text"} & set().union(*lines(run))
    assert list(curve(run)) == [1, 2]


def test_a_run_that_was_given_up_within_a_step_goes_on_bitwise(
    small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    settings = [*FOUR, "train.max_steps=6", "schedule=constant", "train.micro_batch=1"]
    cut = small_at(tmp_path / "cut", *settings)
    run_ranks(2, signalled, cut, True, 4 * 3 + 2, int(signal.SIGTERM))
    run_ranks(2, whole, cut)
    run_ranks(2, whole, small_at(tmp_path / "calm", *settings))
    assert curve(tmp_path / "cut") == curve(tmp_path / "calm")


def early(groups: ProcessGroups, overrides: list[str]) -> tuple[int, str]:
    """Rank 1 gets its signal before the run is opened."""
    told = io.StringIO()
    with StopSignal() as stop_signal:
        if groups.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        console = Console(file=told, width=500)
        return train_to_the_end(load(overrides), console, groups, stop_signal), told.getvalue()


def test_a_signal_before_the_first_step_ends_all_ranks_without_a_trace(
    small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    told = run_ranks(2, early, small_at(tmp_path / "run", *FOUR))
    assert [code for code, _ in told] == [ExitCode.REQUEUE] * 2
    assert told[0][1].endswith("SIGTERM: ended before step 1; nothing to save\n")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "engine", ["fsdp", "ddp", "deepspeed engine.stage=2", "deepspeed engine.stage=3"]
)
def test_half_precision_trains_evaluates_and_samples_on_every_engine(
    engine: str, small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    prompt = "hooks.sample.prompt='def '"
    settings = [*FOUR, prompt, "engine.precision=bf16", *f"engine={engine}".split()]
    told = run_ranks(2, whole, small_at(tmp_path / "run", *settings))
    assert [code for code, _ in told] == [ExitCode.FINISHED] * 2
    *_, last = lines(tmp_path / "run")
    assert last["sample/text"].startswith("def ")
    assert 4 < last["eval/heldout/loss"] < 7


# Ranks that hang, or are slow


def hanging(groups: ProcessGroups, overrides: list[str], seconds: float) -> Any:
    """Rank 1 takes its time in step 3."""
    passes = 0

    def before(*_: Any) -> None:
        nonlocal passes
        passes += torch.is_grad_enabled()
        if passes == 3 and torch.is_grad_enabled() and groups.rank == 1:
            passes += 1
            sleep(seconds)

    def prepare(run: Run) -> Run:
        run.engine.model_with_loss.register_forward_pre_hook(before)
        return run

    return run_with(groups, overrides, prepare)


def test_a_hung_rank_ends_all_and_everybody_writes_down_where_it_was(
    small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = small_at(run, *FOUR, "faults.step_timeout=5s", "checkpoint.every=1")
    with pytest.raises(RanksFailedError) as error:
        run_ranks(2, hanging, overrides, 1000.0)
    assert error.value.outcomes == ["the process died"] * 2  # none had to be killed
    hung, waiting = ((run / "stacks" / f"rank_{r}.txt").read_text() for r in (1, 0))
    assert "in before" in hung  # where it sleeps
    assert "in train_step" in waiting
    assert "no step for 5 s" in hung + waiting
    assert run_ranks(2, whole, overrides)[0][0] == ExitCode.FINISHED


def test_a_rank_that_is_a_thousand_times_slower_is_waited_for(
    small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A step takes milliseconds, this one seconds."""
    slow, calm = (small_at(tmp_path / name, *FOUR) for name in ("slow", "calm"))
    assert run_ranks(2, hanging, slow, 5.0) == [("finished", 6)] * 2
    run_ranks(2, whole, calm)
    assert curve(tmp_path / "slow") == curve(tmp_path / "calm")
    assert curve(tmp_path / "slow", "throughput/step_s")[3] > 5
