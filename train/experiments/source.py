"""Which runs a figure or table is made of."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conf.wording import plural
from train.experiments.result import Result


@dataclass(frozen=True)
class Source:
    """The runs that a figure or table is made of.

    Attributes:
        runs: their names.
        fewest, most: different seeds of a group of runs that differ in nothing else.
        alone: the runs that are the only seed of their group.
    """

    runs: tuple[str, ...]
    fewest: int
    most: int
    alone: tuple[str, ...] = ()

    @property
    def one_seed(self) -> bool:
        """Whether no group has a second seed, so that no spread is known."""
        return self.most == 1

    def __str__(self) -> str:
        if self.one_seed:
            seeds = "one seed" + (" each" if len(self.runs) > 1 else "")
        elif self.fewest == self.most:
            seeds = plural(self.most, "seed") + (" each" if len(self.runs) > self.most else "")
        else:
            seeds = f"{self.fewest} to {plural(self.most, 'seed')} each"
        return f"{plural(len(self.runs), 'run')}, {seeds}"


def source_of(results: Iterable[Result]) -> Source:
    """The source that some runs are; at least one."""
    found = list(results)
    seeds = Counter(group for group, _ in {(result.group, result.seed) for result in found})
    alone = tuple(result.name for result in found if seeds[result.group] == 1)
    names = tuple(result.name for result in found)
    return Source(names, min(seeds.values()), max(seeds.values()), alone)


def seeds_in_words(seeds: Sequence[int]) -> str:
    """
    >>> seeds_in_words([0]), seeds_in_words([0, 2])
    ('seed 0', 'seeds 0, 2')
    """
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
