"""The curves of a run, from the lines of its `metrics.jsonl`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from train.experiments.result import EVAL, Curve, HeldoutCurve
from train.metrics.lines import lines_of

EMA_DECAY = 0.99
"""Per step, as arXiv 2504.14992 smooths its losses."""

MOST_POINTS = 1000
"""Points of a curve; a chart shows no more, and a ledger of many runs is read at once."""

BITS = "/bits_per_byte"

Line = Mapping[str, Any]


class Progress(NamedTuple):
    """How far a run had come at the steps that were logged; arrays of one length."""

    step: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray

    def at(self, steps: Sequence[int]) -> tuple[list[int], list[float], list[float]]:
        """(tokens, FLOPs, seconds) at other steps, on the straight lines between."""
        tokens, flops, seconds = (
            np.interp(steps, [0, *self.step], [0, *values])
            for values in (self.tokens, self.flops, self.seconds)
        )
        return np.rint(tokens).astype(int).tolist(), flops.tolist(), seconds.tolist()


def read_lines(path: Path) -> list[Line]:
    """The lines of a `metrics.jsonl`, one for each step, in the order of steps.

    A run that was resumed goes back to its checkpoint, and takes the steps since then again: the
    later lines count. What was measured of a step afterwards is joined to its line, which keeps its
    time.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines: dict[int, dict[str, Any]] = {}
    newest = 0
    for line in lines_of(text):
        step = line["step"]
        if "train/loss" in line:
            if step <= newest:
                lines = {earlier: lines[earlier] for earlier in lines if earlier < step}
            newest = step
        taken = {"time": lines[step]["time"]} if "time" in lines.get(step, {}) else {}
        lines[step] = lines.get(step, {}) | line | taken
    return [lines[step] for step in sorted(lines)]


def progress_of(lines: Iterable[Line], tokens_per_step: int, flops_per_step: float) -> Progress:
    """Tokens, FLOPs and seconds at the logged steps; the latter two grow from line to line.

    A line tells the seconds of a step since the line before it. A resumed run does so since its
    checkpoint, which may be later than that line; what lies between is taken to be as fast.

    Args:
        lines: of training.
        tokens_per_step, flops_per_step: what a step counts where a line does not tell.
    """
    steps, tokens, flops, seconds = [], [], [], []
    before, total = 0, 0.0
    for line in lines:
        step = line["step"]
        total += (line.get("throughput/step_s") or 0.0) * (step - before)
        steps.append(step)
        tokens.append(line.get("progress/tokens", step * tokens_per_step))
        flops.append(line.get("progress/train_flops", step * flops_per_step))
        seconds.append(total)
        before = step
    return Progress(*map(np.array, (steps, tokens, flops, seconds)))


def curve_of(lines: Sequence[Line], progress: Progress) -> Curve:
    """The losses at the logged steps, of which at most `MOST_POINTS` are kept; NaN is left out."""
    known = [i for i, line in enumerate(lines) if line["train/loss"] is not None]
    losses = [float(lines[i]["train/loss"]) for i in known]
    smooth = smoothed([int(progress.step[i]) for i in known], losses)
    kept = thinned(len(known))
    at = [known[i] for i in kept]
    return Curve(
        step=[int(progress.step[i]) for i in at],
        tokens=[int(progress.tokens[i]) for i in at],
        flops=[float(progress.flops[i]) for i in at],
        seconds=[float(progress.seconds[i]) for i in at],
        loss=[losses[i] for i in kept],
        loss_ema=[smooth[i] for i in kept],
    )


def smoothed(steps: Sequence[int], losses: Sequence[float]) -> list[float]:
    """The exponential moving average of losses that were logged every so many steps.

    A loss stands for all steps since the one logged before it. So with d = `EMA_DECAY`, after a
    gap of n steps,

        s <- d^n s + (1 - d^n) loss        w <- d^n w + (1 - d^n)        average = s / w

    from s = w = 0: the first loss is worth no more than any other.

    >>> round(smoothed([1, 2], [4.0, 2.0])[-1], 3)
    2.995
    >>> [round(smoothed(*x)[-1], 3) for x in (([2, 4], [4, 2]), ([1, 2, 3, 4], [4, 4, 2, 2]))]
    [2.99, 2.99]
    """
    average = weight = 0.0
    before, found = 0, []
    for step, loss in zip(steps, losses, strict=True):
        decay = EMA_DECAY ** (step - before)
        average = decay * average + (1 - decay) * loss
        weight = decay * weight + (1 - decay)
        found.append(average / weight)
        before = step
    return found


def thinned(count: int) -> list[int]:
    """Which of so many points are kept: evenly, with the first and the last."""
    if count <= MOST_POINTS:
        return list(range(count))
    return np.linspace(0, count - 1, MOST_POINTS).round().astype(int).tolist()


def bits_by_source(line: Line) -> dict[str, float]:
    """The held-out bits per byte that a line tells, by source.

    A hook of the user's may log a key of this name, but without the loss it is no evaluation.
    """
    found = {}
    for key, value in line.items():
        if key.startswith(EVAL) and key.endswith(BITS) and value is not None:
            source = key.removeprefix(EVAL).removesuffix(BITS)
            if line.get(f"{EVAL}{source}/loss") is not None:
                found[source] = value
    return found


def heldout_curves(lines: Iterable[Line], progress: Progress) -> dict[str, HeldoutCurve]:
    """Bits per byte at the steps that were evaluated, by source."""
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        for source, bits_per_byte in bits_by_source(line).items():
            points.setdefault(source, {})[line["step"]] = bits_per_byte
    curves = {}
    for source, bits in points.items():
        kept = [list(bits)[i] for i in thinned(len(bits))]
        tokens, flops, seconds = progress.at(kept)
        curves[source] = HeldoutCurve(
            step=kept,
            tokens=tokens,
            flops=flops,
            seconds=seconds,
            bits_per_byte=[bits[step] for step in kept],
        )
    return curves


def median_of(lines: Iterable[Line], key: str) -> float | None:
    """The median of a metric over the lines that have it; None if none has."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return median(values) if values else None
