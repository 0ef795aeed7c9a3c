"""The front end of the commands that take a few plain arguments: `run=<dir> prompt="..."`."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from itertools import zip_longest
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from conf import checkout
from conf.cache_dirs import use_writable_caches
from conf.completion import completion
from conf.descriptions import entries, explanation, listed, summary
from conf.errors import USER_ERRORS, ConfigError, Problem, report
from conf.exit_codes import ExitCode
from conf.standard_streams import guard_standard_streams
from conf.validation import build, closest, did_you_mean, keys, nearest

T = TypeVar("T")
DASHES = "-\N{EN DASH}\N{EM DASH}"  # word processors make the others of two hyphens
OPTIONS = ("help", "explain", "cfg", "multirun", "dry")
"""Options that a misspelt one is compared with."""


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
    if not isinstance(task, str):
        return task
    try:
        return import_module(task).main
    except KeyboardInterrupt:  # nothing was begun; where the import was is of no interest
        sys.exit(ExitCode.INTERRUPTED)


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
    entries: dict[str, dict[str, Any]] = {}
    words = ((text, text.removeprefix("--")) for text in arguments)
    typed = [f"{word}=true" if hints.get(word) is bool else text for text, word in words]
    typed, problems = misread(typed, keys(cls))
    for argument in typed:
        key, equals, text = argument.partition("=")
        if not equals:  # one argument too many is then reported as an unknown key
            key, text = next(names, argument), argument
        name, dot, entry = key.partition(".")
        if dot and get_origin(hints.get(name)) is dict:  # env.NCCL_DEBUG=WARN
            entries.setdefault(name, {})[entry] = text if equals else None
        else:
            values[key] = _value(hints.get(key), text)
    for name, found in entries.items():
        whole = values.setdefault(name, {})
        values[name] = whole | found if isinstance(whole, dict) else whole
    try:
        built = build(cls, values, "the arguments")
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems, "the arguments")
    return built


def misread(
    texts: Iterable[str], known: Sequence[str], choices: Mapping[str, str] | None = None
) -> tuple[list[str], list[Problem | str]]:
    """Arguments as they were probably meant, and a problem for each that was typed otherwise.

    They are problems, since a guess may be wrong; they are read as they were meant, so that nothing
    else is reported in consequence.

    >>> known = ["model", "model.K", "data.sources.*.paths"]
    >>> rest, found = misread(["seed=1", "--model", "phd", "--model.k=3", "model.K", "3"], known)
    >>> rest
    ['seed=1', 'model=phd', 'model.K=3', 'model.K=3']
    >>> for problem in found: print(problem)
    --model phd: a setting is key=value, without dashes. Did you mean model=phd?
    --model.k=3: a setting is key=value, without dashes. Did you mean model.K=3?
    model.K 3: a setting is key=value. Did you mean model.K=3?

    Args:
        texts: the arguments, in the order in which they were typed.
        known: the full names of all settings; `*` stands for any name.
        choices: words that only one setting takes, with this setting.
    """
    rest: list[str] = []
    problems: list[Problem | str] = []
    left = list(texts)
    while left:
        text = left.pop(0)
        key, equals, value = text.lstrip(DASHES).partition("=")
        dashed = text[:1] in DASHES and text != ""
        before, colon, after = key.partition(":")
        apart = True  # the value is there, but not joined to the key by a sign alone
        if equals and not value and left and _is_value(left[0]):
            value = left.pop(0)
            text = f"{text} {value}"
        elif not equals and left and left[0].startswith("="):
            value = left.pop(0)[1:]
            text = f"{text} ={value}"
        elif not equals and colon and any(fnmatchcase(before, name) for name in known):
            key, value = before, after
        else:
            apart = False
        exact = any(fnmatchcase(key, name) for name in known)
        alone = not (equals or dashed or exact) and key in (choices or {})
        if not (dashed or apart or alone) and (equals or not (exact or "." in key)):
            rest.append(text)
            continue
        option = dashed and not exact and closest(key, OPTIONS)
        meant = key if exact else None if option else nearest(key, known)
        if alone and not apart:
            meant, value = (choices or {})[key], key
        elif meant and not equals and not apart and left and _is_value(left[0]):
            value = left.pop(0)
            text = f"{text} {value}"
        elif not (dashed or apart):  # a key without a value
            rest.append(text)
            continue
        problems.append(_meant(text, meant, value, dashed=dashed))
        rest += [f"{meant}={value}"] if meant and value else []
    return rest, problems


def own_arguments(cls: Any, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The arguments that set something of `cls`, in whatever form they were typed, and the others.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Job:
    ...     nodes: int = 1
    ...     dry: bool = False
    >>> own_arguments(Job, ["nodes=2", "K=3", "--nodes", "4", "--dry", "phd"])
    (['nodes=2', '--nodes', '4', '--dry'], ['K=3', 'phd'])
    """
    hints = get_type_hints(cls)
    own: list[str] = []
    others: list[str] = []
    left = list(texts)
    while left:
        text = left.pop(0)
        key, equals, _ = text.lstrip("-").partition("=")
        name = key.partition(".")[0]  # `env` of env.NCCL_DEBUG=WARN
        (own if name in hints else others).append(text)
        if name in hints and not equals and hints[name] is not bool and left and _is_value(left[0]):
            own.append(left.pop(0))
    return own, others


def _is_value(text: str) -> bool:
    """Whether an argument may be the value of the one before it: `3`, `-1`, `a b`, but not `-m`."""
    return "=" not in text and (not text.startswith("-") or text[1:2].isdigit())


def _meant(text: str, key: str | None, value: str, *, dashed: bool) -> Problem:
    if key is None:
        guess = closest(text.lstrip("-"), OPTIONS)
        hint = did_you_mean(guess and f"--{guess}") or "--help lists options and settings"
        return Problem(text, expected="unknown option", hint=hint)
    expected = "a setting is key=value" + (", without dashes" if dashed else "")
    quoted = shlex.quote(value) if value else "VALUE"
    return Problem(text, expected=expected, hint=did_you_mean(f"{key}={quoted}"))


def help_page(cls: Any, texts: Sequence[str]) -> str:
    """What `--help`, `--explain KEY` or `-sc` prints; empty if none of them is asked for.

    Raises:
        ConfigError: there is nothing of the name that is to be explained.
    """
    if (answer := completion(texts, entries(cls), {})) is not None:
        return answer or " "
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
    >>> _value(dict[str, str], '{"NCCL_DEBUG": "WARN"}')
    {'NCCL_DEBUG': 'WARN'}
    """
    if get_origin(hint) is dict:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text  # see below
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
