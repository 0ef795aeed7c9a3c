"""What `--help` and `--explain` print: settings and choices, with meanings and present values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from conf.descriptions import Entry, as_typed, entries, explanation, kind_of, listed, summary
from conf.errors import ConfigError, Problem
from conf.validation import OMITTED, did_you_mean, nearest, settings_of
from train.conf_files import choices, default_choices, groups, meaning_of, settings_in
from train.config import Config

OPTIONS = {
    "--help": "this page; with settings, it shows the values that they give.",
    "--explain KEY": "meaning, type, default and present value of a setting, and where the value "
    "comes from; or all settings of a section, or the choices of a group.",
    "--cfg job": "prints all settings of the run, and starts nothing.",
    "-m, --multirun": "several values make a sweep, whose runs follow each other: "
    "-m model.K=2,3 optim.lr=1e-3,3e-3",
    "-sc install=bash": "completion of settings and choices with the Tab key: "
    'eval "$(python train/main.py -sc install=bash)"',
    "--hydra-help": "the options of Hydra, which composes the settings.",
}


@dataclass(frozen=True)
class Composed:
    """A command line's settings, and where they come from.

    Attributes:
        values: all settings by their full names.
        chosen: what each group's choice is, or choices are.
        typed: the keys that the command line sets.
        varied: the keys that a sweep varies.
    """

    values: dict[str, Any]
    chosen: Mapping[str, Any]
    typed: frozenset[str]
    varied: frozenset[str] = frozenset()

    def origin(self, key: str) -> str:
        """Where the value of a setting comes from."""
        parts = key.split(".")
        above = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        if self.varied & above:
            return "but the sweep varies it"
        if self.typed & above:
            return "from the command line"
        # Later files replace what earlier ones have set.
        for group in reversed(default_choices()):
            for choice in self.choices_of(group):
                if key in settings_in(group, choice):
                    return f"from conf/{group}/{choice}.yaml ({group}={choice})"
        return "the default"

    def choices_of(self, group: str) -> list[str]:
        """The files of a group that are in use."""
        chosen = self.chosen.get(group)
        names = chosen if isinstance(chosen, list | tuple) else [chosen]
        return [str(name) for name in names if name in choices(group)]

    def kind_at(self, key: str) -> Any:
        """The kind of the section that a setting is in; None where there is but one."""
        return self.values.get(f"{key.rpartition('.')[0]}.kind")

    @cached_property
    def settings(self) -> dict[str, Entry]:
        """Every setting that has a value now, by its full name."""
        found = {}
        for key in self.values:
            kind = self.kind_at(key)
            for entry in _all_entries():
                if entry.kind in ("", kind) and entry.is_for(key):
                    found[key] = entry
        return found


def explain(key: str, now: Composed) -> str:
    """All about a setting; or about the settings of a section, or the choices of a group.

    Raises:
        ConfigError: there is nothing of this name.
    """
    key = key.partition("=")[0].rstrip(".")
    if not key:
        expected = "expected a setting, a section or a group"
        hint = "for example --explain model.window"
        raise ConfigError([Problem("--explain", expected=expected, hint=hint)], "the arguments")
    parts = [_setting(entry, key, now) for entry in _entries_for(key, now)]
    if key in groups():
        parts.append(_group(key, now))
    if inside := _rows(now, key + "."):
        parts.append(f"settings of {key}\n{listed(inside)}")
    if not parts:
        known = [*groups(), *(entry.key for entry in _all_entries()), *now.values]
        hint = did_you_mean(nearest(key, known)) or "--help lists all settings"
        raise ConfigError([Problem(key, expected="no setting", hint=hint)], "the arguments")
    return "\n\n".join(parts)


def _entries_for(key: str, now: Composed) -> list[Entry]:
    """What a name may mean: a setting of the kind in use, or else those of other kinds."""
    found = [entry for entry in _all_entries() if entry.is_for(key.replace(".NAME.", ".*."))]
    kind = now.kind_at(key)
    used = [entry for entry in found if entry.kind in ("", kind)] or found
    # A setting that all kinds have is told once.
    same = {entry._replace(kind="") for entry in used}
    return list(same) if len(same) == 1 and len(used) > 1 else used


def _setting(entry: Entry, key: str, now: Composed) -> str:
    alike = [k for k, e in now.settings.items() if e._replace(kind=entry.kind) == entry]
    told = [
        f"{_shown(now.values[name])}, {now.origin(name)}" + ("" if name == key else f" ({name})")
        for name in ([key] if key in now.settings else alike)
    ]
    if not told and (kind := now.kind_at(key)):
        told = [f"not in use, since {key.rpartition('.')[0]}.kind={kind}"]
    shown = f"{key}   [kind={entry.kind}]" if entry.kind else key
    return explanation(entry, shown, "; ".join(told))


def _shown(value: Any) -> str:
    return "still to be given" if value == OMITTED else as_typed(value)


def overview(title: str, now: Composed) -> str:
    """The page of `--help`; `title` is the docstring of the command."""
    sections = [
        title.strip(),
        f"Options\n{listed(OPTIONS)}",
        "Groups: group=choice takes all that a file of conf/ sets; * marks the present choice",
        *(_group(group, now) for group in groups()),
        "Settings: key=value sets one, with precedence over files; here with the present values",
        *_sections(now),
    ]
    return "\n\n".join(sections)


def _group(group: str, now: Composed) -> str:
    """The choices of a group."""
    used = now.choices_of(group)
    rows = {
        f"{group}={choice}{' *' if choice in used else ''}": meaning_of(group, choice)
        for choice in choices(group)
    }
    return listed(rows)


def _sections(now: Composed) -> Iterable[str]:
    """The settings of each section, under a line that says what it is for."""
    top = {s.name: "" for s in settings_of(Config) if not s.sections}
    yield listed({k: v for k, v in _rows(now, "").items() if k.partition("=")[0] in top})
    for setting in settings_of(Config):
        if not setting.sections:
            continue
        kind = now.values.get(f"{setting.name}.kind")
        several = len(setting.sections) > 1
        section = next(s for s in setting.sections if not several or kind_of(s) == kind)
        about = summary(section).partition("\n\n")[0].replace("\n", " ")
        yield f"{setting.name}: {about}\n{listed(_rows(now, setting.name + '.'))}"


def _rows(now: Composed, path: str) -> dict[str, str]:
    """The settings below a path, each with its meaning: those in use with their values, and those
    that could be made under a name of the user's choice with their defaults."""
    rows = {
        f"{key}={'...' if now.values[key] == OMITTED else as_typed(now.values[key])}": entry.meaning
        for key, entry in now.settings.items()
        if key.startswith(path)
    }
    used = {entry._replace(kind="") for entry in now.settings.values()}
    for entry in _all_entries():
        if entry.key.startswith(path) and "*" in entry.key and entry._replace(kind="") not in used:
            kind = f"   [kind={entry.kind}]" if entry.kind else ""
            rows[f"{entry.key.replace('*', 'NAME')}={entry.default}{kind}"] = entry.meaning
    return rows


@cache
def _all_entries() -> tuple[Entry, ...]:
    return tuple(entries(Config))
