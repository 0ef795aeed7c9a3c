"""Comparisons of the groups of an experiment with vanilla, at the end and at equal cost.

    final_table       the end of each group, and its difference to one vanilla group
    side_by_side      all groups at the same tokens, training FLOPs, time, decode latency, KV bytes
    against_vanilla   each group at its end, beside the best vanilla that was given as much

A run that did not come as far as a comparison asks for is told as not having reached it; no curve
is continued. Between two evaluations a curve is a straight line. In the middle of its schedule a
run is worse than one whose schedule ends there, because its learning rate is still high; a standing
says whether it is at the end (`at_end`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import sqrt
from statistics import fmean, variance
from typing import Any

import numpy as np
from scipy.stats import t

from train.experiments.experiment import Experiment
from train.experiments.groups import Group
from train.experiments.result import Result
from train.experiments.source import seeds_in_words
from train.experiments.spread import LEVEL, Spread, spread

VANILLA = "vanilla"

ALIKE = 0.01
"""Amounts that differ by less count as equal: a run has whole steps, so runs of one budget end a
little apart, and a window adds less than this to the KV cache of a usual context."""

ALIKE_S = 0.15
"""The same of times of training. Runs that compute the same were seen to differ by as much on a
machine that does other work as well, which no run can tell."""

ALIKE_MS = 0.05
"""The same of decode latencies, which are medians of many measurements."""

Values = tuple[tuple[int, float], ...]
"""(seed, value) of each run of a group."""


class Cost(StrEnum):
    """What comparisons hold equal.

    Attributes:
        TOKENS, FLOPS, SECONDS: of training; a run has less of them on its way.
        DECODE_MS, KV_BYTES: of the model at inference.
    """

    TOKENS = "tokens"
    FLOPS = "training FLOPs"
    SECONDS = "time of training"
    DECODE_MS = "decode latency"
    KV_BYTES = "KV bytes"

    @property
    def of_training(self) -> bool:
        return self in (Cost.TOKENS, Cost.FLOPS, Cost.SECONDS)

    @property
    def alike(self) -> float:
        """The part of an amount by which equal amounts may differ."""
        return {Cost.SECONDS: ALIKE_S, Cost.DECODE_MS: ALIKE_MS}.get(self, ALIKE)


class Lack(StrEnum):
    """Why a group has no value in a comparison."""

    NOT_REACHED = "not reached"
    NOT_EVALUATED = "not evaluated so early"
    NOT_MEASURED = "not measured"
    OVER = "costs more"
    OTHER_DEVICE = "trained on another device, or in another way"
    OTHER_TEXT = "measured on another text"
    OTHER_START = "began with other weights"
    NO_VANILLA = "no vanilla run"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A group's mean minus another's.

    Attributes:
        mean: negative where the group is better.
        low, high: the 95 % confidence interval by Student's t; None where it is of one seed.
        seeds: pairs of runs, or runs of the group with fewer.
        paired: whether it is the mean over pairs of equal seeds, which saw the same text in the
            same order; else Welch's interval of two independent groups.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    paired: bool

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class FinalRow:
    """A group at its end.

    Attributes:
        value: of the experiment's measure; None if a run has none.
        at_shared: the same of the seeds that all groups have, see `Experiment.at_shared_seeds`.
        text_error: its standard error over the held-out documents, the mean over the seeds; None if
            it was not measured. All groups are evaluated on the same documents, so that it tells
            how far the value is that of the text at large, not how sure a difference is.
        base: the vanilla group that it is compared with; None if there is none, or it is that.
        difference: to `base`.
    """

    group: Group
    value: Spread | None
    at_shared: Spread | None
    text_error: float | None
    base: Group | None
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A group in a comparison at equal cost.

    Attributes:
        value: None where there is none; `lack` says why.
        lack: of the group's value, or of a vanilla model to compare it with.
        vanilla_lacks: whether it is vanilla's.
        at_end: whether the value is that of the runs' ends, and not of the middle of their
            schedules.
        rival: the vanilla group that does best beside this one; None if there is none, or if this
            is the best vanilla itself.
        difference: to `rival`.
        rival_at_end: `at_end` of the rival.
        rival_with_less: whether the rival ended with less of the cost than this group.
    """

    value: Spread | None = None
    lack: Lack | None = None
    vanilla_lacks: bool = False
    at_end: bool = True
    rival: Group | None = None
    difference: Difference | None = None
    rival_at_end: bool = True
    rival_with_less: bool = False

    @property
    def reason(self) -> str:
        """Why there is no difference to vanilla; empty if there is one."""
        return f"{'vanilla: ' * self.vanilla_lacks}{self.lack or ''}"


