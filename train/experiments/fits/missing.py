"""What runs lack for a law to be fitted to them.

A fit always gives numbers. Whether they mean something is asked twice: of the runs' sizes, lengths
and copies before it (`missing`), and of the fit and its bootstrap afterwards (`undetermined`).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from conf.wording import plural
from train.experiments.fits.law import Law
from train.experiments.fits.points import Floats, Points, Seeds
from train.experiments.source import seeds_in_words

VALUES = 3
"""Different values of a quantity that a constant, a coefficient and an exponent need."""

SAME = 1.1
"""Values whose ratio is below this count as one: lengths are whole steps, and differ by a few."""

APART = 0.02
"""The standard deviation of log D from a line in log N, above which it is no function of it."""

NAMES = {"parameters": "size", "tokens": "length", "FLOPs": "number of training FLOPs"}


def different(values: Iterable[float]) -> int:
    """How many different values there are.

    >>> different([1000, 1010, 2000, 1999, 3500])
    3
    """
    logs = np.sort(np.log(list(values)))
    return int(1 + np.sum(np.diff(logs) > np.log(SAME))) if len(logs) else 0


def missing(law: Law, points: Points) -> list[str]:
    """Why the constants of a law cannot follow from these runs, whatever their losses are.

    Returns:
        A sentence for each reason, with what is needed and what there is; none if they can.
    """
    if not points.runs:
        return ["There is no finished run that has a loss."]
    reasons = _too_few_values(law, points)
    if law.copies and len(set(points.K)) < 2:
        only = f"K = {points.K[0]:g}"
        reasons.append(f"Runs with and without further copies are needed for phi; all have {only}.")
    reasons = reasons or _confounded(law, points) + _not_linked(points)
    return reasons + _too_few_groups(law, points)


def _too_few_values(law: Law, points: Points) -> list[str]:
    of = {"parameters": points.parameters, "tokens": points.tokens, "FLOPs": points.flops}
    found = {term: different(of[term.of]) for term in law.terms}
    if all(count >= VALUES for count in found.values()):
        return []
    needed = " and ".join(plural(VALUES, NAMES[term.of]) for term in law.terms)
    names = " and ".join(term.exponent for term in law.terms)
    verb = "is" if list(found.values()) == [1] else "are"
    there = " and ".join(map(str, found.values()))
    return [f"{needed} are needed for {names}; there {verb} {there}."]


def _too_few_groups(law: Law, points: Points) -> list[str]:
    constants, there = len(law.constants), len(points.groups)
    if there > constants:
        return []
    verb = "is" if there == 1 else "are"
    needed = f"{constants + 1} groups of runs are needed for {constants} constants"
    return [f"{needed} and an estimate of the error; there {verb} {there}."]


def _confounded(law: Law, points: Points) -> list[str]:
    """Whether quantities rise together in these runs, so that what is due to which stays open."""
    values = {
        "the size": points.parameters,
        "the length": points.tokens,
        "K": points.K,
    }
    used = ["the size"] * any(term.of == "parameters" for term in law.terms)
    used += ["the length"] * any(term.of == "tokens" for term in law.terms)
    used += ["K"] * law.copies
    for name in used[1:]:
        others = [other for other in used if other != name]
        if follows(values[name], *(values[other] for other in others)):
            stays = " and ".join(others)
            told = (
                f"In these runs {name} follows from {stays}, so that what is due to which cannot "
            )
            told += f"be told. Runs are needed in which {stays} stays and {name} differs."
            return [told]
    return []


def _not_linked(points: Points) -> list[str]:
    """Whether some groups have seeds that others do not, and no group has both."""
    seeds = Seeds(points)
    parts = [{seeds.numbers[place] for place in places} for places in seeds.linked]
    having = [sum(points.runs[group[0]].seed in part for group in points.groups) for part in parts]
    # Where no two groups have one in common, each has an error of its own.
    if len(parts) == 1 or max(having) == 1:
        return []
    told = " and ".join(seeds_in_words(sorted(part)) for part in parts)
    reason = f"No group has runs of {told}, so that what is due to the seed cannot be told."
    return [f"{reason} Some groups need runs of seeds that the others have."]


def follows(values: Floats, *others: Floats) -> bool:
    """Whether values are a product of powers of others, but for a scatter of `APART`.

    >>> sizes = np.array([1e6, 2e6, 4e6])
    >>> follows(20 * sizes, sizes), follows(np.array([1e7, 4e7, 1e7]), sizes)
    (True, False)
    """
    logs = np.stack([np.ones(len(values)), *map(np.log, others)], axis=1)
    line, *_ = np.linalg.lstsq(logs, np.log(values), rcond=None)
    return bool(np.std(np.log(values) - logs @ line) < APART)


def undetermined(
    law: Law,
    points: Points,
    constants: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
) -> list[str]:
    """Why a fit's constants are not determined by the losses, though they could be by the design.

    Args:
        constants: of the fit.
        intervals: the ends of each exponent's interval.

    Returns:
        A sentence for each reason; none if they are determined.
    """
    if weak := _without_weight(law, constants):
        return weak
    if reason := _without_rank(law, points, constants):
        return [reason]
    found = (
        _unbounded(name, bounds, intervals[name])
        for name, bounds in zip(law.exponents, law.bounds, strict=True)
    )
    return [reason for reason in found if reason]


def _unbounded(name: str, bounds: tuple[float, float], interval: tuple[float, float]) -> str | None:
    """Whether an interval reaches the end of the range in which the exponent is sought."""
    margin = 5e-3 * (bounds[1] - bounds[0])
    below, above = interval[0] < bounds[0] + margin, interval[1] > bounds[1] - margin
    if not below and not above:
        return None
    end = "both ends" if below and above else "the lower end" if below else "the upper end"
    return (
        f"{name} is not determined: its 95 % interval reaches {end} of the range {bounds[0]:g} to "
        f"{bounds[1]:g} in which it is sought. More sizes and lengths, further apart, or more "
        "seeds would narrow it."
    )


def _without_weight(law: Law, constants: Mapping[str, float]) -> list[str]:
    return [
        f"The loss does not fall with the {NAMES[term.of]} in these runs: {term.coefficient} is 0, "
        f"and {term.exponent} means nothing."
        for term in law.terms
        if constants[term.coefficient] == 0
    ]


def _without_rank(law: Law, points: Points, constants: Mapping[str, float]) -> str | None:
    """The Jacobian of the losses has a rank below the number of constants, in float64."""
    jacobian = sensitivities(law, points, constants)
    values = np.linalg.svd(jacobian / np.linalg.norm(jacobian, axis=0), compute_uv=False)
    if values[-1] > 1e-7 * values[0]:
        return None
    return "The constants of the law can be changed together without changing any run's loss."


def sensitivities(law: Law, points: Points, constants: Mapping[str, float]) -> Floats:
    """The derivatives of each run's loss by each constant, (runs, constants)."""
    exponents: Sequence[float] = [constants[name] for name in law.exponents]
    coefficients = np.array([constants[name] for name in law.coefficients])
    columns = law.columns(points, exponents)
    step = 1e-6
    slopes = []
    for place in range(len(exponents)):
        up, down = (
            law.columns(points, [*exponents[:place], exponents[place] + h, *exponents[place + 1 :]])
            for h in (step, -step)
        )
        slopes.append((up - down) @ coefficients / (2 * step))
    return np.column_stack([columns, *slopes])
