"""A run whose processes die at random moments ends as one that nobody disturbed.

Two agents with two ranks each train one run. A rank gets a signal that ends all of them, or a rank,
or an agent with its ranks, is killed, while the run starts, restores, trains or saves. What ended
too early is started again, with the same command. The suite does a few of each; `make soak-faults
KILLS=20 SIGNALS=50 SEED=0` does many.
"""

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import monotonic, sleep

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from tests.patience import PATIENCE_S
from tests.train.cluster import Cluster, final_weights, kill, newest_step, random_moment
from tests.train.many_ranks import run_ranks
from train.compose import load
from train.distributed.process_groups import ProcessGroups
from train.loop import train
from train.run import open_run

pytestmark = pytest.mark.process

KILLS = int(os.environ.get("KILLS", "2"))
SIGNALS = int(os.environ.get("SIGNALS", "1"))
SEED = int(os.environ.get("SEED", "0"))

FOUR_RANKS = [
    "data.lanes=4",
    "data.prefetch=2",
    "train.global_batch=8",
    "model=phd_cswa",
    "hooks.log_every=1",
    "checkpoint.every=10",
    "checkpoint.keep=3",
    "eval.every=50",
    "schedule=constant",
]


def calm(groups: ProcessGroups, overrides: list[str]) -> str | None:
    with open_run(load(overrides), Console(file=io.StringIO()), groups) as run:
        record, _ = train(run, Progress(disable=True))
    return record.ending


def send_signals(cluster: Cluster, run: Path, rng: Random) -> None:
    """`SIGNALS` times a random rank gets a signal: all save, end in time, and are started again."""
    for number in range(1, SIGNALS + 1):
        sent = False
        while not sent:
            random_moment(cluster, run, rng)
            reached, groups = newest_step(run), cluster.groups()
            how = rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
            sent = len(groups) == 4 and kill(rng.choice(groups), how)
            assert not cluster.finished(), "the run was too short for all signals"
        start = monotonic()
        while cluster.ended() is None and monotonic() < start + PATIENCE_S:
            sleep(0.01)
        assert cluster.ended() == [75, 75], (number, how, cluster.told())
        assert newest_step(run) >= reached
        print(f"{how.name} after step {newest_step(run)}: {monotonic() - start:.1f} s")
        cluster.replace_the_dead()


def send_kills(cluster: Cluster, run: Path, rng: Random) -> None:
    """`KILLS` times a random rank, or an agent with its ranks, is killed and started again."""
    killed = 0
    while killed < KILLS:
        moment = random_moment(cluster, run, rng)
        # Of the suite's few kills one is of each kind.
        kind = ("agent", "rank")[killed] if killed < 2 else rng.choice(["rank", "rank", "agent"])
        victims = cluster.groups() if kind == "rank" else cluster.agents()
        assert not cluster.finished(), "the run was too short for all kills"
        if victims and kill(rng.choice(victims), signal.SIGKILL):
            killed += 1
            print(f"{kind} killed while {moment}, after step {newest_step(run)}")


def test_signals_and_kills_at_random_moments_leave_no_trace(
    small_at: Callable[..., list[str]], logged: Callable[..., list[dict]], tmp_path: Path
) -> None:
    rng, steps = Random(SEED), 80 + 20 * (KILLS + SIGNALS)
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    overrides = small_at(run, *FOUR_RANKS, f"train.max_steps={steps}")
    with Cluster(overrides, tmp_path / "log").at_work() as cluster:
        # Signals come first: after a kill it takes time until no rank of before is left.
        send_signals(cluster, run, rng)
        send_kills(cluster, run, rng)
        cluster.wait_for(cluster.finished)
    overrides = small_at(undisturbed, *FOUR_RANKS, f"train.max_steps={steps}")
    assert run_ranks(4, calm, overrides) == ["finished"] * 4
    assert logged(run) == logged(undisturbed)
    assert [line["step"] for line in logged(run)] == list(range(1, steps + 1))
    ours, theirs = (final_weights(path, steps) for path in (run, undisturbed))
    assert ours.specs == theirs.specs
    for name in ours.specs:
        [a], [b] = (list(x.read([name]).values()) for x in (ours, theirs))
        assert torch.equal(a, b), name
