"""Runs that differ in nothing but their seed, with a label and a style for charts and tables."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from conf.wording import short_count
from phd.config import VARIANTS
from train.experiments.result import Result
from train.experiments.source import Source, seeds_in_words, source_of
from train.experiments.texts import LOADING, same_texts
from train.experiments.theme import Style, styles

T = TypeVar("T")

UNTOLD = (
    *(
        "run.name",
        "run.dir",
        "run.resume",
        "run.decay",
        "seed",
        "engine.",
        "checkpoint.",
        "faults.",
        "eval.",
        "hooks.",
        *LOADING,
    ),
    *("train.max_", "train.micro_batch", "train.profile", "model.attention"),
)
"""How the settings begin that a label does not tell: they make no other model, or the tokens of the
run tell them."""

START = "run.start_from"
"""The setting that names the run whose weights a run began with."""

IN_THE_VARIANT = {
    f"model.{key}"
    for key in ("size", "variant", "K", "window", "chunk", "span_unit", "passes", "loop_keys")
}
"""What the name of the variant and the size tell."""


@dataclass(frozen=True)
class Group:
    """Finished runs that differ in nothing but their seed.

    Attributes:
        key: see `Result.group`; with a number where such runs were evaluated on several texts, as
            those of files that are others on another machine, or began with several checkpoints.
        label: names the variant and what else tells the group from the others of the report.
        style: in which it is drawn everywhere.
        runs: at least one.
    """

    key: str
    label: str
    style: Style
    runs: tuple[Result, ...]

    @property
    def model(self) -> str:
        """The name of the variant, such as `phd_cswa-2-16-32`."""
        return self.runs[0].model

    @property
    def length(self) -> str:
        """Its tokens in words; from the least to the most, where only time has ended its runs."""
        return _length(self.runs)

    @property
    def is_of_one_length(self) -> bool:
        """Whether its runs have as many tokens as each other, as far as `length` tells."""
        return len({short_count(run.tokens) for run in self.runs}) == 1


def groups_of(results: Sequence[Result]) -> list[Group]:
    """The groups of the finished runs, in the order of legends: vanilla, then as in the paper.

    Args:
        results: of any runs; those that have not finished are passed over, and of runs of the same
            seed all but the first: a run that is given twice is not two seeds. See `twice`. Trunks
            are passed over, too: the ends of their decays are what can be compared.
    """
    runs: dict[str, list[Result]] = {}
    for result in first_of_seeds(results):
        runs.setdefault(_key(result, runs), []).append(result)
    first = {key: found[0] for key, found in runs.items()}
    ordered = sorted(first, key=lambda key: _place(first[key]))
    look = styles({key: first[key].model for key in ordered})
    labels = _labels({key: runs[key] for key in ordered})
    by_seed = {key: tuple(sorted(runs[key], key=lambda run: run.seed)) for key in ordered}
    return [Group(key, labels[key], look[key], by_seed[key]) for key in ordered]


def _key(result: Result, runs: Mapping[str, Sequence[Result]]) -> str:
    """The key of the group that a run belongs to, given those that were found before it."""
    key, number = result.group, 1
    while key in runs and not _can_be_seeds(runs[key][0], result):
        number += 1
        key = f"{result.group} {number}"
    return key


def _can_be_seeds(one: Result, other: Result) -> bool:
    """Whether runs of equal settings differ in their seed alone."""
    return same_texts(one, other) and same_start(one, other)


def same_start(one: Result, other: Result) -> bool:
    """Whether two runs began with the same weights, or both with random ones.

    The checkpoint tells it, where it was kept of both: a run that others begin with may have
    trained on between them. Otherwise the setting does, as of a directory of another program.
    """
    if one.began_with and other.began_with:
        mine, theirs = one.began_with.manifest, other.began_with.manifest
        if mine or theirs:
            return mine == theirs
    return one.settings.get(START) == other.settings.get(START)


def first_of_seeds(results: Iterable[Result]) -> list[Result]:
    """The finished runs, but those of a seed, text and start that another run of the group has."""
    return _by_seed(results)[0]


def twice(results: Iterable[Result]) -> list[tuple[Result, Result]]:
    """The finished runs that no group takes, each with the run of its group that has its seed."""
    return _by_seed(results)[1]


def _by_seed(results: Iterable[Result]) -> tuple[list[Result], list[tuple[Result, Result]]]:
    """The first run of each seed of each group; then the others, each with the first."""
    first: dict[tuple[str, int], list[Result]] = defaultdict(list)
    kept, others = [], []
    for result in results:
        if result.status != "finished" or result.is_trunk:
            continue
        rivals = first[result.group, result.seed]
        taken = next((other for other in rivals if _can_be_seeds(other, result)), None)
        if taken is None:
            rivals.append(result)
            kept.append(result)
        else:
            others.append((result, taken))
    return kept, others


def source_of_groups(groups: Sequence[Group]) -> Source:
    """The runs of some groups."""
    return source_of(run for group in groups for run in group.runs)


class Shared(NamedTuple):
    """Groups with the runs of some seeds.

    Attributes:
        groups: each with its runs of the seeds that all groups have; as they were if there are
            none.
        seeds: which all groups have.
        note: a sentence that says what was left out; empty if nothing was.
    """

    groups: tuple[Group, ...]
    seeds: tuple[int, ...]
    note: str


def at_shared_seeds(groups: Sequence[Group]) -> Shared:
    """At least one group, cut to the seeds that all have, so that their means can be compared.

    A seed may be easier than another by more than variants differ. So a group of one easy seed
    would look better than the same model with three.
    """
    own = [{run.seed for run in group.runs} for group in groups]
    seeds = tuple(sorted(set.intersection(*own)))
    if all(found == set(seeds) for found in own):
        return Shared(tuple(groups), seeds, "")
    if not seeds:
        note = "There is no seed that all groups have, and some seeds are easier than others: "
        return Shared(tuple(groups), (), note + "only differences over equal seeds tell much.")
    kept = tuple(
        replace(group, runs=tuple(run for run in group.runs if run.seed in seeds))
        for group in groups
    )
    note = f"Of {seeds_in_words(seeds)} alone, which all groups that can be compared have: "
    return Shared(kept, seeds, note + "some seeds are easier than others.")


FAMILIES = tuple(VARIANTS)


def _place(result: Result) -> tuple[Any, ...]:
    """Where a group stands in a legend: by its family, its numbers, its size and its length."""
    family, *numbers = result.model.split("-")
    rank = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
    values = [int(text) if text.isdigit() else 10**9 for text in numbers]
    changes = len(result.differences)
    return rank, values, result.parameters, result.tokens, changes, result.group


def _length(runs: Sequence[Result]) -> str:
    """The tokens of some runs, which are equal if they differ by less than shows.

    >>> from types import SimpleNamespace as run
    >>> _length([run(tokens=1_000_000), run(tokens=1_000_010)])
    '1M'
    >>> _length([run(tokens=9), run(tokens=5)])
    '5 to 9'
    """
    ends = [short_count(end(run.tokens for run in runs)) for end in (min, max)]
    return " to ".join(dict.fromkeys(ends))


def _labels(runs: Mapping[str, Sequence[Result]]) -> dict[str, str]:
    """A label for each group, by its first run; no two are equal.

    It tells the variant, and in what the group differs from more than half of the groups.
    """
    if not runs:
        return {}
    first = {key: found[0] for key, found in runs.items()}
    size, length = (
        _majority(getattr(r, name) for r in first.values()) for name in ("size", "tokens")
    )
    usual = {
        other: _usual([r for r in first.values() if r.size == other])
        for other in {result.size for result in first.values()}
    }
    labels = {}
    for key, result in first.items():
        parts = [result.size] if result.size != size else []
        parts += [f"{_length(runs[key])} tokens"] if result.tokens != length else []
        parts += [
            _setting(name, value)
            for name, value in told(result.settings).items()
            if spelled(value) != usual[result.size].get(name)
        ]
        labels[key] = f"{result.model} ({', '.join(parts)})" if parts else result.model
    taken = Counter(labels.values())
    return {
        k: f"{text} ({first[k].name})" if taken[text] > 1 else text for k, text in labels.items()
    }


def _setting(name: str, value: Any) -> str:
    """A setting in a label; of the run that another began with its directory's name.

    >>> _setting("optim.lr", 0.1), _setting("run.start_from", "runs/a"), _setting(START, None)
    ('lr=0.1', 'from a', 'from random weights')
    """
    if name == START:
        return f"from {Path(value).name}" if value else "from random weights"
    return f"{name.rpartition('.')[2]}={spelled(value)}"


def _majority(values: Iterable[T]) -> T | None:
    """The value that more than half of them are; None if there is none.

    >>> _majority([1, 2, 1]), _majority([1, 2])
    (1, None)
    """
    found = Counter(values)
    value, count = found.most_common(1)[0]
    return value if 2 * count > found.total() else None


def told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make another model, and that its name does not tell.

    >>> told({"model.K": 2, "model.copy_embedding": True, "seed": 3, "optim.lr": 0.1})
    {'model.copy_embedding': True, 'optim.lr': 0.1}
    """
    return {
        key: value
        for key, value in settings.items()
        if not key.startswith(UNTOLD) and key not in IN_THE_VARIANT
    }


def spelled(value: Any) -> str:
    """A setting as it is typed.

    >>> spelled(None), spelled(True), spelled([1, "a"]), spelled(0.1)
    ('null', 'true', '[1, a]', '0.1')
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(map(spelled, value))}]"
        case _:
            return str(value)


def _usual(results: Sequence[Result]) -> dict[str, str]:
    """How each setting is spelled that has one value in more than half of the runs."""
    every = [{key: spelled(value) for key, value in told(r.settings).items()} for r in results]
    values = {key: _majority(found.get(key, "") for found in every) for key in every[0]}
    return {key: value for key, value in values.items() if value is not None}


def legend(groups: Sequence[Group]) -> tuple[tuple[str, Style], ...]:
    """The labels and styles of some groups."""
    return tuple((group.label, group.style) for group in groups)
