"""The loop: what is due when, when it ends, and that ordinary steps wait for nothing."""

import os
import resource
import signal
import threading
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch.utils._python_dispatch import TorchDispatchMode

from conf.errors import DataError
from data.loader import Loader
from train.engines.schedule import learning_rate
from train.loop import train
from train.metrics.record import EARLY_STEPS, Metrics, StepRecord
from train.run import Run

STEP = 4 * 32  # tokens


class Recorder:
    """A hook and a sink that keep what they are given."""

    def __init__(self, every: int, signal_after: int | None = None) -> None:
        self.every = every
        self.signal_after = signal_after
        self.records: list[StepRecord] = []
        self.written: list[tuple[int, Metrics]] = []

    def __call__(self, record: StepRecord) -> Metrics:
        self.records.append(record)
        if record.step == self.signal_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"recorder/calls": len(self.records)}

    def write(self, step: int, metrics: Metrics) -> None:
        self.written.append((step, metrics))

    def close(self) -> None:
        pass

    @property
    def steps(self) -> list[int]:
        return [record.step for record in self.records]


# What is due


@pytest.mark.parametrize(
    ("every", "steps"),
    [(0, [7]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7])],
)
def test_a_hook_is_due_every_so_many_steps_and_once_at_the_end(
    every: int, steps: list[int], config, trained
) -> None:
    recorder = Recorder(every)
    trained(config("train.max_steps=7"), hooks=(recorder,))
    assert recorder.steps == steps


def test_each_hook_logs_in_the_period_of_its_own_settings(config, trained, logged) -> None:
    periods = {
        "hooks.log_every": 4,
        "eval.every": 3,
        "hooks.sample.every": 5,
        "checkpoint.every": 2,
    }
    overrides = [f"{key}={every}" for key, every in periods.items()]
    run = trained(config("train.max_steps=11", *overrides)).run
    lines = {line["step"]: line for line in logged(run.directory, measured=True)}
    signs = {
        "train/loss": 4,
        "throughput/step_s": 4,
        "kv/bytes_per_sequence": 4,
        "eval/heldout/loss": 3,
        "sample/text": 5,
        "checkpoint/stall_s": 2,
    }
    for name, every in signs.items():
        early = EARLY_STEPS if every == 4 else ()
        due = [step for step in range(1, 12) if step % every == 0 or step in (*early, 11)]
        assert [step for step, line in lines.items() if name in line] == due, name
    assert sorted(lines) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("log_every", "steps"),
    [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 2, 3, 5, 6, 7]), (20, [1, 2, 5, 7])],
)
def test_a_run_reports_how_it_begins_and_says_how_long_it_takes(
    log_every: int, steps: list[int], config, trained, logged
) -> None:
    run = trained(config("train.max_steps=7", f"hooks.log_every={log_every}")).run
    lines = logged(run.directory, measured=True)
    assert [line["step"] for line in lines] == steps
    left = [line["step"] for line in lines if line.get("throughput/eta_s", 0) > 0]
    assert left == steps[1:-1]  # the first step's time is no guide
    assert lines[-1]["throughput/eta_s"] == 0


def test_a_resumed_run_keeps_the_periods(config, trained) -> None:
    trained(config("train.max_steps=4"))
    recorder = Recorder(3)
    trained(config("train.max_steps=10"), hooks=(recorder,))
    assert recorder.steps == [6, 9, 10]


def test_sinks_get_what_the_hooks_of_a_step_return_and_nothing_on_other_steps(
    config, trained
) -> None:
    rare, often, sink = Recorder(6), Recorder(2), Recorder(0)
    last = trained(config("hooks.log_every=100"), hooks=(rare, often), sinks=(sink,))
    assert [step for step, _ in sink.written] == [1, 2, 4, 5, 6]
    assert [m.get("recorder/calls") for _, m in sink.written] == [None, 1, 2, None, 3]
    assert set(sink.written[2][1]) == {"recorder/calls"}
    assert sink.written[-1][1] == last.metrics
    assert {"train/loss", "sample/text", "checkpoint/save_s"} < set(last.metrics)


