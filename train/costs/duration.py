"""How long a run takes: its FLOPs over a speed that was given, measured or assumed."""

from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from conf.errors import ConfigError, Problem
from conf.wording import plural
from train.metrics.lines import lines_of

PER_DEVICE, MFU = "throughput/tokens_per_s_per_device", "throughput/mfu"
FLOPS, TOKENS = "progress/train_flops", "progress/tokens"

ASSUMED_MFU, ASSUMED_MFU_COMPILED = 0.30, 0.40
"""Of a training step of the size 1b2 on an H200, before attention and the loss had kernels of their
own: 0.30 uncompiled, 0.42 to 0.45 compiled."""


class Speed(NamedTuple):
    """What one device does in training.

    Attributes:
        flops_per_s: training FLOPs in a second.
        mfu: that over the device's bf16 peak; None if the peak is not known.
        basis: where it is from, in words.
    """

    flops_per_s: float
    mfu: float | None
    basis: str


class Measured(NamedTuple):
    """Medians over the lines of an earlier run's `metrics.jsonl`, each None where it has none.

    Attributes:
        flops_per_s: of one device.
        mfu: as the run has logged it.
        lines: how many there were.
    """

    flops_per_s: float | None
    mfu: float | None
    lines: int


def find_speed(
    *,
    peak: float | None,
    mfu: float | None,
    run: str | None,
    own: Path,
    compiled: bool,
    uncounted: float = 0.0,
) -> Speed | None:
    """The speed of a device; None if nothing is known of it.

    Args:
        peak: of the device in FLOP/s; None if it is not known.
        mfu: as the user gives it.
        run: the directory of an earlier run to take it from, as the user gives it.
        own: the directory of the planned run, whose earlier part is taken if nothing is given.
        compiled: whether blocks are compiled.
        uncounted: FLOPs of a device that an MFU does not count, for each that it does; a speed that
            is given or measured has them in it.

    Raises:
        ConfigError: the given run has measured no speed that fits this device.
    """
    if mfu is not None:
        if peak is None:
            hint = "name a device of which it is, or give measured=RUN"
            raise ConfigError([Problem("mfu", mfu, "this device's peak is not known", hint)])
        return Speed(mfu * peak, mfu, f"an MFU of {mfu:.0%}, as given")
    directory = own if run is None else Path(run).expanduser()
    found = measure(directory / "metrics.jsonl")
    if run is not None and found is None:
        expected = "has no metrics.jsonl with a speed in it"
        raise ConfigError([Problem("measured", run, expected, "give the directory of a run")])
    if found is not None:
        where = f"measured in {directory} ({plural(found.lines, 'line')})"
        if peak is not None and found.mfu is not None:
            return Speed(found.mfu * peak, found.mfu, f"an MFU of {found.mfu:.1%}, {where}")
        if peak is None and found.flops_per_s is not None:
            return Speed(found.flops_per_s, None, f"{found.flops_per_s:.2e} FLOP/s, {where}")
        if run is not None:
            expected = "has logged no throughput/mfu: its device's peak was not known"
            raise ConfigError([Problem("measured", run, expected, "give mfu=, such as mfu=0.3")])
    if peak is None:
        return None
    assumed = (ASSUMED_MFU_COMPILED if compiled else ASSUMED_MFU) / (1 + uncounted)
    return Speed(assumed * peak, assumed, f"an assumed MFU of {assumed:.0%}")


def measure(metrics: Path) -> Measured | None:
    """The speed that a run has logged; None if there is none.

    The first line is left out where there are others: it has the time of compiling in it.
    """
    try:
        text = metrics.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = [line for line in lines_of(text) if _has_speed(line)]
    # FLOPs of a token are what they have grown by since the line before.
    start = {FLOPS: 0.0, TOKENS: 0}
    pairs = [*pairwise([start, *lines])]
    speeds = [
        line[PER_DEVICE] * (line[FLOPS] - before[FLOPS]) / (line[TOKENS] - before[TOKENS])
        for before, line in pairs[1:] or pairs
        if line[TOKENS] > before[TOKENS] and line[FLOPS] > before[FLOPS]
    ]
    mfus = [line[MFU] for line in lines[1:] or lines if _is_above_zero(line.get(MFU))]
    if not speeds:
        return None
    return Measured(median(speeds), median(mfus) if mfus else None, len(speeds))


def _has_speed(line: dict[str, Any]) -> bool:
    return all(_is_above_zero(line.get(key)) for key in (PER_DEVICE, FLOPS, TOKENS))


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < inf
