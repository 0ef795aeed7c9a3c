"""The learning rate, a pure function of the step."""

from math import cos, isclose, pi
from typing import Any

from conf.errors import ConfigError
from conf.validation import keys
from train.config import Config

COMPARED = 1000
"""Steps at which the courses of two schedules are compared, besides those where they bend."""


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    optim.lr          ......----.
                 ....'           `--.
    final   .''''                    `--.
              warm-up    peak     decay

    `cosine` and `linear` decay from the end of the warm-up on, so they have no peak phase. `wsd`
    (warm-up, stable, decay; arXiv 2404.06395) decays linearly in the last `decay_fraction`.
    """
    return config.optim.lr * _warm_up(config, step) * _decay(config, step)


def _warm_up(config: Config, step: int) -> float:
    """Rises linearly to 1 at the last step of the warm-up. The first step is above 0 already."""
    return min(1.0, (step + 1) / (config.warmup_steps or 1))


def _decay(config: Config, step: int) -> float:
    """Falls from 1 to `final_ratio`, which is reached at the last step of the run."""
    total = config.total_steps
    if config.schedule.kind == "constant" or total is None or config.decay_steps == 0:
        return 1.0
    into = step + 1 - (total - config.decay_steps)
    progress = min(1.0, max(0.0, into / config.decay_steps))
    fall = (1 - cos(pi * progress)) / 2 if config.schedule.kind == "cosine" else progress
    return 1 - (1 - config.schedule.final_ratio) * fall


def schedule_change(before: Config, now: Config, step: int) -> str | None:
    """How the rest of a resumed run differs in its learning rate; None if it does not.

    What counts is the rate itself, whichever settings decide it.

    Args:
        before: the settings with which the run came to `step`.
        now: those with which it goes on.
        step: optimizer steps taken, at least 1.
    """
    total = now.total_steps
    end = step + COMPARED if total is None else total
    stride = max(1, (end - step) // COMPARED)
    steps = {*range(step, end, stride), *(n - 1 for n in (*_bends(before), *_bends(now)))}
    # `step` counts from 1, and the function of the step from 0: this is the next one.
    ahead = [n for n in steps if step <= n < end]
    if all(isclose(learning_rate(before, n), learning_rate(now, n)) for n in ahead):
        return None
    last, following = learning_rate(before, step - 1), learning_rate(now, step)
    told = (
        f"the learning rate takes another course. Step {step} had {last:.3g}. "
        f"Before: {_course(before, step)}. Now: {_course(now, step)}"
    )
    # A rise that is not that of the warm-up is seldom meant: it undoes what the decay has reached.
    if following > 1.01 * last > 0 and step >= now.warmup_steps:
        told += (
            f". It rises to {following / last:.3g} times the last one; to stay at that, choose "
            f"schedule=constant optim.lr={last:.4g}"
        )
    return told


def config_before(saved: dict[str, Any], now: Config) -> Config | None:
    """The settings `now`, but with those of a checkpoint for what decides the learning rate.

    Args:
        saved: the checkpoint's whole configuration, which may be that of an earlier version: what
            it does not know has its default. None if this version does not allow its schedule.
    """
    tree, known = now.to_dict(), set(keys(Config))
    for section in ("train", "optim", "schedule"):
        tree[section] = {k: v for k, v in saved[section].items() if f"{section}.{k}" in known}
    try:
        return Config.from_dict(tree)
    except ConfigError:
        return None


def _bends(config: Config) -> list[int]:
    """The steps, counted from 1, at which the warm-up ends, the decay begins, and the run ends."""
    total = config.total_steps
    ends = [] if total is None else [total - config.decay_steps, total]
    return [config.warmup_steps, *ends]


def _course(config: Config, step: int) -> str:
    """The learning rate after a step, in words."""
    total, kind = config.total_steps, config.schedule.kind
    course = f"{kind}, without a last step" if total is None else f"{kind} until step {total}"
    if total is not None and total <= step:
        return f"{course}, which was the end"
    steps = sorted({step + 1, *(n for n in _bends(config) if n > step)})
    rates = (f"{learning_rate(config, n - 1):.3g} at step {n}" for n in steps)
    return f"{course}, with {', '.join(rates)}"
