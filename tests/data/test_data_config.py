import pytest
from pydantic import TypeAdapter, ValidationError

from data.config import DataConfig, FilesSource, Phase, PythonSource, TokenizerConfig

PYTHON = PythonSource(kind="python")


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ValueError, match="lanes=0") as error:
        DataConfig(sources={"python": PYTHON}, lanes=0, holdout=1.0, prefetch=0)
    assert str(error.value) == (
        "3 problems in the configuration:\n"
        "  data.lanes=0: expected an integer of at least 1\n"
        "  data.prefetch=0: expected an integer of at least 1\n"
        "  data.holdout=1.0: expected a fraction from 0 to below 1; 0 holds nothing out"
    )


def test_the_kind_decides_which_source_plain_values_mean() -> None:
    config = TypeAdapter(DataConfig).validate_python(
        {"sources": {"own": {"kind": "files", "paths": ["a.txt", "b"]}}, "lanes": 2}
    )
    source = FilesSource(kind="files", paths=("a.txt", "b"))
    assert config == DataConfig(sources={"own": source}, lanes=2)
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        TypeAdapter(DataConfig).validate_python(
            {"sources": {"own": {"kind": "file", "paths": "a.txt"}}}
        )


@pytest.mark.parametrize("paths", ["", (), ("a.txt", "")])
def test_no_path_is_an_error(paths: str | tuple[str, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"data\.sources\.\*\.paths=.*: expected at least one file"
    ):
        FilesSource(kind="files", paths=paths)


def test_batches_have_to_be_divisible_by_lanes_and_lanes_by_ranks() -> None:
    config = DataConfig(sources={"python": PYTHON}, lanes=8)
    assert config.batch_problems(16, world_size=4) == []
    rows, ranks = map(str, config.batch_problems(10, world_size=3))
    assert rows == (
        "train.global_batch=10: not divisible by data.lanes=8; choose a multiple of 8, or "
        "data.lanes from 1, 2, 5, 10"
    )
    assert ranks == (
        "data.lanes=8: not divisible by the 3 ranks that read rows; choose a multiple of 3 for a "
        "new run, or a number of such ranks from 1, 2, 4, 8"
    )


def mixed(**settings: object) -> DataConfig:
    sources = {"a": PYTHON, "b": PythonSource(kind="python", packages=True, weight=3.0)}
    return DataConfig(sources=sources, **settings)  # type: ignore[arg-type]


def test_phases_replace_the_weights_that_they_name_in_the_order_of_their_tokens() -> None:
    phases = {
        "end": Phase(after_tokens=90, weights={"b": 0.0}),
        "mid": Phase(after_tokens=5, weights={"a": 2.0}),
    }
    assert mixed(phases=phases).mixture == [
        (0, {"a": 1.0, "b": 3.0}),
        (5, {"a": 2.0, "b": 3.0}),
        (90, {"a": 2.0, "b": 0.0}),
    ]


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            {"x": Phase(after_tokens=5, weights={"c": 1.0})},
            r"data\.phases\.x\.weights\.c: no such source",
        ),
        (
            {n: Phase(after_tokens=5, weights={"a": 1.0}) for n in "xy"},
            r"\[5, 5\]: two phases cannot",
        ),
        (
            {"x": Phase(after_tokens=5, weights={"a": 0.0, "b": 0.0})},
            r"data\.sources\.\*\.weight=\[0\.0, 0\.0\]: .* above 0 from token 5 on",
        ),
    ],
)
def test_an_impossible_phase_is_an_error(phases: dict[str, Phase], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed(phases=phases)


def test_a_mixture_needs_a_source_and_names_without_dots() -> None:
    with pytest.raises(ValueError, match=r"data\.sources=\{\}: expected at least one"):
        DataConfig(sources={})
    with pytest.raises(ValueError, match=r"data\.sources\.a\.b: a name is made of"):
        DataConfig(sources={"a.b": PYTHON})


def test_a_given_tokenizer_cannot_be_given_a_size() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=300: a given tokenizer\.path has"):
        TokenizerConfig(path="a.model", vocab_size=300)
