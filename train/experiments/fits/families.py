"""Runs that one law can be asked of: of one variant, text and kind of model, in all sizes."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from train.experiments.fits.fit import Fitted
from train.experiments.fits.points import Point, Points
from train.experiments.groups import groups_of, told
from train.experiments.result import Result
from train.experiments.source import Source, source_of

SHAPE = {
    f"model.{name}"
    for name in (
        *("layers", "dim", "ffn_dim", "heads", "kv_heads", "head_dim", "max_seq_len"),
        "flops_of",
    )
}
"""What a size may change. Not its vocabulary: with another one a token is another unit."""

KIND = (
    *("model.", "data.", "tokenizer.", "train.seq_len"),
    *("schedule.copies", "run.start_from"),
)
"""How the settings begin with which losses are not comparable, or K is not one number."""

OF_COPIES = {
    f"model.{name}"
    for name in (
        *("copy_positions", "copy_input", "copy_embedding"),
        *("span_unit", "originals_see_hidden"),
    )
}
"""What changes nothing in a model without copies."""


@dataclass(frozen=True)
class Family:
    """Runs whose losses are points of one law.

    Attributes:
        label: such as `phd_cswa-2-16-32`, or `phd_cswa-K-16-32` of several K.
        runs: at least one.
    """

    label: str
    runs: tuple[Result, ...]


Text = Callable[[Result], int]
"""Numbers the texts that runs were evaluated on."""


def one_text(result: Result) -> int:  # noqa: ARG001
    """Takes all runs to be evaluated on the same text."""
    return 0


def variants(results: Iterable[Result], text: Text = one_text) -> list[Family]:
    """The runs of each variant, K included, in the order in which they come.

    Args:
        text: runs of other texts are in other families.
    """
    runs: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        runs[_key(result.model, _kind(result), text(result))].append(result)
    return _labelled([(found[0].model, found) for found in runs.values()])


def families(results: Iterable[Result], text: Text = one_text) -> list[Family]:
    """The runs of each variant in all K, together with those of vanilla, for a fit of phi.

    A variant without a vanilla run of its kind and text is among them, too: a fit then says what
    is missing.

    Args:
        text: as that of `variants`.
    """
    results = list(results)
    plain: dict[str, list[Result]] = defaultdict(list)
    runs: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if copies(result) == 1:
            plain[_key("vanilla", _kind(result, OF_COPIES), text(result))].append(result)
        else:
            runs[_key(_with_any_copies(result), _kind(result), text(result))].append(result)
    named = []
    for found in runs.values():
        vanilla = plain.get(_key("vanilla", _kind(found[0], OF_COPIES), text(found[0])), [])
        named.append((_with_any_copies(found[0]), [*found, *vanilla]))
    return _labelled(named)


def _with_any_copies(result: Result) -> str:
    family, _, *others = result.model.split("-")
    return "-".join([family, "K", *others])


def _kind(result: Result, without: Iterable[str] = ()) -> dict[str, Any]:
    """The settings with which losses are not comparable: of the model's kind, and of the text."""
    left_out = {*SHAPE, *without, *(OF_COPIES if copies(result) == 1 else ())}
    settings = told(result.settings)
    # Where a run begins is told of no label, but it is no point among those from random weights.
    settings["run.start_from"] = result.settings.get("run.start_from")
    return {
        key: value
        for key, value in settings.items()
        if key.startswith(KIND) and key not in left_out and not key.endswith(".epochs")
    }


def _key(name: str, kind: Mapping[str, Any], text: int) -> str:
    return json.dumps([name, kind, text], sort_keys=True, default=str)


def _labelled(named: Sequence[tuple[str, list[Result]]]) -> list[Family]:
    """Families; those of one name but the first also tell in which settings they differ from it.

    Where no setting differs, they were evaluated on other texts, which have numbers.
    """
    first: dict[str, dict[str, Any]] = {}
    texts: Counter[str] = Counter()
    found = []
    for name, runs in named:
        usual, own = first.setdefault(name, _kind(runs[0])), _kind(runs[0])
        others = [
            f"{key.partition('.')[2]} {value}"
            for key, value in own.items()
            if value != usual.get(key)
        ]
        label = ", ".join([name, *others])
        texts[label] += 1
        label += f", text {texts[label]}" if texts[label] > 1 else ""
        found.append(Family(label, tuple(runs)))
    return found


def source_of_fits(fits: Iterable[Fitted], results: Iterable[Result]) -> Source:
    """The runs that some fits are made of."""
    used = {point.run for fitted in fits for point in fitted.fit.points.runs}
    return source_of(result for result in results if result.name in used)


# Points


def points_of(results: Iterable[Result], loss: Callable[[Result], float | None]) -> Points:
    """The runs that have a loss at their end; of several settings of a size and length, the best.

    Of groups of runs with equal parameters, copies and tokens, those with the least mean loss are
    taken, as a law says what a size and a length can reach. So a sweep over learning rates gives
    one point. The shifts of seeds are taken off for that, so that no setting wins by an easy seed.

    Args:
        results: runs of one variant, or of one variant and of vanilla.
        loss: the loss of a run; None if it has none.
    """
    points = [
        _point(result, group.key, value)
        for group in groups_of(list(results))
        for result in group.runs
        if result.at_end and (value := loss(result)) is not None
    ]
    level: dict[str, list[float]] = defaultdict(list)
    for point in Points(tuple(points)).without_shifts().runs:
        level[point.group].append(point.loss)
    rivals: dict[tuple[float, ...], dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        rivals[point.once, point.repeated, point.K, point.tokens][point.group].append(point)
    best = (
        groups[min(groups, key=lambda group: fmean(level[group]))] for groups in rivals.values()
    )
    return Points(tuple(point for group in best for point in group))


def _point(result: Result, group: str, loss: float) -> Point:
    return Point(
        run=result.name,
        group=group,
        once=result.embedding_parameters,
        repeated=result.parameters - result.embedding_parameters,
        K=copies(result),
        tokens=result.tokens,
        flops=result.train_flops,
        loss=loss,
        seed=result.seed,
        trunk=str(Path(result.trunk.path).parent.parent) if result.trunk else "",
    )


def copies(result: Result) -> int:
    """K of a run; 1 of vanilla.

    The name of the variant tells it: `phd_cswa-2-16-32`, `naive_repeat-3`, `vanilla`.
    """
    return int(result.model.split("-")[1]) if "-" in result.model else 1
