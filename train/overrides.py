"""The overrides of a command line, `model.K=3` and `data=files`, and what is wrong with them."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException

from conf.arguments import misread
from conf.errors import Problem
from conf.validation import did_you_mean, flatten_keys, keys, nearest
from train.conf_files import choices, groups, load_yaml
from train.config import SECTIONS, Config
from train.run_dir.name import readable

TOGETHER = "together"
"""The settings of each run of a sweep that vary together, as in
`-m together='{model.K: 2, optim.lr: 1e-3},{model.K: 3, optim.lr: 5e-4}'`. It is a word of the
command line and of conf/sweep/, and no setting of a run."""

DEEPENED = "flops_of"
"""`model.flops_of=phd_cswa-2` stands for `model.layers`: as many as cost what this variant does."""

LONGEST_GROUP = 128
"""Characters of the name of a group of runs; Weights & Biases takes no more."""

QUOTING = "a text with special characters needs quotes within quotes:"


@cache
def parsed_override(text: str) -> Override:
    """An override as Hydra reads it. Hydra takes 2 ms for each, and we look at it several times.

    Raises:
        HydraException: it cannot be read.
    """
    return OverridesParser.create().parse_override(text)


def parse_overrides(
    texts: Iterable[str], other_keys: Sequence[str]
) -> tuple[dict[str, Override], list[Problem | str]]:
    """The overrides to give to Hydra, by their spelling, and what is wrong with the others."""
    parsed: dict[str, Override] = {}
    words = Counter(choice for group in groups() for choice in choices(group))
    alone = {c: group for group in groups() for c in choices(group) if words[c] == 1}
    typed, problems = misread(texts, [*groups(), *other_keys, *keys(Config)], alone)
    for text in typed:
        try:
            override = parsed_override(text)
        except HydraException as error:
            reason = str(error).partition("\n")[0]
            expected = f"not key=value as Hydra reads it ({reason})"
            problems.append(
                Problem(repr(text), expected=expected, hint=f"{QUOTING} {_with_quotes(text)}")
            )
            continue
        if found := _name_problems(override, other_keys):
            problems += found
        else:
            spelling = _spelling(text, override)
            parsed.pop(spelling, None)  # of equal overrides, too, the last one counts
            parsed[spelling] = parsed_override(spelling)
    return _with_one_choice_of_sweeps(parsed, problems), problems


def _with_one_choice_of_sweeps(
    parsed: dict[str, Override], problems: list[Problem | str]
) -> dict[str, Override]:
    """The overrides with all prepared sweeps in one, since the last choice of a group counts."""
    asked = {text: o for text, o in parsed.items() if o.key_or_group == "sweep"}
    every = [name for o in asked.values() for name in chosen(o)]
    names = list(dict.fromkeys(every))
    if any(o.is_sweep_override() for o in asked.values()):
        hint = f"{' '.join(f'+sweep={name}' for name in names)} is the product of all"
        problems.append(Problem("sweep", ",".join(names), "expected one sweep", hint))
        return {text: o for text, o in parsed.items() if text not in asked}
    kept: list[str] = []
    for name in names:
        clashes = [(other, shared) for other in kept if (shared := _both_vary(other, name))]
        for other, shared in clashes:
            problem = f"both sweep={other} and sweep={name} vary {' and '.join(shared)}"
            hint = "run one after the other"
            problems.append(Problem("sweep", ",".join(names), problem, hint))
        # Their runs would have the same problem once more, each of them.
        kept += [] if clashes else [name]
    if len(asked) < 2 and kept == every:
        return parsed
    joined = f"sweep=[{','.join(kept)}]"
    rest = {text: o for text, o in parsed.items() if text not in asked}
    return {joined: parsed_override(joined), **rest}


def sweep_name(parsed: Iterable[Override]) -> str:
    """What a sweep is called: by the prepared ones in it, and by what else is varied.

    >>> texts = ["sweep=[k,seeds]", "optim.lr=1,2", "model.dim=8"]
    >>> sweep_name(map(parsed_override, texts))
    'k+seeds+lr'
    """
    parsed = list(parsed)
    prepared = [name for o in parsed if o.key_or_group == "sweep" for name in chosen(o)]
    varied = [o.key_or_group.rpartition(".")[2] for o in parsed if o.is_sweep_override()]
    return "+".join([*prepared, *varied])[:LONGEST_GROUP]


def swept_by(sweep: str) -> list[str]:
    """The keys that a file of conf/sweep/ varies; none if there is no such file."""
    if sweep not in choices("sweep"):
        return []
    params = load_yaml(f"sweep/{sweep}.yaml")["hydra"]["sweeper"]["params"]
    return [key.lstrip("+") for key in params]


def _both_vary(one: str, other: str) -> list[str]:
    """What two files of conf/sweep/ both vary, by the keys, or else by the names within them."""
    keys_of_one, theirs = swept_by(one), swept_by(other)
    if shared := [key for key in keys_of_one if key in theirs and key != TOGETHER]:
        return shared
    ours, names = _names_swept_by(one), _names_swept_by(other)
    if shared := [key for key in ours if key in names]:
        return shared
    return [key for key in keys_of_one if key in theirs]


def _names_swept_by(sweep: str) -> list[str]:
    """The settings that a file of conf/sweep/ varies, also those within the values of a key."""
    params = load_yaml(f"sweep/{sweep}.yaml")["hydra"]["sweeper"]["params"]
    names: dict[str, None] = {}
    for key, text in params.items():
        override = parsed_override(f"{key}={text}")
        for value in _values_of(override):
            own = value if override.key_or_group == TOGETHER else {override.key_or_group: value}
            names |= dict.fromkeys(map(str, flatten_keys(own)))
    return list(names)


def _with_quotes(text: str) -> str:
    """An override as it is typed in a shell, with its text, or each text of its list, in quotes.

    >>> print(_with_quotes("data.sources.books.paths=[a (1).txt,b=2.txt]"))
    'data.sources.books.paths=["a (1).txt","b=2.txt"]'
    """
    key, _, value = text.partition("=")
    listed = re.fullmatch(r"\s*\[(.*)\]\s*", value, re.DOTALL)
    if listed is None:
        return shlex.quote(f"{key}={_hydra_quoted(value)}")
    return shlex.quote(f"{key}=[{','.join(map(_hydra_quoted, listed[1].split(',')))}]")


def as_list(text: str) -> str:
    """An override with several values as one whose value is a list, as it is typed in a shell."""
    key, _, value = text.partition("=")
    return shlex.quote(f"{key}=[{value}]")


def _hydra_quoted(text: str) -> str:
    """A text in Hydra's quotes; one that has them already stays as it is."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text
    # Backslashes mean themselves, but not in front of a quote, nor of the closing one.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'"{escaped}"'