@dataclass(frozen=True, kw_only=True)
class EqualCost:
    """All groups at the same amount of a cost.

    Attributes:
        amount: in tokens, FLOPs, seconds, ms, bytes; None where no amount can be compared, and
            `lack` says why.
        setting: of a latency: device, dtype, context and batch; else empty.
        standings: by the group's key.
    """

    cost: Cost
    amount: float | None
    lack: Lack | None = None
    setting: str = ""
    standings: Mapping[str, Standing] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AgainstVanilla:
    """A group that is not vanilla at its end, beside vanilla at equal cost.

    Attributes:
        value: at its end.
        standings: by cost; the rival is the best vanilla that was given as much.
    """

    group: Group
    value: Spread
    standings: Mapping[Cost, Standing]


# The end


def final_table(experiment: Experiment) -> list[FinalRow]:
    """Each group at its end, in the order of the experiment's groups."""
    rows = []
    cut = experiment.at_shared_seeds().groups
    for group, at_shared in zip(experiment.groups, cut, strict=True):
        base, values = base_of(experiment, group), _ends(experiment, group)
        theirs = _ends(experiment, base) if base else ()
        rows.append(
            FinalRow(
                group=group,
                value=_spread(values),
                at_shared=_spread(_ends(experiment, at_shared)),
                text_error=_text_error(experiment, group),
                base=base,
                difference=difference(values, theirs) if values and theirs else None,
            )
        )
    return rows


def notes_at_end(experiment: Experiment) -> list[str]:
    """What has to be known beside `final_table`: which seeds, and what cannot be compared."""
    shared = experiment.at_shared_seeds()
    told = shared.note
    if shared.note and shared.seeds:
        told = f"All groups that can be compared have {seeds_in_words(shared.seeds)}; other seeds "
        told += "may be easier or harder."
    lengths = (experiment.not_of_one_length, experiment.of_trunks)
    notes = (experiment.not_alike, experiment.not_measured, *lengths, told)
    return [note for note in notes if note]


def base_of(experiment: Experiment, group: Group) -> Group | None:
    """The vanilla group that a group is compared with at its end; None for that group itself.

    That is the vanilla group of its size whose number of tokens is nearest. Vanilla with more
    tokens or of another size is compared with the vanilla of all others, if these are of one size.
    """
    if group.model != VANILLA:
        return experiment.vanilla_of(group)
    others = [other for other in experiment.groups if other.model != VANILLA]
    bases = {base.key: base for other in others if (base := experiment.vanilla_of(other))}
    base = next(iter(bases.values())) if len(bases) == 1 else None
    return base if base is not None and base.key != group.key else None


def difference(ours: Values, theirs: Values) -> Difference:
    """The mean of one group minus that of another, each of at least one run.

    >>> found = difference(((0, 1.0), (1, 2.0)), ((0, 1.5), (1, 2.7)))
    >>> round(found.mean, 2), round(found.low, 2), round(found.high, 2), found.paired
    (-0.6, -1.87, 0.67, True)
    """
    of_seed = dict(theirs)
    pairs = [value - of_seed[seed] for seed, value in ours if seed in of_seed]
    # A seed that only one group has may be an easier one: one pair says more than the two means.
    if len(pairs) > 1 or (pairs and min(len(ours), len(theirs)) == 1):
        found = spread(pairs)
        low, high = found.low, found.high
        return Difference(mean=found.mean, low=low, high=high, seeds=found.seeds, paired=True)
    a, b = ([value for _, value in values] for values in (ours, theirs))
    mean, seeds = fmean(a) - fmean(b), min(len(a), len(b))
    half = _welch(a, b) if seeds > 1 else None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Difference(mean=mean, low=low, high=high, seeds=seeds, paired=False)


def _welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Half of Welch's confidence interval of the difference of two means."""
    parts = [variance(values) / len(values) for values in (a, b)]
    if not any(parts):
        return 0.0
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True)
    )
    return float(t.ppf(0.5 + LEVEL / 2, freedom)) * sqrt(sum(parts))


