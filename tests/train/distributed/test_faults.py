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


POISONED = (*FOUR, "train.max_steps=6", "schedule=constant", "checkpoint.every=1")


@pytest.fixture(scope="module", params=["loss", "gradient"])
def what(request: pytest.FixtureRequest) -> str:
    """Is NaN."""
    return request.param


@pytest.fixture(scope="module")
def poisoned_alone(what: str, small_at, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that has the same bad step."""
    run = tmp_path_factory.mktemp("poisoned") / "run"
    run_ranks(1, poisoned, small_at(run, *POISONED), 4, 0, what)
    return run


@pytest.mark.parametrize("engine", ["engine=fsdp", "engine=ddp", "engine=deepspeed"])
def test_one_nan_on_one_rank_costs_one_step_on_all(
    engine: str,
    what: str,
    poisoned_alone: Path,
    small_at: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    many = small_at(tmp_path / "many", *POISONED, engine)
    ends = run_ranks(2, poisoned, many, 4, 1, what)
    assert ends == [("finished", 6)] * 2
    ours, theirs = curve(tmp_path / "many"), curve(poisoned_alone)
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


@pytest.fixture(scope="module")
def spiking(small_at, outlier: Path) -> Callable[[Path, str], list[str]]:
    """The overrides of a run that meets the noise, under a policy."""

    def overrides(run: Path, policy: str) -> list[str]:
        return small_at(
            run,
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
        )

    return overrides


@pytest.fixture(scope="module")
def skipping_alone(spiking, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that has skipped the noise."""
    run = tmp_path_factory.mktemp("skipping") / "run"
    [(code, _)] = run_ranks(1, whole, spiking(run, "skip"))
    assert code == ExitCode.FINISHED
    return run


def bad_step(run: Path) -> dict[str, Any]:
    [part, *_] = sorted((run / "bad_steps").rglob("rank_0.json"))
    return json.loads(part.read_text())


def test_a_spike_is_skipped_by_all_ranks_alike(
    spiking, skipping_alone: Path, tmp_path: Path
) -> None:
    told = run_ranks(2, whole, spiking(tmp_path / "skip", "skip"))
    assert [code for code, _ in told] == [ExitCode.FINISHED] * 2
    assert "is bad: its " in told[0][1]
    bad = bad_step(tmp_path / "skip")
    assert bad["batch"] == bad["step"]
    assert bad_step(skipping_alone)["step"] == bad["step"]
    ours, theirs = (list(curve(run).values()) for run in (tmp_path / "skip", skipping_alone))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_rollback_passes_over_the_batch_and_nothing_else(
    spiking, skipping_alone: Path, tmp_path: Path
) -> None:
    told = run_ranks(2, whole, spiking(tmp_path / "rollback", "rollback"))
    assert [code for code, _ in told] == [ExitCode.FINISHED] * 2
    assert "going back to the last checkpoint" in told[0][1]
    bad = bad_step(tmp_path / "rollback")["step"]
    assert bad == bad_step(skipping_alone)["step"]
    steps, skipping = curve(tmp_path / "rollback"), curve(skipping_alone)
    assert list(steps) == list(range(1, 51))
    before = [steps[n] for n in range(1, bad)]
    assert before == pytest.approx([skipping[n] for n in range(1, bad)], abs=1e-5)
    # What one skips as a step, the other does not count as one.
    after = [steps[n] for n in range(bad, 50)]
    assert after == pytest.approx([skipping[n + 1] for n in range(bad, 50)], abs=1e-5)


def test_abort_ends_all_ranks_and_saves_nothing_new(spiking, tmp_path: Path) -> None:
    told = run_ranks(2, whole, spiking(tmp_path / "abort", "abort"))
    assert [code for code, _ in told] == [ExitCode.CRASHED] * 2
    assert "faults.policy=abort" in told[0][1]
    result = read_result(tmp_path / "abort" / "result.json")
    assert result.status == "diverged"
    assert "faults.policy=abort" in result.reason
    bad = bad_step(tmp_path / "abort")["step"]
    newest = max((tmp_path / "abort" / "checkpoints").glob("step_*")).name
    assert int(newest.removeprefix("step_")) <= bad


# Signals


def signalled_each(
    groups: ProcessGroups, runs: list[tuple[list[str], int]], learning: bool, number: int
) -> list[Any]:
    """Several runs, one after the other, each of which gets a signal of its own."""
    return [signalled(groups, overrides, learning, number, how) for overrides, how in runs]


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


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_to_one_rank_ends_all_where_they_are(
    place: str, small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    settings, learning, number = PLACES[place]
    length = ("train.max_steps=100000", "schedule=constant")
    runs = {how: tmp_path / how.name for how in SIGNALS}
    each = [(small_at(run, *FOUR, *length, *settings), int(how)) for how, run in runs.items()]
    told = run_ranks(2, signalled_each, each, learning, number)
    assert told == [[(how.name, 2) for how in SIGNALS]] * 2
    for run in runs.values():
        assert (run / "checkpoints" / "step_00000002" / "COMPLETE").exists()
        assert not {"eval/heldout/loss", "sample/text"} & set().union(*lines(run))
        assert list(curve(run)) == [1, 2]


MICRO = (*FOUR, "train.max_steps=6", "schedule=constant", "train.micro_batch=1")


@pytest.fixture(scope="module")
def calm(small_at, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, with four micro-batches in each step, that nobody disturbed."""
    run = tmp_path_factory.mktemp("calm") / "run"
    run_ranks(2, whole, small_at(run, *MICRO))
    return run


def test_a_run_that_was_given_up_within_a_step_goes_on_bitwise(
    small_at: Callable[..., list[str]], calm: Path, tmp_path: Path
) -> None:
    cut = small_at(tmp_path / "cut", *MICRO)
    run_ranks(2, signalled, cut, True, 4 * 3 + 2, int(signal.SIGTERM))
    run_ranks(2, whole, cut)
    assert curve(tmp_path / "cut") == curve(calm)


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


def whole_each(groups: ProcessGroups, runs: list[list[str]]) -> list[int]:
    """Several runs, one after the other: their exit codes."""
    return [whole(groups, overrides)[0] for overrides in runs]


def test_half_precision_trains_evaluates_and_samples_on_every_engine(
    small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    prompt = "hooks.sample.prompt='def '"
    engines = ("fsdp", "ddp", "deepspeed engine.stage=2", "deepspeed engine.stage=3")
    runs = {engine: tmp_path / engine.replace(" ", "-").replace("=", "-") for engine in engines}
    settings = [
        small_at(run, *FOUR, prompt, "engine.precision=bf16", *f"engine={engine}".split())
        for engine, run in runs.items()
    ]
    told = run_ranks(2, whole_each, settings)
    assert told == [[ExitCode.FINISHED] * len(engines)] * 2
    for engine, run in runs.items():
        *_, last = lines(run)
        assert last["sample/text"].startswith("def "), engine
        assert 4 < last["eval/heldout/loss"] < 7, engine


# Ranks that hang, or are slow


def hanging(groups: ProcessGroups, overrides: list[str], number: int, seconds: float) -> Any:
    """Rank 1 takes its time in its `number`th forward pass that is for learning."""
    passes = 0

    def before(*_: Any) -> None:
        nonlocal passes
        passes += torch.is_grad_enabled()
        if passes == number and torch.is_grad_enabled() and groups.rank == 1:
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
        run_ranks(2, hanging, overrides, 3, 1000.0)
    assert error.value.outcomes == ["the process died"] * 2  # none had to be killed
    hung, waiting = ((run / "stacks" / f"rank_{r}.txt").read_text() for r in (1, 0))
    assert "in before" in hung  # where it sleeps
    assert "in train_step" in waiting
    assert "no step for 5 s" in hung + waiting
    assert run_ranks(2, whole, overrides)[0][0] == ExitCode.FINISHED


def test_a_rank_that_is_a_thousand_times_slower_is_waited_for(
    small_at: Callable[..., list[str]], calm: Path, tmp_path: Path
) -> None:
    """A step takes milliseconds, this one seconds."""
    slow = small_at(tmp_path / "slow", *MICRO)
    assert run_ranks(2, hanging, slow, 4 * 2 + 1, 5.0) == [("finished", 6)] * 2
    assert curve(tmp_path / "slow") == curve(calm)
    assert curve(tmp_path / "slow", "throughput/step_s")[3] > 5