class Reads(TorchDispatchMode):
    """Counts the times that a tensor's value is fetched, which on a GPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(config, opened, **recorders: Recorder) -> int:
    run = replace(
        opened(config),
        hooks=tuple(recorders.values()),
        save=Recorder(0),
        evaluations=(),
        sample=Recorder(0),
    )
    with Reads() as mode:
        train(run, Progress(disable=True))
    return mode.count


def test_steps_without_a_due_hook_read_nothing_from_the_device(config, opened, tmp_path) -> None:
    class ReadsLoss(Recorder):
        def __call__(self, record: StepRecord) -> Metrics:
            return {"loss": record.loss.item()}

    settings = ["model.K=3", "train.micro_batch=2", "optim.z_loss=1e-4"]
    quiet = config(*settings, f"run.dir={tmp_path / 'quiet'}")
    assert reads(quiet, opened, rare=Recorder(100)) == 0
    assert reads(config(*settings), opened, often=ReadsLoss(3)) == 2


# What a record says


def test_a_record_says_what_the_step_was(config, trained) -> None:
    settings = config("train.max_steps=5", "schedule.warmup_steps=2")
    recorder = Recorder(1)
    run = trained(settings, hooks=(recorder,)).run
    batches = [batch for _, batch in zip(range(5), Loader(run.stream), strict=False)]
    for step, (record, batch) in enumerate(zip(recorder.records, batches, strict=True), 1):
        assert (record.step, record.tokens) == (step, step * STEP)
        assert record.lr == learning_rate(settings, step - 1)
        assert (record.batch.rows == batch.rows).all()
        assert record.batch.stats.cursors == batch.stats.cursors
    times = [record.train_s for record in recorder.records]
    assert times == sorted(times)
    assert all(0 <= r.data_wait_s[0] <= r.train_s for r in recorder.records)
    assert [record.ending for record in recorder.records] == [None] * 4 + ["finished"]


def test_a_record_cannot_be_changed(config, trained) -> None:
    record = trained(config("train.max_steps=1")).record
    with pytest.raises(FrozenInstanceError):
        record.step = 7


def test_the_time_of_hooks_is_no_time_of_training(config, trained) -> None:
    pause = threading.Event()
    within: list[tuple[float, float]] = []  # this hook, from when to when

    class Slow(Recorder):
        def __call__(self, record: StepRecord) -> Metrics:
            begun = perf_counter()
            pause.wait(0.05)
            within.append((begun, perf_counter()))
            return super().__call__(record)

    slow = Slow(1)
    trained(config("train.max_steps=5"), hooks=(slow,))
    first, *_, last = slow.records
    # However busy the machine is: the steps took no longer than what is left without the hook.
    outside = sum(begun - ended for (_, ended), (begun, _) in pairwise(within))
    assert 0 < last.train_s - first.train_s <= outside


def test_the_speed_of_a_resumed_run_is_that_of_its_own_steps(config, trained) -> None:
    trained(config("train.max_steps=5"))
    clock, sink = Recorder(1), Recorder(0)
    trained(config("train.max_steps=6"), hooks=(clock,), sinks=(sink,))
    [record], [(_, metrics)] = clock.records, sink.written
    assert metrics["throughput/tokens_per_s"] == pytest.approx(STEP / record.train_s)


# The end


def test_a_run_ends_at_its_last_whole_step_of_tokens(config, trained) -> None:
    done = trained(config("train.max_steps=null", f"train.max_tokens={3 * STEP + STEP - 1}"))
    assert (done.record.step, done.record.ending) == (3, "finished")


def test_the_first_of_two_bounds_ends_a_run(config, trained) -> None:
    done = trained(config("train.max_steps=2", f"train.max_tokens={5 * STEP}"))
    assert (done.record.step, done.record.ending) == (2, "finished")


def test_time_ends_a_run_and_the_same_command_goes_on(config, trained) -> None:
    settings = config("train.max_steps=null", "train.max_time=0.15s", "schedule=constant")
    first = trained(settings)
    assert first.record.ending == "max_time"
    assert first.record.train_s >= 0.15
    assert first.metrics["eval/heldout/loss"] > 0
    second = trained(settings)
    assert second.record.step > first.record.step


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_after_the_step_at_hand_and_only_saves(
    name: str, config, trained
) -> None:
    class Signalling(Recorder):
        def __call__(self, record: StepRecord) -> Metrics:
            if record.step == 2:
                os.kill(os.getpid(), signal.Signals[name])
            return {}

    done = trained(config("train.max_steps=1000", "schedule=constant"), hooks=(Signalling(1),))
    assert (done.record.step, done.record.ending) == (3, name)
    assert done.record.ending.by_signal
    assert done.run.store.newest().step == 3
    assert [key for key in done.metrics if key.startswith(("eval/", "sample/"))] == []
    assert "train/loss" in done.metrics


def test_nothing_of_the_run_outlives_it(config, trained) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    threads = set(threading.enumerate())
    trained(config("data.prefetch=8"), hooks=(Recorder(1, signal_after=2),))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    # Of an earlier test, a thread that waits for a stalled server may still be there.
    assert "prefetch" not in [thread.name for thread in set(threading.enumerate()) - threads]


def test_data_that_does_not_do_is_the_users_problem_before_the_first_step(config, opened) -> None:
    with pytest.raises(DataError, match=r"data\.lanes=64: a lane"):
        opened(config("data.lanes=64", "train.global_batch=64"))


# A disk that refuses


class FullForAWhile(Recorder):
    """From step 3 to 5, lets the kernel refuse to write a file beyond some bytes."""

    def __init__(self, run: Run, size: int) -> None:
        super().__init__(1)
        self.store = run.store
        self.size = size

    def __call__(self, record: StepRecord) -> Metrics:
        self.store.close()  # or it would be left to chance which save meets the full disk
        now, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = {3: self.size, 5: most}.get(record.step, now)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        return {}


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_while(
    config, trained, logged
) -> None:
    settings = config("checkpoint.every=2", "checkpoint.keep=9", "hooks.console=true")
    done = trained(settings, hooks=lambda run: (FullForAWhile(run, 2**16),))
    assert done.record.ending == "finished"
    store = done.run.store
    assert [path.name for path in sorted(store.root.iterdir())] == [
        "step_00000002",
        "step_00000006",
    ]
    lines = logged(done.run.directory, measured=True)
    [told] = [line for line in lines if "checkpoint/error" in line]
    assert told["step"] == 6  # the next save tells how the one before it ended
    message = told["checkpoint/error"]
    assert f"the checkpoint of step 4 could not be written to {store.root}" in message
    assert "File too large" in message
    assert f"step 6/6  checkpoint/error: {message}" in done.output
    assert len(lines) == 6


def test_a_disk_without_any_room_stops_no_training(config, trained, logged) -> None:
    settings = config("checkpoint.every=2", "checkpoint.keep=9", "hooks.console=true")
    done = trained(settings, hooks=lambda run: (FullForAWhile(run, 0),))
    assert done.record.ending == "finished"
    assert [line["step"] for line in logged(done.run.directory)] == [1, 2, 5, 6]
    assert done.output.count("metrics.jsonl is not written: ") == 1
    assert "step 6/6  checkpoint/error: the checkpoint of step 4 could not be" in done.output
    assert done.run.store.newest().step == 6