def _ends(experiment: Experiment, group: Group) -> Values:
    """The measure at the end of each run; empty if one has none."""
    found = [(run.seed, experiment.measure.of(run)) for run in group.runs]
    known = tuple((seed, value) for seed, value in found if value is not None)
    return known if len(known) == len(found) else ()


def _spread(values: Values) -> Spread | None:
    return spread([value for _, value in values]) if values else None


def _text_error(experiment: Experiment, group: Group) -> float | None:
    source = experiment.measure.source
    if source is None:
        return None
    texts = [run.heldout[source] for run in group.runs if source in run.heldout]
    found = [text.bits_per_byte.standard_error for text in texts]
    known = [error for error in found if error is not None]
    return fmean(known) if len(known) == len(group.runs) else None


# At equal cost


def side_by_side(experiment: Experiment) -> list[EqualCost]:
    """All groups at the same amount of each cost.

    Of tokens, FLOPs and time the amount is the greatest that both a vanilla group and another one
    have reached. Of latency and KV bytes it is the least that both a vanilla group and another one
    keep to, and the values are those at equal tokens.
    """
    return [_equal_cost(experiment, cost) for cost in Cost]


def _equal_cost(experiment: Experiment, cost: Cost) -> EqualCost:
    setting = decode_setting(experiment.comparable) if cost == Cost.DECODE_MS else None
    comparable = experiment.comparable
    amounts = {g.key: _amount(g, cost, setting) for g in comparable}
    if cost == Cost.KV_BYTES:
        usual = kv_setting(comparable)
        amounts = {g.key: amounts[g.key] if kv_setting([g]) == usual else None for g in comparable}
    amount, lack = _common_amount(comparable, amounts, cost)
    if amount is None:
        return EqualCost(cost=cost, amount=None, lack=lack)
    tokens = {g.key: _amount(g, Cost.TOKENS, None) for g in comparable}
    at_tokens, _ = _common_amount(comparable, tokens, Cost.TOKENS)
    assert at_tokens is not None  # there is vanilla and another
    found = {g.key: _Found(lack=_unlike(experiment, g, comparable[0])) for g in experiment.groups}
    for group in comparable:
        own = amounts[group.key]
        if cost.of_training:
            found[group.key] = _values_at(experiment, group, cost, amount)
        elif own is None:
            found[group.key] = _Found(lack=Lack.NOT_MEASURED)
        elif own > amount * (1 + cost.alike):
            found[group.key] = _Found(lack=Lack.OVER)
        else:
            found[group.key] = _values_at(experiment, group, Cost.TOKENS, at_tokens)
    standings = {
        group.key: _standing(found[group.key], group, experiment.groups, found)
        for group in experiment.groups
    }
    told = "" if setting is None else _in_words(setting)
    return EqualCost(cost=cost, amount=amount, setting=told, standings=standings)


def against_vanilla(experiment: Experiment) -> list[AgainstVanilla]:
    """Each group but vanilla at its end, beside the best vanilla that was given as much of a cost.

    At equal tokens that is vanilla with as many parameters, embeddings aside: tables for the copies
    are more of these. At equal FLOPs or time it may have any size. At equal latency or KV bytes it
    may be any vanilla that costs no more, at equal tokens.

    Vanilla that ended with less takes part with its end, since more would only have made it better.
    A variant that loses to it loses at equal cost as well; one that wins only over such vanilla has
    not been compared.
    """
    rows = []
    for group in experiment.groups:
        if group.model == VANILLA or not (values := _ends(experiment, group)):
            continue
        ours = _Found(values=values, at_end=_at_end(group))
        standings = {cost: _beside_vanilla(experiment, group, cost, ours) for cost in Cost}
        own = spread([value for _, value in values])
        rows.append(AgainstVanilla(group=group, value=own, standings=standings))
    return rows


