"""A run whose processes die at random moments ends as one that nobody disturbed.

Two agents with two ranks each train one run. A rank, or an agent with its ranks, is killed while
the run starts, restores, trains or saves; what ended too early is started again, with the same
command. The suite does a few; `make soak-faults KILLS=20 SIGNALS=50 SEED=0` does many.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import monotonic, sleep

import pytest
import torch

from tests.train.cluster import Cluster, final_weights, kill, newest_step, random_moment

KILLS = int(os.environ.get("KILLS", "2"))
SIGNALS = int(os.environ.get("SIGNALS", "2"))
SEED = int(os.environ.get("SEED", "0"))
DEADLINE_S = 60.0  # for four ranks, on two busy cores, to save and end

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


@pytest.fixture(scope="module")
def disturbed_as_undisturbed(
    small_at: Callable[..., list[str]], logged: Callable[..., list[dict]], tmp_path_factory
) -> Callable[[Path, int], None]:
    """Compares a run with one of as many steps that nothing happens to."""

    def compare(run: Path, steps: int) -> None:
        calm = tmp_path_factory.mktemp("calm") / "run"
        overrides = small_at(calm, *FOUR_RANKS, f"train.max_steps={steps}")
        with Cluster(overrides, calm.parent / "log").at_work() as cluster:
            cluster.wait_for(lambda: cluster.ended() is not None, patience_s=600)
            assert cluster.ended() == [0, 0], cluster.told()
        assert logged(run) == logged(calm)
        assert [line["step"] for line in logged(run)] == list(range(1, steps + 1))
        ours, theirs = (final_weights(x, steps) for x in (run, calm))
        assert ours.specs == theirs.specs
        for name in ours.specs:
            [a], [b] = (list(x.read([name]).values()) for x in (ours, theirs))
            assert torch.equal(a, b), name

    return compare


def test_killed_ranks_and_machines_leave_no_trace(
    small_at, disturbed_as_undisturbed, tmp_path: Path
) -> None:
    dice, run, steps = Random(SEED), tmp_path / "run", 40 + 20 * KILLS
    overrides = small_at(run, *FOUR_RANKS, f"train.max_steps={steps}")
    killed = []
    with Cluster(overrides, tmp_path / "log").at_work() as cluster:
        while len(killed) < KILLS:
            moment = random_moment(cluster, run, dice)
            of_a_kind = dice.choice(["rank", "rank", "agent"])
            victims = cluster.groups() if of_a_kind == "rank" else cluster.agents()
            if victims and kill(dice.choice(victims), signal.SIGKILL):
                killed.append((moment, of_a_kind, newest_step(run)))
                print(*killed[-1])
            assert newest_step(run) < steps, f"the run was too short for {KILLS} kills: {killed}"
        cluster.wait_for(lambda: cluster.ended() == [0, 0], patience_s=600)
    disturbed_as_undisturbed(run, steps)


def test_a_signal_to_any_rank_saves_and_ends_all_in_time(
    small_at, disturbed_as_undisturbed, tmp_path: Path
) -> None:
    dice, run, steps = Random(SEED + 1), tmp_path / "run", 40 + 20 * SIGNALS
    overrides = small_at(run, *FOUR_RANKS, f"train.max_steps={steps}")
    took = []
    with Cluster(overrides, tmp_path / "log").at_work() as cluster:
        while len(took) < SIGNALS:
            random_moment(cluster, run, dice)
            reached = newest_step(run)
            groups = cluster.groups()
            how = dice.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
            if len(groups) < 4 or not kill(dice.choice(groups), how):
                continue
            start = monotonic()
            while cluster.ended() is None and monotonic() < start + DEADLINE_S:
                sleep(0.01)
            took.append(monotonic() - start)
            assert cluster.ended() == [75, 75], (len(took), how, cluster.told())
            assert newest_step(run) >= reached
            print(f"{how.name} after step {newest_step(run)}: {took[-1]:.1f} s")
            cluster.replace_the_dead()
        cluster.wait_for(lambda: cluster.ended() == [0, 0], patience_s=600)
    assert all(seconds < DEADLINE_S for seconds in took)
    disturbed_as_undisturbed(run, steps)
