"""The front end of the commands that take a few plain arguments: `run=<dir> prompt="..."`."""

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from conf import checkout
from conf.cache_dirs import use_writable_caches
from conf.errors import USER_ERRORS, report
from conf.standard_streams import guard_standard_streams
from conf.validation import build, defaults, keys

T = TypeVar("T")


def run(
    cls: type[T], task: Callable[[T], int] | str, *, positional: Sequence[str] = ()
) -> NoReturn:
    """Runs `task` with this process's arguments as a `cls`; its result is the exit code.

    Wrong arguments, and errors of the user's (`conf.errors.USER_ERRORS`), end the process with one
    screen and the exit code of their kind.
    `--help` prints the docstring of `cls` and its defaults.

    Args:
        cls: a dataclass with `problems()`.
        task: or the name of the module whose `main` it is; see `resolve`.
        positional: the fields that arguments without `key=` are for, in this order.
    """
    guard_standard_streams()
    use_writable_caches()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage(cls))
        sys.exit(0)
    try:
        checkout.claim()
        given = parse(cls, sys.argv[1:], positional=positional)
        code = resolve(task)(given)
    except USER_ERRORS as error:
        refuse(error)
    sys.exit(code)


def resolve(task: Callable[..., int] | str) -> Callable[..., int]:
    """The task, or the `main` of the module of this name, which is imported now.

    A command names its module, because what it imports takes seconds. That is too long for an
    answer to a misspelt argument.
    """
    return import_module(task).main if isinstance(task, str) else task


def refuse(error: Exception) -> NoReturn:
    """Prints what the user has to change, without a traceback, and ends the process."""
    text, code = report(error)
    print(text, file=sys.stderr)
    sys.exit(code)


def parse(cls: type[T], arguments: Sequence[str], *, positional: Sequence[str] = ()) -> T:
    """The `cls` that `key=value` arguments describe.

    Args:
        cls: a dataclass with `problems()`.
        arguments: `key=value` each; a value is JSON, or text where the field holds text. `--key`
            stands for `key=true`. A field that holds texts by name takes `key.NAME=text`.
        positional: the fields that arguments without `key=` are for, in this order.

    Raises:
        ConfigError: with every unknown key, missing or wrong value.
    """
    hints = get_type_hints(cls)
    names = iter(positional)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals and hints.get(key.removeprefix("--")) is bool:
            key, equals, text = key.removeprefix("--"), "=", "true"
        if not equals:  # one argument too many is then reported as an unknown key
            key, text = next(names, argument), argument
        name, dot, entry = key.partition(".")
        if dot and get_origin(hints.get(name)) is dict:  # env.NCCL_DEBUG=WARN
            values.setdefault(name, {})[entry] = text
        else:
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