def _beside_vanilla(experiment: Experiment, group: Group, cost: Cost, ours: "_Found") -> Standing:
    """A group at its end, and the best vanilla that was given as much of a cost."""
    vanilla = [other for other in experiment.groups if other.model == VANILLA]
    setting = decode_setting([group, *vanilla]) if cost == Cost.DECODE_MS else None
    amount = _amount(group, cost, setting)
    if amount is None:
        return Standing(value=_spread(ours.values), lack=Lack.NOT_MEASURED)
    tokens = _amount(group, Cost.TOKENS, None)
    assert tokens is not None
    found: dict[str, _Found] = {}
    for other in vanilla:
        if cost == Cost.TOKENS and not _as_large(other, group):
            continue
        if unlike := _unlike(experiment, other, group):
            found[other.key] = _Found(lack=unlike)
            continue
        if cost.of_training:
            found[other.key] = _values_at(experiment, other, cost, amount, like=group)
            continue
        theirs = _amount(other, cost, setting)
        if theirs is None or (cost == Cost.KV_BYTES and kv_setting([other]) != kv_setting([group])):
            found[other.key] = _Found(lack=Lack.NOT_MEASURED)
        elif theirs > amount * (1 + cost.alike):
            found[other.key] = _Found(lack=Lack.OVER)
        else:
            found[other.key] = _values_at(experiment, other, Cost.TOKENS, tokens)
    ended = {key for key, each in found.items() if each.lack == Lack.NOT_REACHED}
    with_less = {
        other.key: _Found(_ends(experiment, other), _at_end(other), with_less=True)
        for other in vanilla
        if other.key in ended
    }
    standing = _standing(ours, group, vanilla, found | with_less)
    if (gap := standing.difference) and (gap.mean > 0 or any(x.values for x in found.values())):
        return standing
    lacks = [each.lack for each in found.values() if each.lack]
    if not lacks:
        return Standing(value=_spread(ours.values), lack=Lack.NO_VANILLA)
    return Standing(value=_spread(ours.values), lack=lacks[0], vanilla_lacks=True)


def _unlike(experiment: Experiment, one: Group, other: Group) -> Lack | None:
    """Why two groups cannot be compared at all; None if they can."""
    if experiment.are_alike(one, other):
        return None
    return Lack.OTHER_START if experiment.same_text(one, other) else Lack.OTHER_TEXT


@dataclass(frozen=True)
class _Found:
    """The values of a group at some amount of a cost, or why there are none."""

    values: Values = ()
    at_end: bool = True
    lack: Lack | None = None
    with_less: bool = False


def _standing(
    ours: _Found, group: Group, groups: Iterable[Group], found: Mapping[str, _Found]
) -> Standing:
    """The standing of a group beside the vanilla group that does best beside it."""
    alone = Standing(value=_spread(ours.values), lack=ours.lack, at_end=ours.at_end)
    if not ours.values:
        return alone
    rivals = [
        (rival, theirs, difference(ours.values, theirs.values))
        for rival in groups
        if rival.model == VANILLA and rival.key != group.key
        if (theirs := found.get(rival.key, _Found())).values
    ]
    if group.model == VANILLA:
        rivals = [each for each in rivals if each[2].mean > 0]
    if not rivals:
        return alone
    rival, theirs, found_difference = max(rivals, key=lambda each: each[2].mean)
    return replace(
        alone,
        rival=rival,
        difference=found_difference,
        rival_at_end=theirs.at_end,
        rival_with_less=theirs.with_less,
    )


def _common_amount(
    groups: Sequence[Group], amounts: Mapping[str, float | None], cost: Cost
) -> tuple[float | None, Lack | None]:
    """The amount at which all groups are compared; else why there is none."""
    sides: list[list[float]] = [[], []]
    for group in groups:
        if (amount := amounts[group.key]) is not None:
            sides[group.model == VANILLA].append(amount)
    others, vanilla = sides
    if not others or not vanilla:
        measured = cost != Cost.DECODE_MS or all(amounts.values())
        return None, Lack.NO_VANILLA if measured else Lack.NOT_MEASURED
    if cost.of_training:
        return min(max(others), max(vanilla)), None
    return max(min(others), min(vanilla)), None


def _values_at(
    experiment: Experiment, group: Group, cost: Cost, amount: float, like: Group | None = None
) -> _Found:
    """The measure of each run of a group at some amount of a cost of training.

    Args:
        like: a group whose time is compared; None: the groups of the experiment, all of which are
            then taken to have trained on the first one's device.
    """
    like = like or experiment.comparable[0]
    if cost == Cost.SECONDS and len(_trained_on(group) | _trained_on(like)) > 1:
        return _Found(lack=Lack.OTHER_DEVICE)
    ends = _ends(experiment, group)
    if not ends:
        return _Found(lack=Lack.NOT_MEASURED)
    # Runs of one group take the same tokens and FLOPs. Of times the mean counts, so that a run on a
    # busy machine is compared at the same step as its group.
    share = amount / fmean(_end(run, cost) for run in group.runs)
    if share > 1 + cost.alike:
        return _Found(lack=Lack.NOT_REACHED)
    if share >= 1 - cost.alike:
        return _Found(ends, _at_end(group))
    values = []
    for run in group.runs:
        places, points = experiment.measure.curve(run, _ALONG[cost])
        place = share * _end(run, cost)
        if not places or place < places[0]:
            return _Found(lack=Lack.NOT_EVALUATED)
        values.append((run.seed, float(np.interp(place, places, points))))
    return _Found(tuple(values), at_end=False)


