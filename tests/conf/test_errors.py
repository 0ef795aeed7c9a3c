"""Claims about `conf.errors`: problems are values, and survive the way to another process."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import UNSET, ConfigError, Problem, reason_of
from train.config import Config
from train.settings.train import TrainConfig

PYTHON = {"kind": "python"}


def problems(values: dict[str, object]) -> tuple[Problem | str, ...]:
    with pytest.raises(ConfigError) as refusal:
        Config.from_dict({"data": {"sources": {"python": PYTHON}}} | values)
    return refusal.value.problems


def test_an_error_survives_pickling() -> None:
    error = ConfigError(
        [
            Problem("model.K", 3, "vanilla feeds each token once", others=("model.variant",)),
            Problem("model.windw", UNSET, "unknown key", "Did you mean model.window?"),
            "a sentence",
        ],
        "the arguments",
    )
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ConfigError)
    assert (str(again), again.problems, again.where) == (str(error), error.problems, error.where)
    assert again.problems[1].value is UNSET


def test_equal_problems_are_told_once() -> None:
    twice = ConfigError([Problem("a", [1], "wrong"), Problem("a", [1], "wrong"), "b"])
    assert str(twice) == "2 problems in the configuration:\n  a=[1]: wrong\n  b"


def test_a_problem_names_key_value_expectation_and_hint() -> None:
    [problem] = problems({"model": {"variant": "vanilla", "K": 3}})
    assert problem == Problem(
        key="model.K",
        value=3,
        expected="vanilla feeds each token once",
        hint="set model.K=1 or choose model=naive_repeat, phd, phd_swa or phd_cswa",
        others=("model.variant",),
    )


def test_a_section_with_a_name_of_the_users_choice_is_named() -> None:
    sources = {"web": PYTHON | {"weight": -1}, "books": PYTHON | {"epochs": 0}}
    found = problems({"data": {"sources": sources}})
    assert [(problem.key, problem.value) for problem in found if isinstance(problem, Problem)] == [
        ("data.sources.web.weight", -1.0),
        ("data.sources.books.epochs", 0),
    ]


def test_a_part_that_is_built_alone_carries_its_problems_too() -> None:
    with pytest.raises(ConfigError) as refusal:
        TrainConfig(seq_len=0)
    assert [problem.key for problem in refusal.value.problems] == ["train.seq_len"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TimeoutError(), "TimeoutError"),
        (MemoryError(), "MemoryError"),
        (ValueError("  "), "ValueError"),
        (OSError("", ""), "OSError"),
        (OSError(None, None), "OSError"),
        (OSError(5, ""), "[Errno 5] Input/output error"),
        (
            FileNotFoundError(2, "No such file or directory", "a b"),
            "No such file or directory: 'a b'",
        ),
        (KeyError("text"), "KeyError: 'text'"),
        (KeyError(), "KeyError"),
        (RuntimeError("first\n\n  second"), "first second"),
    ],
)
def test_the_reason_of_any_error_is_told_in_words_on_one_line(error: Exception, said: str) -> None:
    assert reason_of(error).removeprefix("[Errno 2] ") == said


ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("conf", "data", "phd", "train", "launch")
    for path in ROOT.glob(f"{folder}/**/*.py")
]


def bare_reasons(source: str, own: set[str]) -> Iterator[int]:
    """Lines with an f-string that shows a library's error as it is, and not its `reason_of`."""
    for handler in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ExceptHandler)):
        caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        if {ast.unparse(kind).rpartition(".")[2] for kind in caught if kind} <= own:
            continue  # the project's own errors always have a text
        for text in (n for n in ast.walk(handler) if isinstance(n, ast.JoinedStr)):
            shown = {ast.unparse(v.value) for v in text.values if isinstance(v, ast.FormattedValue)}
            named = f"type({handler.name}).__name__" in shown
            if {str(handler.name), f"str({handler.name})"} & shown and not named:
                yield text.lineno


def test_no_message_shows_an_error_that_may_have_no_text_as_it_is() -> None:
    trees = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    classes = [
        n
        for text in trees.values()
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.ClassDef)
    ]
    own = {node.name for node in classes}
    found = [f"{path}:{line}" for path, text in trees.items() for line in bare_reasons(text, own)]
    assert not found, f"write {{reason_of(error)}}, from conf.errors, instead of {{error}}: {found}"


def test_an_error_that_is_shown_as_it_is_is_found() -> None:
    source = "try: f()\nexcept OSError as error: raise Mine(f'cannot ({error})')"
    assert list(bare_reasons(source, {"Mine"})) == [2]
    assert list(bare_reasons(source.replace("OSError", "Mine"), {"Mine"})) == []
    assert list(bare_reasons(source.replace("{error}", "{reason_of(error)}"), {"Mine"})) == []
