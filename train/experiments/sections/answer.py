"""The answer, before all else: what the variants gain over vanilla, in sentences."""

from collections.abc import Sequence
from typing import NamedTuple

from conf.wording import plural
from train.experiments.comparison import AgainstVanilla, Cost, Difference, Standing, against_vanilla
from train.experiments.document import Note, Section
from train.experiments.experiment import Experiment, Measure, sources_of
from train.experiments.tables import signed

FIRST = (Cost.TOKENS, Cost.FLOPS)

PICKED = (
    "The best of several variants was picked after the fact, which its interval does not take into "
    "account."
)

ALONE = "no finished runs of both vanilla and another variant have a loss, so no gain is known"


def answer(experiment: Experiment) -> Section:
    """What was found at equal tokens and FLOPs, then at other costs; also where vanilla wins."""
    rows = against_vanilla(experiment)
    compared = [cost for cost in Cost if differences(rows, cost)]
    if not compared:
        note = Note((f"Nothing can be compared: {ALONE}.",), "answer")
    else:
        others = [cost for cost in compared if cost not in FIRST]
        bullets = [_after_tokens(rows, cost, experiment.measure) for cost in others]
        if len(differences(rows, Cost.TOKENS)) > 1:
            bullets.append(PICKED)
        if words := _which(experiment):
            bullets.append(words)
        if experiment.not_measured:
            bullets.append(experiment.not_measured)
        first = tuple(sentence(rows, cost, experiment.measure) for cost in FIRST)
        note = Note(first, "answer", tuple(bullets))
    return Section("answer", "The answer", (note,))


def _which(experiment: Experiment) -> str:
    """What is compared, where that is not the held-out text alone; else empty."""
    source = experiment.measure.source
    if source is None:
        return f"No run has held-out losses: what is compared is the {experiment.measure.words}."
    others = {name for group in experiment.groups for name in sources_of(group)} - {source}
    if not others:
        return "" if source == "heldout" else f"All of this is of the text {source}."
    words = "the runs' own held-out text" if source == "heldout" else f"the text {source}"
    return f"All of this is of {words}, and not of {', '.join(sorted(others))}."


def _after_tokens(rows: Sequence[AgainstVanilla], cost: Cost, measure: Measure) -> str:
    """The sentence, but for one that stands there already of equal tokens."""
    words, known = (sentence(rows, each, measure) for each in (cost, Cost.TOKENS))
    if words.replace(cost.value, Cost.TOKENS.value) == known:
        return f"At equal {cost.value}, the same holds as at equal {Cost.TOKENS.value}."
    return words


class Found(NamedTuple):
    """A group, and its difference to the best vanilla of equal cost."""

    row: AgainstVanilla
    standing: Standing
    gap: Difference


def differences(rows: Sequence[AgainstVanilla], cost: Cost) -> list[Found]:
    """The groups that have a difference to vanilla at equal cost, the best one first."""
    found = [
        Found(row, standing, standing.difference)
        for row in rows
        if (standing := row.standings[cost]).difference
    ]
    return sorted(found, key=lambda each: each.gap.mean)


def sentence(rows: Sequence[AgainstVanilla], cost: Cost, measure: Measure) -> str:
    """What was found at equal cost: of one variant, and of how many vanilla is told apart."""
    found = differences(rows, cost)
    if not found:
        reasons = sorted({reason for row in rows if (reason := row.standings[cost].reason)})
        return f"At equal {cost.value}, nothing can be compared ({'; '.join(reasons)})."
    best = _head(found)
    parts = [f"At equal {cost.value}, {_told(best, found, measure)} ({_sureness(best.gap)})."]
    if best is not found[0]:
        label, by = found[0].row.group.label, _size(found[0], measure)
        gains = found[0].gap.mean < 0
        does = ("gains more" if best.gap.mean < 0 else "gains") if gains else "loses less"
        parts.append(f"{label} {does}, {by}, but that may be chance.")
    if cost == Cost.SECONDS:
        parts.append("The machine may have had other work, which makes times less sure.")
    parts.append(_count([each.gap for each in found]))
    if not best.standing.rival_at_end:
        parts.append(
            "Vanilla is taken in the middle of its schedule there, where it is worse than a run "
            "that ends there."
        )
    if best.standing.rival_with_less:
        parts.append("Vanilla is at its end there, with less than the variant was given.")
    return " ".join(filter(None, parts))


def _head(found: Sequence[Found]) -> Found:
    """The one that the sentence is of: a clear gain, else the best one.

    What is clear says more than what may be chance. So of one seed it is only where nothing is
    clear, and else the least of the clear losses.
    """
    clear = [each for each in found if each.gap.is_clear]
    if clear and (clear[0].gap.mean < 0 or found[0].gap.low is None):
        return clear[0]
    return found[0]


def _told(best: Found, found: Sequence[Found], measure: Measure) -> str:
    assert best.standing.rival
    ours, theirs, size = best.row.group.label, best.standing.rival.label, _size(best, measure)
    if not best.gap.mean:
        return f"nothing is gained: the best variant, {ours}, is exactly as good as {theirs}"
    if best.gap.low is not None and not best.gap.is_clear:
        side = "below" if best.gap.mean < 0 else "above"
        is_none = (
            "is clearly better than" if any(x.gap.is_clear for x in found) else "can be told from"
        )
        return (
            f"no variant {is_none} vanilla: the best one, {ours}, is {size} {side} "
            f"{theirs}, and the interval includes 0"
        )
    if best.gap.mean < 0:
        return f"{ours} gains {size} over {theirs}"
    verb = "wins" if best.gap.is_clear else "is ahead"
    which = "the best variant"
    if best is not found[0]:
        which += " that can be told from it"
    return f"vanilla {verb}: {theirs} is {size} below {which}, {ours}"


def _size(found: Found, measure: Measure) -> str:
    """How large a difference is, also in percent of vanilla's value."""
    gap = found.gap.mean
    percent = 100 * abs(gap) / (found.row.value.mean - gap)
    return f"{abs(gap):.3f} {measure.unit} ({percent:.1f} %)"


def _sureness(gap: Difference) -> str:
    if gap.low is None or gap.high is None:
        return "one seed, so that it may be chance"
    interval = f"95 % interval of the difference {signed(gap.low)} to {signed(gap.high)}"
    return f"{interval}, {plural(gap.seeds, 'seed')}"


def _count(gaps: Sequence[Difference]) -> str:
    """How many of several variants are better or worse than vanilla, or cannot be told from it."""
    better = sum(gap.is_clear and gap.mean < 0 for gap in gaps)
    worse = sum(gap.is_clear and gap.mean > 0 for gap in gaps)
    alone = sum(gap.low is None for gap in gaps)
    counts = {
        "better than vanilla": better,
        "worse than vanilla": worse,
        "that cannot be told from it": len(gaps) - better - worse - alone,
        "of one seed": alone,
    }
    told = [f"{number} {words}" for words, number in counts.items() if number]
    if len(gaps) == 1 or told == [f"{len(gaps)} that cannot be told from it"]:
        return ""  # has been said
    return f"Of {len(gaps)} variants: {', '.join(told)}."