def _at_end(group: Group) -> bool:
    """Whether all runs of a group have come to the end of their schedule."""
    return all(run.at_end for run in group.runs)


_ALONG = {Cost.TOKENS: "tokens", Cost.FLOPS: "flops", Cost.SECONDS: "seconds"}
"""The fields of `HeldoutCurve` and `Curve`."""

_END: dict[Cost, Callable[[Result], float]] = {
    Cost.TOKENS: lambda run: run.tokens,
    Cost.FLOPS: lambda run: run.train_flops,
    Cost.SECONDS: lambda run: run.train_s,
    Cost.KV_BYTES: lambda run: run.kv_bytes,
}


def _end(run: Result, cost: Cost) -> float:
    return _END[cost](run)


def _amount(group: Group, cost: Cost, setting: "Setting | None") -> float | None:
    """How much of a cost a group has taken, the mean over its runs; None if it is not known."""
    if cost != Cost.DECODE_MS:
        return fmean(_end(run, cost) for run in group.runs)
    return decode_ms(group, setting) if setting else None


def _as_large(one: Group, other: Group) -> bool:
    a, b = (x.runs[0].parameters - x.runs[0].embedding_parameters for x in (one, other))
    return abs(a - b) <= ALIKE * max(a, b)


SPEED = ("engine.threads", "engine.compile", "engine.precision", "engine.activation_checkpointing")
"""Settings that change how fast a run is, and nothing that it computes but for rounding."""


def _trained_on(group: Group) -> set[tuple[Any, ...]]:
    """On what the runs of a group were trained; of several, their times are of several things."""
    return {
        (run.device, run.devices, *(run.settings.get(key) for key in SPEED)) for run in group.runs
    }


# The KV cache


def kv_setting(groups: Sequence[Group]) -> tuple[int, float | None] | None:
    """The context and the bytes of a number of most groups' KV caches; None if there is no group.

    Bytes of other contexts or dtypes are no comparison. Those of a number are what the originals
    take, a key and a value of each layer, head and token; None where the settings do not tell.
    """
    found = [(run.kv_context, _number_bytes(run)) for group in groups for run in group.runs]
    return max(found, key=found.count, default=None)


def _number_bytes(run: Result) -> float | None:
    names = ("model.layers", "model.kv_heads", "model.head_dim")
    layers, heads, dim = (run.settings.get(name) for name in names)
    if not (layers and heads and dim):
        return None
    return (run.kv_bytes - run.kv_hidden_bytes) / (2 * layers * heads * dim * run.kv_context)


# Latency

Setting = tuple[str, str, int, int]
"""Device, dtype, context and batch."""


def decode_setting(groups: Sequence[Group]) -> Setting | None:
    """The setting in which the decode latency of most groups was measured; the longest context.

    None if it was measured of no group.
    """
    measured = [
        {setting for run in group.runs for setting, ms in _decodes(run) if ms is not None}
        for group in groups
    ]
    counts = {s: sum(s in found for found in measured) for found in measured for s in found}
    return max(counts, key=lambda setting: (counts[setting], setting[2], setting), default=None)


def decode_ms(group: Group, setting: Setting) -> float | None:
    """The decode latency of a group's model in a setting; None if it was not measured."""
    found = [ms for run in group.runs for other, ms in _decodes(run) if other == setting]
    known = [ms for ms in found if ms is not None]
    return fmean(known) if known else None


def _decodes(run: Result) -> list[tuple[Setting, float | None]]:
    return [((x.device, x.dtype, x.context, x.batch), x.decode_ms) for x in run.latency]


def _in_words(setting: Setting) -> str:
    """
    >>> _in_words(("a GPU", "bfloat16", 1024, 1))
    'a GPU, bfloat16, 1,024 tokens of context, batch 1'
    """
    device, dtype, context, batch = setting
    return f"{device}, {dtype}, {context:,} tokens of context, batch {batch}"
