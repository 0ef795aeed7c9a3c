"""The clock of a slow link, and what two ranks would have waited for by it."""

from typing import Any

import pytest

from tests.train.many_ranks import run_ranks
from train.benchmarks import overlap
from train.benchmarks.overlap import HEAD_DIM, KV_HEADS, PATTERNS, Turn, _Link, measured
from train.distributed.process_groups import ProcessGroups
from train.engines import context_parallel


def test_a_link_sends_one_thing_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = 5.0
    monkeypatch.setattr(overlap, "thread_time", lambda: computed)
    link = _Link(bytes_per_s=10.0)
    assert [link.send(20), link.send(30)] == [7.0, 10.0]
    link.wait_until(7.0)
    assert link.now == 7.0
    computed = 9.5  # 4.5 s, after which the second one has been here for long
    assert link.now == 11.5
    link.wait_until(10.0)
    assert link.now == 11.5
    assert link.send(10) == 12.5  # the link had nothing to do
    link.asked = 0.0
    assert link.send(10) == 13.5  # it was asked for early, and comes after what is on the way
    link.waited = 100.0
    assert link.send(10) == 14.5


def waits_alone(groups: ProcessGroups, *arguments: Any) -> dict[str, list[Turn]]:
    """What ranks measure to which all computing takes no time."""
    context_parallel.PIECE_BYTES = 1
    overlap.thread_time = lambda: 0.0  # type: ignore[attr-defined]
    return measured(groups, *arguments)


@pytest.mark.process
def test_what_nothing_hides_is_waited_for() -> None:
    tokens, bytes_per_s, repeat = 64, 1e6, 2
    # A rank's keys and values, which come from the other one; gradients are float32, too.
    gathered = 2 * KV_HEADS * HEAD_DIM * tokens // 2 * 4 / bytes_per_s
    expected = Turn(*[pytest.approx(3 * gathered)] * 4, no_link=0.0)
    for rank in run_ranks(2, waits_alone, tokens, bytes_per_s, repeat):
        assert rank == {name: [expected] * repeat for name in PATTERNS}
