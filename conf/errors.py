"""The four kinds of errors, told apart by type.

    ConfigError       a setting is wrong: the user changes it           exit code 2, no restart
    DataError         the text is not what it should be: the user        exit code 2, no restart
                      mends the data, or a setting that names it
    TransientError    a server, disk or network fails for now: the       exit code 75, requeued
                      same command may succeed later
    anything else     a fault of the program, with its traceback         exit code 1, restarted

The exit codes are those of `train.exit_codes.ExitCode`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

UNSET: Any = object()
"""The value of a setting that is not shown, because it was not given or says nothing."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    >>> print(Problem("model.K", 3, "vanilla feeds each token once", "set model.K=1"))
    model.K=3: vanilla feeds each token once; set model.K=1

    Attributes:
        key: the full name of the setting, such as `model.K`.
        value: what it was set to; `UNSET` where that is not shown.
        expected: what would be right, or why this cannot be.
        hint: what to do; empty where `expected` says it already.
        others: full names of the other settings that this problem is about.
    """

    key: str
    value: Any = UNSET
    expected: str = ""
    hint: str = ""
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        setting = self.key if self.value is UNSET else f"{self.key}={spelled(self.value)}"
        return f"{setting}: {self.expected}" + (f"; {self.hint}" if self.hint else "")


def spelled(value: Any) -> str:
    """A value as a person reads it: YAML's words, quotes around text.

    >>> [spelled(value) for value in (True, None, "a b", 1e-3, (1, 2))]
    ['true', 'null', "'a b'", '0.001', '[1, 2]']
    """
    match value:
        case True | False:
            return str(value).lower()
        case None:
            return "null"
        case tuple() | list():
            return f"[{', '.join(map(spelled, value))}]"
    return repr(value)


class ConfigError(ValueError):
    """Everything that is wrong with what the user asked for, one line each.

    Attributes:
        problems: each a `Problem`, or a sentence where there is no setting to name.
    """

    def __init__(
        self, problems: Iterable["Problem | str"], place: str = "the configuration"
    ) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        title = f"{count} problem{'s' if count > 1 else ''} in {place}:"
        super().__init__("\n  ".join([title, *map(str, self.problems)]))


class DataError(ValueError):
    """Text that is missing, damaged, or not what it should be; says where, and what to do."""


class TransientError(RuntimeError):
    """Something around the program fails, and may work the next time; says what, and what to do."""
