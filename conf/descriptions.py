"""What docstrings of configuration dataclasses say about their fields, for pages and screens."""

import inspect
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from conf.validation import Setting, as_dict, settings_of, type_in_words

ENTRY = re.compile(r"([\w, ]+): (.*)")


def summary(cls: Any) -> str:
    """The docstring of a class up to its `Attributes:`."""
    return (inspect.getdoc(cls) or "").partition("Attributes:\n")[0].strip()


def descriptions(cls: Any) -> dict[str, str]:
    """The description of each field: the entries under `Attributes:` of a class and its bases.

    >>> class Base:
    ...     '''Has a size.
    ...
    ...     Attributes:
    ...         size: in bytes.
    ...     '''
    >>> class File(Base):
    ...     '''Has a name.
    ...
    ...     Attributes:
    ...         name: the path,
    ...             relative to the current directory.
    ...     '''
    >>> descriptions(File)
    {'size': 'in bytes.', 'name': 'the path, relative to the current directory.'}
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        entries = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")[2]
        names: list[str] = []
        for line in entries.splitlines():
            text = line.strip()
            if line.startswith("    ") and not line.startswith("     ") and ENTRY.match(text):
                listed, _, text = text.partition(": ")
                names = listed.split(", ")
                found |= dict.fromkeys(names, "")
            found |= {name: f"{found[name]} {text}".strip() for name in names}
    return found


class Entry(NamedTuple):
    """What is known of a setting before it is set.

    Attributes:
        key: its full name; a `*` in it stands for a name of the user's choice.
        kind: of the section that it is in, where there are several kinds; else empty.
        type: what it may hold, in words.
        default: as it would be typed; `required` if it has none.
        meaning: its description.
        options: its possible values, where they can be counted.
    """

    key: str
    kind: str
    type: str
    default: str
    meaning: str
    options: tuple[str, ...]

    def is_for(self, key: str) -> bool:
        """Whether a full name, with real names in place of each `*`, is this setting's."""
        own, given = self.key.split("."), key.split(".")
        pairs = zip(own, given, strict=False)
        return len(own) == len(given) and all(a in (b, "*") for a, b in pairs)


def entries(cls: Any, path: str = "", kind: str = "") -> Iterator[Entry]:
    """Every setting in a dataclass and in its sections.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Model:
    ...     '''A model.
    ...
    ...     Attributes:
    ...         K: the number of copies.
    ...     '''
    ...     K: int = 2
    >>> [entry] = entries(Model, "model.")
    >>> entry.key, entry.type, entry.default, entry.meaning
    ('model.K', 'an integer', '2', 'the number of copies.')
    """
    told = descriptions(cls)
    for setting in settings_of(cls):
        within = f"{path}{setting.name}.{'*.' if setting.named else ''}"
        if not setting.sections:
            key, words = path + setting.name, type_in_words(setting.hint)
            meaning = told.get(setting.name, "")
            default, options = default_as_typed(setting), options_of(setting.hint)
            yield Entry(key, kind, words, default, meaning, options)
        for section in setting.sections:
            several = len(setting.sections) > 1
            yield from entries(section, within, kind_of(section) if several else kind)


def options_of(hint: Any) -> tuple[str, ...]:
    """The values of a type, where they can be counted.

    >>> options_of(bool), options_of(Literal["a", "b"] | None), options_of(int | None)
    (('true', 'false'), ('a', 'b', 'null'), ('null',))
    """
    if hint is bool:
        return ("true", "false")
    if hint is NoneType:
        return ("null",)
    if get_origin(hint) is Literal:
        return tuple(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return tuple(option for member in get_args(hint) for option in options_of(member))
    return ()


def kind_of(section: Any) -> str:
    """The name by which one of several dataclasses is told apart."""
    [hint] = [setting.hint for setting in settings_of(section) if setting.name == "kind"]
    return str(get_args(hint)[0])


def default_as_typed(setting: Setting) -> str:
    """The default of a setting as a user would type it; `required` if it has none."""
    return "required" if setting.required else as_typed(as_dict(setting.default))


def as_typed(value: Any) -> str:
    """A plain value as a user would type it.

    >>> as_typed("tiny"), as_typed(None), as_typed([1, 2]), as_typed("")
    ('tiny', 'null', '[1, 2]', '""')
    """
    bare = isinstance(value, str) and value and value == value.strip()
    return value if bare else json.dumps(value, ensure_ascii=False)


def width() -> int:
    """Characters of a line on the screen; more than 100 are hard to read."""
    return min(100, shutil.get_terminal_size().columns)


def listed(rows: Mapping[str, str]) -> str:
    """Settings or choices, each with its meaning below it, for a screen."""
    lines: list[str] = []
    for name, meaning in rows.items():
        lines.append(f"  {name}")
        lines += textwrap.wrap(
            meaning,
            width(),
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
            break_on_hyphens=False,  # names of runs, which are copied, have hyphens
        )
    return "\n".join(lines)


def explanation(found: Entry, key: str, now: str = "") -> str:
    """All about one setting, for a screen.

    Args:
        found: the setting.
        key: its full name, as it was asked for.
        now: its value and where that comes from; empty where there is none.
    """
    rows = {"type": found.type, "default": found.default, "now": now}
    return "\n".join(
        [
            listed({key: found.meaning})[2:],
            *(f"      {name + ':':9}{text}" for name, text in rows.items() if text),
        ]
    )