def _name_problems(override: Override, other_keys: Sequence[str]) -> list[Problem]:
    """What is wrong with a group or its choice; keys of a section are left to `Config`."""
    key = override.key_or_group
    if is_hydras(override) or "." in key:
        return []
    names = groups()
    if key == TOGETHER:
        expected = "expected the settings of each run, as in {model.K: 2, optim.lr: 1e-3}"
        given = [o for o in _values_of(override) if not isinstance(o, dict)]
        return [Problem(key, value, expected) for value in given]
    if key not in names:
        guess = did_you_mean(nearest(key, [*names, *other_keys, *keys(Config)]))
        hint = guess or f"the groups are {', '.join(names)}"
        unknown = Problem(key, expected="unknown group or key", hint=hint)
        return [] if key in SECTIONS else [unknown]
    options = choices(key)
    expected = f"expected one of {', '.join(options)}"
    # The choices are words that nobody quotes, so they are part of the key here.
    return [
        Problem(f"{key}={name}", expected=expected, hint=did_you_mean(nearest(name, options)))
        for name in chosen(override)
        if name not in options
    ]


def chosen(override: Override) -> list[str]:
    """The choices that an override names; none if it sets the group's keys instead."""
    values = _values_of(override)
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return ["null" if name is None else str(name) for name in names if not isinstance(name, dict)]


def _values_of(override: Override) -> list[Any]:
    """The values of an override, which are several if it is swept."""
    sweep = override.is_sweep_override()
    return list(override.sweep_iterator(Transformer.identity)) if sweep else [override.value()]


def is_hydras(override: Override) -> bool:
    """Whether only Hydra has to understand an override: `hydra.verbose=true`, `~model.K`."""
    return override.is_delete() or override.key_or_group.startswith(("hydra.", "hydra/"))


