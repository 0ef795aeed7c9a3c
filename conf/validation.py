"""From plain values, as YAML or a command line gives them, to dataclasses, and back.

`build` reports everything that is wrong at once: unknown keys, wrong types, and whatever the
dataclasses' own `problems()` find in the values that are left, with defaults for the others.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import TypeAdapter, ValidationError

from conf.errors import ConfigError, Problem

T = TypeVar("T")
MOST = 2**63 - 1  # the largest integer of 64 bits with a sign
HAS_TO_BE_GIVEN = "has to be given"
OMITTED = "???"  # OmegaConf's mark of a value that the user has to give
REJECTED: Any = object()  # stands for a value that is not of the field's type


class Setting(NamedTuple):
    """A field of a configuration dataclass.

    Attributes:
        name: of the field.
        hint: its type.
        sections: the dataclasses that it holds one of, or several of by name; empty for a value.
        named: whether it is a dict of sections under names of the user's choice.
        default: its default; `MISSING` if it has none and has to be given.
    """

    name: str
    hint: Any
    sections: list[Any]
    named: bool
    default: Any

    @property
    def required(self) -> bool:
        """Whether it has to be given."""
        return self.default is MISSING


def settings_of(cls: Any) -> list[Setting]:
    """The fields of a dataclass in their order."""
    return [
        setting if factory is MISSING else setting._replace(default=factory())
        for setting, factory in _settings(cls)
    ]


@cache
def _settings(cls: Any) -> list[tuple[Setting, Any]]:
    """The fields of a dataclass, each with what makes its default, if that is made anew.

    Python evaluates the types of fields at every call, and we ask a hundred times.
    """
    hints, found = get_type_hints(cls, include_extras=True), []
    for field in fields(cls):
        hint = hints[field.name]
        sections, named = _sections(hint), _entries(hint) is not None
        setting = Setting(field.name, hint, sections, named, field.default)
        found.append((setting, field.default_factory))
    return found


def build(cls: type[T], values: Mapping[str, Any], where: str = "the configuration") -> T:
    """The `cls` that `values` describe, with defaults for what they leave out.

    Args:
        cls: a dataclass with `problems()`, or a tree of them; a union of them is told apart by
            the literal `kind` of each, and a dict of them has names of the user's choice.
        values: what was given, unknown keys and all.
        where: where the problems are, in words for the error's title.

    Raises:
        ConfigError: with every problem.
    """
    given = flatten_keys(values)
    set_here = [key for key, value in given.items() if value != OMITTED]
    reader = _Reader(_known(keys(cls), given), set_here)
    built = reader.section(cls, values, "")
    if reader.problems:
        raise ConfigError(reader.problems, where)
    return built


def as_dict(value: Any) -> Any:
    """The inverse of `build`: nothing but dicts, lists, text, numbers, booleans and None."""
    if is_dataclass(value):
        return {f.name: as_dict(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [as_dict(item) for item in value]
    if isinstance(value, dict):
        # JSON has text for keys alone, and a configuration has to be the same after it.
        return {str(name): as_dict(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def defaults(cls: Any) -> dict[str, Any]:
    """The defaults of `cls` as plain values; of what has a `kind`, only that."""
    tree: dict[str, Any] = {}
    for setting in settings_of(cls):
        match setting.sections:
            case [section] if not setting.named:
                tree[setting.name] = defaults(section)
            case [_, _, *_] if not setting.named:
                tree[setting.name] = {"kind": setting.default.kind}
            case _ if not setting.required:
                tree[setting.name] = as_dict(setting.default)
    return tree


def keys(cls: Any, path: str = "") -> list[str]:
    """The full name of everything that can be set in `cls`: `seed`, `model.K`, ...

    A `*` stands for a name of the user's choice: `data.sources.*.weight`.
    """
    return list(_keys(cls, path))


@cache
def _keys(cls: Any, path: str) -> dict[str, None]:
    found: list[str] = []
    for setting in settings_of(cls):
        key = path + setting.name
        within = f"{key}.*." if setting.named else f"{key}."
        found += [name for section in setting.sections for name in keys(section, within)] or [key]
    return dict.fromkeys(found)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known key that was probably meant: one of the same section if any comes close.

    >>> nearest("model.windw", ["seed", "model.window", "optim.lr"])
    'model.window'
    >>> nearest("lr", ["seed", "model.window", "optim.lr"])
    'optim.lr'
    """
    section, _, end = name.lower().rpartition(".")
    known = list(known)
    # Names are compared without their section: with it, any two keys of a section look alike.
    for among in ([k for k in known if k.rpartition(".")[0] == section], known):
        ends = {key: key.lower().rpartition(".")[2] for key in among}
        for match in get_close_matches(end, ends.values(), n=1):
            candidates = [key for key in among if ends[key] == match]
            return get_close_matches(name, candidates, n=1, cutoff=0)[0]
    return None


