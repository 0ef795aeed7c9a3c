"""The front end of the commands that take a few plain arguments: `run=<dir> prompt="..."`."""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from conf.errors import ConfigError
from conf.validation import build, defaults, keys

T = TypeVar("T")
USAGE_ERROR = 2  # train.exit_codes.ExitCode.MISUSED, which this package cannot import


def run(cls: type[T], task: Callable[[T], int], *, positional: Sequence[str] = ()) -> NoReturn:
    """Runs `task` with this process's arguments as a `cls`; its result is the exit code.

    Wrong arguments, and a `ConfigError` of the task, end the process with code 2 and one screen.
    `--help` prints the docstring of `cls` and its defaults.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(cls))
        sys.exit(0)
    try:
        code = task(parse(cls, sys.argv[1:], positional=positional))
    except ConfigError as error:
        refuse(error)
    sys.exit(code)


def refuse(error: ConfigError) -> NoReturn:
    """Prints what the user has to change, without a traceback, and ends the process."""
    print(error, file=sys.stderr)
    sys.exit(USAGE_ERROR)


def parse(cls: type[T], arguments: Sequence[str], *, positional: Sequence[str] = ()) -> T:
    """The `cls` that `key=value` arguments describe.

    Args:
        cls: a dataclass with `problems()`.
        arguments: `key=value` each; a value is JSON, or text where the field holds text.
        positional: the fields that arguments without `key=` are for, in this order.

    Raises:
        ConfigError: with every unknown key, missing or wrong value.
    """
    hints = get_type_hints(cls)
    names = iter(positional)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:  # one argument too many is then reported as an unknown key
            key, text = next(names, argument), argument
        values[key] = _value(hints.get(key), text)
    return build(cls, values, "the arguments")


def usage(cls: Any) -> str:
    """The docstring of `cls` and its settings with their defaults, as a user would type them."""
    shown = dict.fromkeys(keys(cls), "...") | defaults(cls)
    lines = [
        f"  {key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in shown.items()
    ]
    return "\n".join([f"{inspect.getdoc(cls)}\n", *lines])


def _value(hint: Any, text: str) -> Any:
    """Reads an argument's text as JSON, unless the field holds text.

    `null` is None if the field may be None. A field of several values takes a JSON list, or one
    value without brackets.

    >>> _value(int, "3"), _value(str, "3"), _value(str | None, "null"), _value(float, "1e-3")
    (3, '3', None, 0.001)
    >>> _value(tuple[str, ...], "def"), _value(tuple[str, ...], '["a", "b"]')
    (['def'], ['a', 'b'])
    >>> _value(tuple[int, ...], "3"), _value(tuple[int, ...], "[3, 4]")
    ([3], [3, 4])
    """
    if get_origin(hint) is tuple:
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            values = text
        if isinstance(values, list):
            return values
        return [text if str in get_args(hint) and not isinstance(values, str) else values]
    holds = get_args(hint) or (hint,)
    if str in holds and not (text == "null" and type(None) in holds):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # `build` reports that its type is wrong, and what was expected
