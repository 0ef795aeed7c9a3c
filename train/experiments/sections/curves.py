"""Losses over tokens, over training FLOPs and over time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from conf.wording import plural
from train.experiments import drawings
from train.experiments.charts import Chart, Panel
from train.experiments.document import Block, Section, missing
from train.experiments.drawings import Axis, power
from train.experiments.experiment import Experiment
from train.experiments.groups import Group, legend, source_of_groups
from train.experiments.result import Curve, HeldoutCurve

LOSS = Axis("loss (nats per token)")
BITS = Axis("bits per byte")


class Budget(NamedTuple):
    """What a loss is drawn over."""

    name: str
    words: str
    axis: Axis
    of: Callable[[Curve | HeldoutCurve], Sequence[float]]


# Over the seeds of a group


@dataclass(frozen=True)
class Seeds:
    """The curves of the runs of a group, at the steps of the shortest one."""

    group: Group
    curves: Sequence[Curve | HeldoutCurve]

    def values(self, of: Callable[[Curve | HeldoutCurve], Sequence[float]]) -> list[list[float]]:
        """For each seed the values at the steps of the shortest curve.

        Usually all seeds have the same steps. A run that was interrupted may have others, between
        which its curve is a straight line.
        """
        steps = min((curve.step for curve in self.curves), key=len)
        return [np.interp(steps, curve.step, of(curve)).tolist() for curve in self.curves]

    def curve(self, budget: Budget, smooth: str, raw: str | None = None) -> drawings.Curve:
        """The mean over the seeds, with their range, and the raw values of each."""
        xs = _means(self.values(budget.of))
        ys = self.values(lambda curve: getattr(curve, smooth))
        several = len(ys) > 1
        return drawings.Curve(
            self.group.style,
            xs,
            _means(ys),
            [min(at) for at in zip(*ys, strict=True)] if several else None,
            [max(at) for at in zip(*ys, strict=True)] if several else None,
            [(budget.of(curve), getattr(curve, raw)) for curve in self.curves] if raw else [],
        )


def _means(values: Sequence[Sequence[float]]) -> list[float]:
    return [sum(at) / len(at) for at in zip(*values, strict=True)]


def _budgets(found: Sequence[Seeds]) -> list[Budget]:
    longest = max(curve.seconds[-1] for seeds in found for curve in seeds.curves)
    size, unit = next(
        (s, u)
        for s, u in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
        if longest >= 2 * s or s == 1
    )
    return [
        Budget("tokens", "tokens", Axis("tokens", drawings.tokens), lambda curve: curve.tokens),
        Budget("flops", "training FLOPs", Axis("training FLOPs", power), lambda curve: curve.flops),
        Budget(
            "time",
            "the time of training",
            Axis(f"time of training ({unit})"),
            lambda curve: [seconds / size for seconds in curve.seconds],
        ),
    ]


# Charts


def curves(experiment: Experiment) -> Section:
    """The training loss, smoothed above raw, and the held-out bits per byte."""
    groups = experiment.groups
    blocks: list[Block] = []
    if with_loss := [group for group in groups if all(run.curve.step for run in group.runs)]:
        blocks.append(_training(with_loss))
    sources = sorted(
        {name for group in groups for run in group.runs for name in run.heldout_curves}
    )
    for name in sources:
        measured = [
            group
            for group in groups
            if all(
                name in run.heldout_curves and run.heldout_curves[name].step for run in group.runs
            )
        ]
        if measured:
            blocks.append(_heldout(measured, name, alone=len(sources) == 1))
    if not sources:
        words = "No run was evaluated on held-out text while it trained: eval.every sets how often."
        blocks.append(missing(words))
    return Section("curves", "The loss over the run", tuple(blocks))


def _training(groups: Sequence[Group]) -> Chart:
    found = [Seeds(group, [run.curve for run in group.runs]) for group in groups]
    panels = _panels(found, "training loss", LOSS, "loss_ema", "loss")
    return Chart(
        "training-loss",
        "Training loss: moving average (0.99 a step) above the loss of each logged step",
        panels,
        source_of_groups(groups),
        legend(groups),
        _note(groups) + " The learning rate falls to the end of a run, so a run that is shorter is "
        "not the beginning of a longer one.",
    )


def _heldout(groups: Sequence[Group], name: str, *, alone: bool) -> Chart:
    found = [Seeds(group, [run.heldout_curves[name] for run in group.runs]) for group in groups]
    panels = _panels(found, "bits per byte", BITS, "bits_per_byte")
    return Chart(
        "heldout-bits" if alone else f"heldout-bits-{slug(name)}",
        "Held-out bits per byte" if alone else f"Held-out bits per byte of {name}",
        panels,
        source_of_groups(groups),
        legend(groups),
        _note(groups),
    )


def _panels(
    found: Sequence[Seeds], what: str, y: Axis, smooth: str, raw: str | None = None
) -> tuple[Panel, ...]:
    """A panel for each budget, all with one range of losses."""
    panels = []
    for budget in _budgets(found):
        lines = [seeds.curve(budget, smooth, raw) for seeds in found]
        ends = [line.y[-1] for line in lines]
        alt = (
            f"The {what} of {plural(len(lines), 'group')} of runs over {budget.words}; "
            f"at the end it is {min(ends):.3f} to {max(ends):.3f}."
        )
        y_range = drawings.after_the_start(lines)
        draw = partial(drawings.draw_curves, curves=lines, x=budget.axis, y=y, y_range=y_range)
        panels.append(Panel(budget.name, alt, draw))
    return tuple(panels)


def _note(groups: Sequence[Group]) -> str:
    several = any(len(group.runs) > 1 for group in groups)
    one = any(len(group.runs) == 1 for group in groups)
    seeds = ""
    if several:
        seeds = "A line is the mean over the seeds; its band is from the lowest to the highest. "
    if one:
        seeds += "Where there is one seed, the line is that run's. "
    if len({tuple(run.seed for run in group.runs) for group in groups}) > 1:
        seeds += (
            "Not all groups have the same seeds, and some seeds are easier than others, so that "
            "lines of different seeds do not tell which group is better. "
        )
    start = "The start of the runs, where all losses fall from that of a random model, is cut off."
    return seeds + start


def slug(words: str) -> str:
    """A name for files and anchors: lower case letters, digits and hyphens.

    >>> slug("data/Held out.jsonl")
    'data-held-out-jsonl'
    """
    return "-".join(
        "".join(c if c.isascii() and c.isalnum() else " " for c in words).split()
    ).lower()
