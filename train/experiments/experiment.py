"""The runs of a report, their groups, and the measure by which they are compared."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from train.experiments.groups import Group, Shared, at_shared_seeds, groups_of, same_start
from train.experiments.result import HeldoutCurve, Result, Unread
from train.experiments.spread import Spread, spread
from train.experiments.texts import same_text


@dataclass(frozen=True)
class Measure:
    """What runs are compared by; less is better.

    Attributes:
        words: its name in a sentence.
        unit: of its values.
        of: its value for a run; None if the run has none.
        source: whose held-out text it is of; None if it is the training loss.
    """

    words: str
    unit: str
    of: Callable[[Result], float | None]
    source: str | None = None

    def spread(self, group: Group) -> Spread | None:
        """Its value over the seeds of a group; None if a run has none."""
        values = [self.of(run) for run in group.runs]
        known = [value for value in values if value is not None]
        return spread(known) if len(known) == len(values) else None

    def curve(self, run: Result, along: str) -> tuple[list[float], list[float]]:
        """(places, values) of a run on its way; both are empty if it was never measured.

        Args:
            along: `tokens`, `flops` or `seconds`.
        """
        if self.source is None:
            return getattr(run.curve, along), run.curve.loss_ema
        found = run.heldout_curves.get(self.source, HeldoutCurve())
        return getattr(found, along), found.bits_per_byte


@dataclass(frozen=True)
class Experiment:
    """What the sections of a report are made from.

    Attributes:
        results: of all runs, whatever became of them.
        groups: of the finished ones, in the order of legends and tables.
        measure: held-out bits per byte of the source that most groups have; where no group has one,
            the smoothed training loss.
        unread: runs that cannot be read, of which `results` may have what they had written.
    """

    results: tuple[Result, ...]
    groups: tuple[Group, ...]
    measure: Measure
    unread: tuple[Unread, ...] = ()

    def same_text(self, one: Group, other: Group) -> bool:
        """Whether the measure of two groups is of the same text, so that they can be compared."""
        return same_text(one.runs[0], other.runs[0], self.measure.source)

    def text_of(self, run: Result) -> int:
        """A number that is equal for runs of groups whose measure is of the same text."""
        own = next(group for group in self.groups if any(one is run for one in group.runs))
        return next(n for n, group in enumerate(self.groups) if self.same_text(group, own))

    def are_alike(self, one: Group, other: Group) -> bool:
        """Whether two groups have the same text and start, so that costs can be compared.

        The tokens of a run that began with the weights of another one are not all that it has seen.
        """
        return self.same_text(one, other) and same_start(one.runs[0], other.runs[0])

    def kind_of(self, group: Group) -> int:
        """A number that is equal for groups that are alike."""
        return next(n for n, other in enumerate(self.groups) if self.are_alike(other, group))

    @property
    def comparable(self) -> tuple[Group, ...]:
        """The groups of the text and the start that most groups have."""
        kinds = [self.kind_of(group) for group in self.groups]
        usual = max(kinds, key=kinds.count, default=None)
        return tuple(g for g, kind in zip(self.groups, kinds, strict=True) if kind == usual)

    @property
    def not_alike(self) -> str:
        """Sentences that name the groups that are not `comparable`; empty if there is none."""
        usual = self.comparable
        of_text = [g.label for g in self.groups if not self.same_text(g, usual[0])]
        first = usual[0].runs[0] if usual else None
        of_start = [g.label for g in self.groups if first and not same_start(g.runs[0], first)]
        heads = {
            "Measured on another text than most": of_text,
            "Began with other weights than most": of_start,
        }
        return " ".join(f"{head}: {', '.join(left)}." for head, left in heads.items() if left)

    @property
    def not_measured(self) -> str:
        """A sentence that names the groups that lack the measure; empty if all have it."""
        left = [group.label for group in self.groups if not self.measure.spread(group)]
        told = f"Without {self.measure.words}, and so in no comparison: {', '.join(left)}."
        return told if left else ""

    @property
    def not_of_one_length(self) -> str:
        """Sentences that name the groups whose runs have other tokens, or stopped early."""
        unlike = [g for g in self.groups if not g.is_of_one_length]
        short = [g.label for g in self.groups if not all(run.at_end for run in g.runs)]
        told = [
            f"Runs of {g.label} have {g.length} tokens, and stand at their mean." for g in unlike
        ]
        if short:
            told.append(f"Ended before their schedule, for want of text: {', '.join(short)}.")
        return " ".join(told)

    @property
    def of_trunks(self) -> str:
        """A sentence that names the groups whose runs share steps with others; else empty."""
        found = [g.label for g in self.groups if all(run.trunk for run in g.runs)]
        if not found:
            return ""
        told = "Decays, which share the steps of their trunk with its other decays"
        return f"{told}: {', '.join(found)}."

    def at_shared_seeds(self) -> Shared:
        """The groups with the runs of the seeds that all that can be compared have."""
        usual = [group for group in self.comparable if self.measure.spread(group)]
        if not usual:
            return Shared(self.groups, (), "")
        shared = at_shared_seeds(usual)
        cut = {group.key: group for group in shared.groups}
        return shared._replace(groups=tuple(cut.get(g.key, g) for g in self.groups))

    def vanilla_of(self, group: Group) -> Group | None:
        """The vanilla of a group's size, text and start, of the nearest parameters, then tokens."""
        found = [
            g
            for g in self.groups
            if g.model == "vanilla" and g.runs[0].size == group.runs[0].size
            if self.are_alike(g, group)
        ]

        def distance(other: Group) -> tuple[int, int]:
            ours, theirs = group.runs[0], other.runs[0]
            return abs(theirs.parameters - ours.parameters), abs(theirs.tokens - ours.tokens)

        return min(found, key=distance, default=None)


def experiment_of(results: Sequence[Result], unread: Sequence[Unread] = ()) -> Experiment:
    """The experiment that some runs are."""
    groups = tuple(groups_of(results))
    return Experiment(tuple(results), groups, _measure(groups), tuple(unread))


def _measure(groups: Sequence[Group]) -> Measure:
    having = Counter(name for group in groups for name in sources_of(group))
    if not having:
        return Measure("smoothed training loss", "nats per token", lambda run: run.loss_ema)
    # The text of the run itself, where it was evaluated on further files as well.
    name = min(having, key=lambda name: (-having[name], name != "heldout", name))
    where = "held-out" if name == "heldout" else name
    return Measure(
        f"{where} bits per byte",
        "bits per byte",
        lambda run: run.heldout[name].bits_per_byte.value if name in run.heldout else None,
        name,
    )


def sources_of(group: Group) -> set[str]:
    """The sources that all runs of a group were evaluated on."""
    return set.intersection(*(set(run.heldout) for run in group.runs))