def _spelling(text: str, override: Override) -> str:
    """An override as Hydra gets it: groups without a plus, keys with two.

    With two, Hydra also passes on keys that it does not know, and `Config` can report them all.
    """
    if is_hydras(override):
        return text
    plain, key = text.lstrip("+"), override.key_or_group
    return plain if choices(key) and chosen(override) else f"++{plain}"


def points_of(
    parsed: Iterable[Override], params: Mapping[str, str] | None
) -> tuple[list[list[str]], set[str]]:
    """The overrides of each job, as Hydra's sweeper makes them, and the keys that differ."""
    both = [parsed_override(f"{key}={value}") for key, value in (params or {}).items()]
    both += parsed
    [points] = BasicSweeper.split_arguments(both, max_batch_size=None)
    return points, {o.key_or_group for o in both if o.is_sweep_override()}


def _label(override: Override) -> str:
    """An override as a part of a directory's name: `lr_0.001`."""
    setting = override.key_or_group.rpartition(".")[2]
    return readable(f"{setting}_{override.get_value_element_as_str()}")


def labels(point: Iterable[str], swept: set[str]) -> dict[str, str]:
    """What the names of a sweep's runs say of the settings that differ: `{"optim.lr": "lr_0.001"}`.

    Args:
        point: the overrides of one run.
        swept: the keys that differ between the runs.
    """
    parsed = [parsed_override(text) for text in point]
    several = {
        o.key_or_group: _label(o)
        for o in parsed
        if o.key_or_group in swept and o.key_or_group != TOGETHER
    }
    return several | {
        key: readable(f"{_last_name(key)}_{value}") for key, value in together(parsed)
    }


def _last_name(key: str) -> str:
    """What a directory's name says of a setting; `train` has a `flops_of`, too."""
    return "layers_of" if key == f"model.{DEEPENED}" else key.rpartition(".")[2]


def together(overrides: Iterable[Override]) -> list[tuple[str, Any]]:
    """The settings that `TOGETHER` gives one run, by their names."""
    found = [o.value() for o in overrides if o.key_or_group == TOGETHER]
    return [
        (str(key), value) for own in found if isinstance(own, dict) for key, value in own.items()
    ]


def given_twice(point: Iterable[str]) -> list[Problem]:
    """A problem for each setting that a run's overrides name beside those that vary together."""
    parsed = [parsed_override(text) for text in point]
    theirs = {key for key, _ in together(parsed)}
    beside = {
        key: value
        for o in parsed
        if not is_hydras(o) and o.key_or_group != TOGETHER
        for key, value in flatten_keys({o.key_or_group: o.value()}).items()
    }
    if f"model.{DEEPENED}" in theirs:
        theirs.add("model.layers")
    reason, hint = "the sweep sets it with others in each of its runs", "leave it out"
    return [Problem(key, beside[key], reason, hint) for key in beside if key in theirs]


def one_by_one(texts: Iterable[str]) -> list[str]:
    """The overrides of one run, with each of those that vary together as one of its own."""
    found: list[str] = []
    for text in texts:
        parsed = parsed_override(text)
        if parsed.key_or_group == TOGETHER:
            found += [f"{key}={value}" for key, value in together([parsed])]
        else:
            found.append(text)
    return found


class Typed(NamedTuple):
    """The settings that a job's overrides name.

    Attributes:
        varied: for each by its full name, whether the sweep varies it.
        no_chunk: whether `model.chunk=null` is one of them.
    """

    varied: dict[str, bool]
    no_chunk: bool

    @classmethod
    def of(cls, point: Iterable[str], swept: set[str]) -> "Typed":
        """Those of a job's overrides, with the keys that differ between the jobs."""
        varied: dict[str, bool] = {}
        values: dict[str, Any] = {}
        for override in map(parsed_override, point):
            key = override.key_or_group
            if key == TOGETHER:
                named = dict(together([override]))
                values |= named
                varied |= dict.fromkeys(named, True)
            elif not is_hydras(override):
                named = flatten_keys({key: override.value()})
                values |= named
                varied |= dict.fromkeys(named, key in swept)
        no_chunk = values.get("model.chunk", "") is None
        if no_chunk:
            del varied["model.chunk"]  # every variant may be asked for no chunk
        return cls(varied, no_chunk)
