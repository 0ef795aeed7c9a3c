"""The learning rate as a pure function of the step: landmarks, bounds and directions."""

from itertools import pairwise
from math import cos, pi
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig, PythonSource
from train.config import Config
from train.engines.schedule import config_before, learning_rate, schedule_change
from train.settings.optim import OptimConfig
from train.settings.schedule import ScheduleConfig
from train.settings.train import TrainConfig

PEAK = 2.0


def rates(steps: int = 100, *, extra: int = 0, **schedule: Any) -> list[float]:
    """The rate of every step of a run, and of some after it."""
    config = Config(
        data=DataConfig(sources={"python": PythonSource(kind="python")}),
        train=TrainConfig(max_steps=steps, global_batch=16, seq_len=256),
        optim=OptimConfig(lr=PEAK),
        schedule=ScheduleConfig(**schedule),
    )
    return [learning_rate(config, step) for step in range(steps + extra)]


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    """A run's length, and a schedule that fits into it."""
    steps = draw(st.integers(1, 60))
    return {
        "steps": steps,
        "kind": draw(st.sampled_from(["cosine", "linear", "wsd", "constant"])),
        "warmup_steps": draw(st.integers(0, steps // 2)),
        "final_ratio": draw(st.floats(0, 1)),
        "decay_fraction": draw(st.floats(0, 0.5)),
    }


@given(schedules())
def test_the_rate_rises_to_the_peak_and_then_only_falls(schedule: dict[str, Any]) -> None:
    lr, warmup = rates(**schedule), schedule["warmup_steps"]
    assert all(0 <= rate <= PEAK for rate in lr)
    assert all(a < b for a, b in pairwise(lr[:warmup]))
    assert all(a >= b for a, b in pairwise(lr[max(0, warmup - 1) :]))
    if warmup:
        assert lr[warmup - 1] == PEAK
        assert lr[0] == pytest.approx(PEAK / warmup)


@given(schedules())
def test_the_last_step_is_at_the_final_ratio(schedule: dict[str, Any]) -> None:
    steps, kind = schedule["steps"], schedule["kind"]
    decays = {"wsd": round(schedule["decay_fraction"] * steps), "constant": 0}
    decay = decays.get(kind, steps - schedule["warmup_steps"])
    expected = PEAK * schedule["final_ratio"] if decay else PEAK
    lr = rates(**schedule, extra=3)
    # Where a step later is asked for, it stays there.
    assert lr[steps - 1 :] == pytest.approx([expected] * 4)


@given(schedules(), st.data())
def test_a_step_depends_on_no_other(schedule: dict[str, Any], data: st.DataObject) -> None:
    lr = rates(**schedule)
    step = data.draw(st.integers(0, schedule["steps"] - 1))
    assert rates(**schedule)[step] == lr[step]


def test_cosine_is_half_a_cosine_from_the_warm_up_to_the_end() -> None:
    lr = rates(110, kind="cosine", warmup_steps=10, final_ratio=0.1)
    for into in (1, 25, 50, 75, 100):
        height = (1 + cos(pi * into / 100)) / 2
        assert lr[9 + into] == pytest.approx(PEAK * (0.1 + 0.9 * height))
    assert lr[9 + 50] == pytest.approx(PEAK * 0.55)


def test_linear_is_a_straight_line_from_the_warm_up_to_the_end() -> None:
    lr = rates(110, kind="linear", warmup_steps=10, final_ratio=0.1)
    assert lr[9 + 50] == pytest.approx(PEAK * 0.55)
    falls = [a - b for a, b in pairwise(lr[9:])]
    assert falls == pytest.approx([PEAK * 0.9 / 100] * 100)


def test_wsd_keeps_the_peak_until_its_decay() -> None:
    lr = rates(100, kind="wsd", warmup_steps=10, final_ratio=0.0, decay_fraction=0.2)
    assert lr[9:80] == [PEAK] * 71
    assert lr[80:] == pytest.approx([PEAK * (1 - n / 20) for n in range(1, 21)])


def test_constant_keeps_the_peak_for_ever() -> None:
    lr = rates(20, kind="constant", warmup_steps=4, extra=10)
    assert lr == pytest.approx([0.5, 1.0, 1.5, *[PEAK] * 27])


def test_a_warm_up_in_tokens_ends_when_they_are_trained_on() -> None:
    # 16 rows of 256 tokens are 4096 a step.
    lr = rates(kind="constant", warmup_tokens=3 * 4096)
    assert lr[:4] == pytest.approx([PEAK / 3, PEAK * 2 / 3, PEAK, PEAK])


def test_a_run_that_only_time_ends_has_a_constant_rate_after_its_warm_up() -> None:
    config = Config(
        data=DataConfig(sources={"python": PythonSource(kind="python")}),
        train=TrainConfig(max_time=60.0),
        optim=OptimConfig(lr=PEAK),
        schedule=ScheduleConfig(kind="constant", warmup_steps=2),
    )
    assert [learning_rate(config, step) for step in (0, 1, 2, 10**6)] == [1.0, 2.0, 2.0, 2.0]


# A resumed run with other settings


def run_of(**settings: Any) -> Config:
    """A run of so many steps with a peak of 2, and other settings of its schedule."""
    parts = {"train": {"max_steps": 200}, "optim": {"lr": PEAK}, "schedule": {}}
    for name, value in settings.items():
        section, _, key = name.partition("__")
        parts[section][key] = value
    return Config(
        data=DataConfig(sources={"python": PythonSource(kind="python")}),
        train=TrainConfig(**parts["train"]),
        optim=OptimConfig(**parts["optim"]),
        schedule=ScheduleConfig(**parts["schedule"]),
    )


KINDS = ["cosine", "linear", "wsd", "constant"]
CHANGES: list[dict[str, Any]] = [
    {"train__max_steps": 260},
    {"train__max_steps": 150},
    {"train__max_tokens": 190 * 2048},
    {"train__max_flops": 1e13},
    {"optim__lr": 1.0},
    {"schedule__warmup_steps": 120},
    {"schedule__warmup_fraction": 0.9, "schedule__decay_fraction": 0.05},
    {"schedule__final_ratio": 0.5},
    {"schedule__decay_fraction": 0.7},
    *({"schedule__kind": kind} for kind in KINDS),
]


@pytest.mark.parametrize("step", [1, 40, 100, 140, 200])
@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_another_course_of_the_learning_rate_is_told_and_no_other(
    kind: str, change: dict[str, Any], step: int
) -> None:
    before = run_of(schedule__kind=kind)
    now = run_of(**{"schedule__kind": kind, **change})
    told = schedule_change(before, now, step)
    ahead = range(step, now.total_steps or 0)
    differs = any(learning_rate(before, n) != learning_rate(now, n) for n in ahead)
    assert (told is not None) == differs
    if told is not None:
        assert f"Step {step} had {learning_rate(before, step - 1):.3g}." in told
        end = f"{learning_rate(now, now.total_steps - 1):.3g} at step {now.total_steps}"
        assert f"Now: {now.schedule.kind} until step {now.total_steps}, with " in told
        assert f"{learning_rate(now, step):.3g} at step {step + 1}" in told
        assert end in told
        jump = learning_rate(now, step) / learning_rate(before, step - 1)
        assert ("It rises to" in told) == (jump > 1.01 and step >= now.warmup_steps)


def test_a_cosine_that_was_at_its_end_says_how_far_it_rises() -> None:
    before = run_of(optim__lr=5e-3)
    told = schedule_change(before, run_of(optim__lr=5e-3, train__max_steps=260), 200)
    assert told == (
        "the learning rate takes another course. Step 200 had 0.0005. Before: cosine until step "
        "200, which was the end. Now: cosine until step 260, with 0.0011 at step 201, 0.0005 at "
        "step 260. It rises to 2.21 times the last one; to stay at that, choose schedule=constant "
        "optim.lr=0.0005"
    )
    stays = run_of(optim__lr=5e-4, schedule__kind="constant", train__max_steps=260)
    assert schedule_change(before, stays, 200) is None


def test_a_rate_of_zero_and_a_run_without_an_end_can_be_told() -> None:
    zero = run_of(schedule__final_ratio=0.0)
    assert "Step 200 had 0." in str(schedule_change(zero, run_of(train__max_steps=300), 200))
    timed = {"train__max_steps": None, "train__max_time": 60.0, "schedule__kind": "constant"}
    assert "constant, without a last step" in str(schedule_change(run_of(), run_of(**timed), 50))
    assert schedule_change(run_of(**timed), run_of(**timed), 10**7) is None


def test_the_schedule_of_a_checkpoint_is_read_whatever_its_version() -> None:
    now, before = run_of(), run_of(train__max_steps=90, schedule__kind="wsd", optim__lr=1.0)
    saved = before.to_dict()
    assert config_before(saved, now) == before
    del saved["train"]["max_flops"], saved["schedule"]["final_ratio"]
    saved["optim"]["of_old"] = saved["schedule"]["of_old"] = 5
    assert config_before(saved, now) == before
    saved["schedule"]["kind"] = "of_old"
    assert config_before(saved, now) is None