def closest(value: Any, options: Iterable[str]) -> str | None:
    """The option that was probably meant; None where none comes close."""
    return next(iter(get_close_matches(str(value), list(options), n=1)), None)


def did_you_mean(guess: str | None) -> str:
    """The hint of a problem whose key or value is misspelt; empty without a guess."""
    return f"Did you mean {guess}?" if guess else ""


class _Reader:
    """Reads plain values in one pass, and collects problems on the way.

    A problem of one setting must not lead to others: a misspelt `train.max_steps` does not make the
    warm-up too long. So a setting that cannot be used has its default from then on, its name is
    noted, and problems that name it are left out.

    Attributes:
        known: the full names of all settings.
        given: the full names of those that the user has set.
        problems: what was found so far.
        unusable: settings that have their default in place of what was given.
    """

    def __init__(self, known: Sequence[str], given: Sequence[str]) -> None:
        self.known = known
        self.given = given
        self.problems: list[Problem] = []
        self.unusable: set[str] = set()

    def section(self, cls: type[T], values: Any, path: str) -> T:
        """Reads one dataclass; `path` is empty or ends with a dot."""
        settings = settings_of(cls)
        if not isinstance(values, Mapping):
            self.reject(path[:-1], values, f"settings such as {path}{settings[0].name}")
            values = {}
        names = [setting.name for setting in settings]
        for name in values:
            if name not in names:
                for key in flatten_keys({name: values[name]}, path):
                    self.unknown(key, path, names)
        given = {}
        # All settings are read, also after a problem, so that all problems are reported at once.
        for setting in settings:
            name, key = setting.name, path + setting.name
            if name not in values and not setting.required:
                continue
            one = setting.sections and not setting.named
            value = values.get(name, {} if one else OMITTED)
            if one and len(setting.sections) > 1 and isinstance(value, Mapping):
                # `engine.threads=2` alone has no kind, and means the default engine.
                value = {"kind": setting.default.kind, **value}
            if value == OMITTED:
                if key not in self.unusable:  # else it was given under a misspelt name
                    self.problems.append(Problem(key, expected="has to be given"))
                self.unusable.add(key)
            elif (read := self.value(setting.hint, value, key)) is not REJECTED:
                given[name] = read
        return self.construct(cls, given, path)

    def value(self, hint: Any, value: Any, key: str) -> Any:
        """Reads what one field holds."""
        if (entry := _entries(hint)) is not None:
            if isinstance(value, Mapping):
                named = self.named(entry, value, key)
                return {name: self.value(entry, v, f"{key}.{name}") for name, v in named.items()}
            return self.reject(key, value, f"settings by name, such as {key}.NAME")
        sections = _sections(hint)
        if len(sections) > 1:
            return self.variant(sections, value, key)
        if sections:
            return self.section(sections[0], value, f"{key}.")
        if beyond := _beyond_range(hint, value):
            return self.reject(key, value, beyond)
        try:
            # Strict JSON takes neither true for 1 nor "3" for 3, yet a list for a tuple.
            return _adapter(hint).validate_json(json.dumps(_whole(value)), strict=True)
        except ValidationError:
            meant = did_you_mean(closest(value, _literals(hint)))
            return self.reject(key, value, type_in_words(hint), meant)

    def named(self, entry: Any, values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """The sections under names of the user's choice, without those whose name is misspelt.

        Any name is right. But where a section has to say its kind, one that does not was meant to
        change another one: `data.sources.file.text_field=body` beside `data.sources.files`.
        """
        if len(_sections(entry)) < 2:
            return values
        whole = [n for n, v in values.items() if not isinstance(v, Mapping) or "kind" in v]
        meant = {n: closest(n, whole) for n in values if n not in whole}
        for name, guess in meant.items():
            if guess:
                hint = did_you_mean(f"{key}.{guess}")
                problem = Problem(f"{key}.{name}", expected="has no kind", hint=hint)
                self.problems.append(problem)
                self.unusable |= {f"{key}.{guess}.{setting}" for setting in values[name]}
        return {name: value for name, value in values.items() if not meant.get(name)}

    def variant(self, sections: list[Any], value: Any, key: str) -> Any:
        """Reads the one of several dataclasses that the value's `kind` names."""
        kinds = {_kind(section): section for section in sections}
        kind = value.get("kind") if isinstance(value, Mapping) else value
        if isinstance(kind, str) and kind in kinds:
            return self.section(kinds[kind], value, f"{key}.")
        if kind is None:
            self.unusable.add(f"{key}.kind")
            missing = f"has to be given, one of {', '.join(kinds)}"
            self.problems.append(Problem(f"{key}.kind", expected=missing))
        else:
            expected = f"one of {', '.join(kinds)}"
            self.reject(f"{key}.kind", kind, expected, did_you_mean(closest(kind, kinds)))
        return _draft(sections[0], {})

    def construct(self, cls: type[T], given: dict[str, Any], path: str) -> T:
        """Makes the dataclass, or a draft of it with defaults for what cannot be used."""
        draft: Any = _draft(cls, given)
        if any(setting.required and setting.name not in given for setting in settings_of(cls)):
            return draft
        found = draft.problems()
        if not found:
            return cls(**given)
        # `problems()` of the whole looks at values of its sections, which may be drafts by now.
        before = set(self.unusable)
        for problem in found:
            named = problem.named(path[:-1])
            if not {named.key, *named.others} & before:
                self.problems.append(named)
                # A setting that is wrong by itself has its default from here on. Of several that
                # do not fit together each is usable, and is held against others, too.
                if not named.others and named.key in self.known:
                    self.unusable.add(named.key)
        return _draft(cls, {k: v for k, v in given.items() if path + k not in self.unusable})

    def unknown(self, key: str, path: str, names: Sequence[str]) -> None:
        """Reports a key that the section at `path` does not have, with the one that was meant.

        The section's own `names` come first. Those of another kind of section, such as `path` of
        tokens beside `paths` of files, are known, too, but not right here.
        """
        name, dot, rest = key.removeprefix(path).partition(".")
        own = closest(name, names)
        guess = f"{path}{own}{dot}{rest}" if own else None
        if guess is None and key not in self.known:
            guess = nearest(key, self.known)
        if guess and guess not in self.given:
            self.unusable |= {guess, f"{path}{own}"}  # a default is not what the user wants
        hint = did_you_mean(guess) or f"there is {path}{{{', '.join(names)}}}"
        self.problems.append(Problem(key, expected="unknown key", hint=hint))

    def reject(self, key: str, value: Any, expected: str, hint: str = "") -> Any:
        """Reports a value that is not of the field's type."""
        self.unusable.add(key)
        self.problems.append(Problem(key, value, f"expected {expected}", hint))
        return REJECTED


def flatten_keys(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The values of a tree by their full names.

    >>> flatten_keys({"seed": 0, "model": {"K": 2}})
    {'seed': 0, 'model.K': 2}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= flatten_keys(value, f"{path}{name}.") if nested else {f"{path}{name}": value}
    return found


def nest_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of values by their full names, as `flatten_keys` was given it.

    >>> nest_keys({"seed": 0, "model.K": 2})
    {'seed': 0, 'model': {'K': 2}}
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


def _known(keys: Iterable[str], given: Iterable[str]) -> list[str]:
    """The keys, those with a `*` once for every name that was given there."""
    known = []
    for key in keys:
        section, star, _ = key.partition("*")
        if not star:
            known.append(key)
            continue
        names = [k.removeprefix(section).partition(".")[0] for k in given if k.startswith(section)]
        known += [key.replace("*", name, 1) for name in dict.fromkeys(names)]
    return known


@cache
def _entries(hint: Any) -> Any:
    """What each name of a dict of dataclasses holds; None for other types."""
    if get_origin(hint) is dict and _sections(entry := get_args(hint)[1]):
        return entry
    return None


@cache
def _sections(hint: Any) -> list[Any]:
    """The dataclasses that a field of this type holds one of, or some of by name; none for a
    plain value."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is dict:
        return _sections(get_args(hint)[1])
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [member for member in members if is_dataclass(member)]


@cache
def _kind(section: Any) -> str:
    """The only value of `kind`, a Literal by which one of several dataclasses is told."""
    [kind] = get_args(get_type_hints(section)["kind"])
    return str(kind)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    """What reads a value of this type."""
    return TypeAdapter(hint)


def _draft(cls: type[T], given: Mapping[str, Any]) -> T:
    """An instance that was not checked; required values that are not given are missing in it."""
    draft = object.__new__(cls)  # `__init__` would raise an error with the first problems
    for setting in settings_of(cls):
        if setting.name in given:
            object.__setattr__(draft, setting.name, given[setting.name])
        elif not setting.required:
            object.__setattr__(draft, setting.name, setting.default)
    return draft


def _literals(hint: Any) -> list[str]:
    """The words that a type allows, alone or among other values.

    >>> _literals(Literal["auto", "never"] | bool)
    ['auto', 'never']
    """
    if get_origin(hint) is Literal:
        return [str(word) for word in get_args(hint)]
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return [word for member in members for word in _literals(member)]


def _whole(value: Any) -> Any:
    """Turns 1e9 into 1000000000, also in lists: numbers without a fraction are integers."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _beyond_range(hint: Any, value: Any) -> str:
    """What a field expects if it holds integers and the value is too large for 64 bits; else "".

    Beyond that, PyTorch, NumPy and files of tokens cannot hold a number, and fail without a name.

    >>> _beyond_range(int | None, 2**63), _beyond_range(float, 1e20), _beyond_range(int, "7")
    ('an integer of at most 9223372036854775807', '', '')
    """
    if get_origin(hint) is Annotated or int not in (hint, *get_args(hint)):
        return ""  # an annotated field has bounds of its own
    numbers = _whole(value if isinstance(value, list) else [value])
    if all(not isinstance(n, int) or -MOST - 1 <= n <= MOST for n in numbers):
        return ""
    return f"an integer of at most {MOST}"


def type_in_words(hint: Any) -> str:
    """What a field of this type may hold.

    >>> type_in_words(int | None), type_in_words(tuple[float, float])
    ('an integer or null', '[a number, a number]')
    >>> type_in_words(Literal["a", "b"])
    'one of a, b'
    """
    arguments = get_args(hint)
    match get_origin(hint):
        case None:
            plain = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
            return {**plain, NoneType: "null", Path: "a path", Any: "a value"}[hint]
        case origin if origin is Annotated:
            notes = [note for note in arguments[1:] if isinstance(note, str)]
            return notes[0] if notes else type_in_words(arguments[0])
        case origin if origin is Literal:
            options = ", ".join(map(str, arguments))
            return f"one of {options}" if len(arguments) > 1 else options
        case origin if origin is dict:
            return f"{type_in_words(arguments[1])} for each name"
        case origin if origin is tuple:
            return f"[{', '.join('...' if a is ... else type_in_words(a) for a in arguments)}]"
    return " or ".join(map(type_in_words, arguments))
