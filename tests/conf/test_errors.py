"""Claims about `conf.errors`: problems are values, and survive the way to another process."""

import pickle

import pytest

from conf.errors import UNSET, ConfigError, Problem
from train.config import Config, TrainConfig

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
