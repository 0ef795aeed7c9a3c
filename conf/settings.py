"""What all configuration dataclasses have in common; needs nothing but the standard library."""

from math import inf
from typing import Any

from conf.errors import ConfigError, Problem


class Settings:
    """A configuration value that cannot be built with an impossible setting."""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ConfigError(problems)

    def problems(self) -> list[Problem]:
        """Every impossible setting or combination of settings."""
        return []

    def unused(self) -> list[Problem]:
        """The settings that change nothing, because of what others are.

        A file of conf/ or an earlier run may give them any value. Only typing one is an error.
        """
        return []


def at_least(config: Any, section: str, least: float, *names: str) -> list[Problem]:
    """A problem for each named setting that is below `least` or not finite; None always passes.

    >>> from types import SimpleNamespace
    >>> [str(problem) for problem in at_least(SimpleNamespace(K=0), "model", 1, "K")]
    ['model.K=0: expected an integer of at least 1']

    Args:
        config: has the settings as attributes.
        section: what stands before the dot in the settings' full names; empty for none.
        least: an int for settings that are integers, a float for numbers.
        names: of the settings.
    """
    kind = "an integer" if isinstance(least, int) else "a number"
    return [
        Problem(full_name(section, name), value, f"expected {kind} of at least {least:g}")
        for name in names
        if (value := getattr(config, name)) is not None and not least <= value < inf
    ]


def without_effect(config: Any, section: str, reason: str, hint: str, *names: str) -> list[Problem]:
    """A problem for each named setting, which changes nothing for a reason that they share.

    >>> from types import SimpleNamespace
    >>> model, hint = SimpleNamespace(chunk=32), "choose model=phd_cswa"
    >>> print(*without_effect(model, "model", "phd has no chunks", hint, "chunk"))
    model.chunk=32: phd has no chunks; leave it out, or choose model=phd_cswa
    """
    return [
        Problem(full_name(section, name), getattr(config, name), reason, f"leave it out, or {hint}")
        for name in names
    ]


LONGEST_S = 1e9
"""Seconds, 31 years: less than the 2^63 nanoseconds that operating systems count timeouts in."""


def above(config: Any, section: str, bound: float, *names: str) -> list[Problem]:
    """A problem for each named setting that is not above `bound`; None always passes."""
    return [
        Problem(full_name(section, name), value, f"expected a number above {bound:g}")
        for name in names
        if (value := getattr(config, name)) is not None and not value > bound
    ]


def seconds_to_wait(config: Any, section: str, *names: str) -> list[Problem]:
    """A problem for each named setting that is no time that a thread or a socket can wait for."""
    return [
        Problem(full_name(section, name), value, f"expected seconds above 0, at most {LONGEST_S:g}")
        for name in names
        if not 0 < (value := getattr(config, name)) <= LONGEST_S
    ]


def full_name(section: str, name: str) -> str:
    """A setting's name on the command line.

    >>> full_name("model", "K"), full_name("", "seed")
    ('model.K', 'seed')
    """
    return f"{section}.{name}" if section else name
