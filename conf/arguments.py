"""The front end of the commands that take a few plain arguments: `run=<dir> prompt="..."`."""

import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import zip_longest
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from conf import checkout
from conf.cache_dirs import use_writable_caches
from conf.descriptions import entries, explanation, listed, summary
from conf.errors import USER_ERRORS, ConfigError, Problem, report
from conf.standard_streams import guard_standard_streams
from conf.validation import build, did_you_mean, nearest

T = TypeVar("T")


def run(
    cls: type[T], task: Callable[[T], int] | str, *, positional: Sequence[str] = ()
) -> NoReturn:
    """Runs `task` with this process's arguments as a `cls`; its result is the exit code.

    Wrong arguments, and errors of the user's (`conf.errors.USER_ERRORS`), end the process with one
    screen and the exit code of their kind.
    `--help` prints what `cls` is for and its settings, and `--explain KEY` all about one of them.

    Args:
        cls: a dataclass with `problems()`.
        task: or the name of the module whose `main` it is; see `resolve`.
        positional: the fields that arguments without `key=` are for, in this order.
    """
    guard_standard_streams()
    use_writable_caches()
    try:
        checkout.claim()
        if page := help_page(cls, sys.argv[1:]):
            print(page)
            sys.exit(0)
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


def help_page(cls: Any, texts: Sequence[str]) -> str:
    """What `--help` or `--explain KEY` prints; empty if neither is asked for.

    Raises:
        ConfigError: there is nothing of the name that is to be explained.
    """
    if {"-h", "--help"} & set(texts):
        return usage(cls)
    key = to_explain(texts)
    if key is None:
        return ""
    known = {entry.key: entry for entry in entries(cls)}
    if key not in known:
        hint = did_you_mean(nearest(key, known)) or f"there is {', '.join(known)}"
        raise ConfigError([Problem(key, expected="no setting", hint=hint)], "the arguments")
    return explanation(known[key], key)


def to_explain(texts: Sequence[str]) -> str | None:
    """The KEY of `--explain KEY` or `--explain=KEY`; None if nothing is to be explained.

    >>> to_explain(["local", "--explain", "grace_s"]), to_explain(["--explain=n"]), to_explain([])
    ('grace_s', 'n', None)
    """
    for text, following in zip_longest(texts, texts[1:], fillvalue=""):
        option, equals, key = text.partition("=")
        if option == "--explain":
            return key if equals else following
    return None


def usage(cls: Any) -> str:
    """What `cls` is for, and its settings with their defaults as a user would type them."""
    rows = {}
    for entry in entries(cls):
        default = "..." if entry.default == "required" else entry.default
        rows[f"{entry.key}={default}"] = entry.meaning
    return f"{summary(cls)}\n\n{listed(rows)}"


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
