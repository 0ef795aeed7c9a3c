"""Claims about `train.settings.schedule`: the parts of a run, given its length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.settings.schedule import ScheduleConfig

BATCH = 4096  # tokens of a step


def test_the_warm_up_is_given_in_steps_tokens_or_a_fraction() -> None:
    assert ScheduleConfig(warmup_steps=7).warmup(1000, BATCH) == 7
    assert ScheduleConfig(warmup_tokens=4097).warmup(1000, BATCH) == 2
    assert ScheduleConfig(warmup_fraction=0.02).warmup(1000, BATCH) == 20
    assert ScheduleConfig(warmup_steps=0, warmup_fraction=0.5).warmup(1000, BATCH) == 0


@pytest.mark.parametrize(
    ("kind", "steps"), [("cosine", 95), ("linear", 95), ("wsd", 20), ("constant", 0)]
)
def test_the_decay_fills_what_its_kind_says(kind: str, steps: int) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_fraction=0.05, decay_fraction=0.2)
    assert schedule.decay(100, BATCH) == steps


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 0.99))
def test_the_most_steps_within_a_limit_are_those_that_trying_all_gives(
    limit: int, first: int, last: int, start: float
) -> None:
    if first == last:
        return
    schedule = ScheduleConfig(copies={0.0: first, start: last})

    def flops(total: int) -> int:
        return sum(stage.steps(0, total) * stage.K for stage in schedule.stages(total))

    most = max(total for total in range(limit + 1) if flops(total) <= limit)
    assert schedule.most_steps(limit, lambda K: K) == most
