"""The four kinds of errors, told apart by type.

ConfigError       a setting is wrong: the user changes it           exit code 2, no restart
DataError         the text is not what it should be: the user        exit code 2, no restart
                  mends the data, or a setting that names it
TransientError    a server, disk or network fails for now: the       exit code 75, requeued
                  same command may succeed later
anything else     a fault of the program, with its traceback         exit code 1, restarted

"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from conf.exit_codes import ExitCode
from conf.wording import plural


class Unset(Enum):
    """The type of `UNSET`, which stands for a value that is not shown.

    An Enum, because its member is still the same object after a problem was pickled and sent to
    another process.
    """

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    >>> print(Problem("model.K", 3, "vanilla feeds each token once", "set model.K=1"))
    model.K=3: vanilla feeds each token once; set model.K=1

    A hint that is a sentence of its own, with a capital letter, stands after a full stop:

    >>> print(Problem("model.windw", expected="unknown key", hint="Did you mean model.window?"))
    model.windw: unknown key. Did you mean model.window?

    Attributes:
        key: the full name of the setting, such as `model.K`. A section that has a name of the
            user's choice does not know it, and writes `*` instead: `data.sources.*.weight`.
        value: what it was set to; `UNSET` where that is not shown.
        expected: what would be right, or why this cannot be.
        hint: what to do; empty where `expected` says it already.
        others: full names of the other settings that this problem is about. If one of them is
            wrong by itself, this problem is not reported.
    """

    key: str
    value: Any = UNSET
    expected: str = ""
    hint: str = ""
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        setting = self.key if self.value is UNSET else f"{self.key}={spelled(self.value)}"
        join = ". " if self.hint[:1].isupper() else "; "
        return f"{setting}: {self.expected}" + (f"{join}{self.hint}" if self.hint else "")

    def named(self, section: str) -> "Problem":
        """The problem with the real name of its section in place of the `*` in its keys.

        >>> print(Problem("data.sources.*.weight", -1, "too low").named("data.sources.web"))
        data.sources.web.weight=-1: too low
        """
        parent, _, _ = section.rpartition(".")
        if not parent:
            return self
        keys = [key.replace(f"{parent}.*.", f"{section}.") for key in (self.key, *self.others)]
        return replace(self, key=keys[0], others=tuple(keys[1:]))


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
        problems: each a `Problem`, or a sentence where there is no setting to name. Of those
            with the same text one is kept.
        where: the words of the title that say where the problems are.
    """

    def __init__(self, problems: Iterable[Problem | str], where: str = "the configuration") -> None:
        self.problems = tuple({str(problem): problem for problem in problems}.values())
        self.where = where
        count = len(self.problems)
        title = f"{plural(count, 'problem')} in {where}:"
        super().__init__("\n  ".join([title, *map(str, self.problems)]))

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is otherwise rebuilt from its message alone, whose letters would become the
        # problems. A rank that refuses a configuration sends its error to all others.
        return ConfigError, (self.problems, self.where)


class DataError(ValueError):
    """Text that is missing, damaged, or not what it should be; says where, and what to do."""


class TransientError(RuntimeError):
    """Something around the program fails, and may work the next time; says what, and what to do."""


def reason_of(error: BaseException) -> str:
    """What an error says, on one line; the name of its type where it says nothing.

    Every message that tells why something failed takes the reason from here. Many errors of
    sockets, locks and libraries have no text, and would leave empty brackets.

    >>> errors = ValueError("no\\n  such thing"), TimeoutError(), KeyError("text")
    >>> [reason_of(error) for error in errors]
    ['no such thing', 'TimeoutError', "KeyError: 'text'"]
    """
    said = " ".join(str(error).split())
    if isinstance(error, OSError) and len(error.args) > 1 and not error.strerror:
        number = error.errno  # which Python would spell as "[Errno 5] " alone
        said = f"[Errno {number}] {os.strerror(number)}" if isinstance(number, int) else ""
    name = type(error).__name__
    return f"{name}: {said}" if isinstance(error, KeyError) and said else said or name


USER_ERRORS = (ConfigError, DataError, TransientError)
"""Errors that are printed without a traceback, because nothing is wrong with the program."""


def report(error: Exception) -> tuple[str, ExitCode]:
    """What to print about one of `USER_ERRORS`, and the exit code that follows from its type."""
    match error:
        case DataError():
            return f"1 problem in the data:\n  {error}", ExitCode.MISUSED
        case TransientError():
            return f"failed for now, the same command may go on later:\n  {error}", ExitCode.REQUEUE
    return str(error), ExitCode.MISUSED
