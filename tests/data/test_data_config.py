import pytest
from pydantic import TypeAdapter, ValidationError

from data.config import DataConfig, FilesSource, PythonSource, TokenizerConfig

PYTHON = PythonSource(kind="python")


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ValueError, match="lanes=0") as error:
        DataConfig(source=PYTHON, lanes=0, holdout=1.0, prefetch=0)
    assert str(error.value) == (
        "data.lanes=0: expected an integer of at least 1; "
        "data.prefetch=0: expected an integer of at least 1; "
        "data.holdout=1.0: expected a fraction from 0 to below 1; 0 holds nothing out"
    )


def test_the_kind_decides_which_source_plain_values_mean() -> None:
    config = TypeAdapter(DataConfig).validate_python(
        {"source": {"kind": "files", "paths": ["a.txt", "b"]}, "lanes": 2}
    )
    assert config == DataConfig(source=FilesSource(kind="files", paths=("a.txt", "b")), lanes=2)
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        TypeAdapter(DataConfig).validate_python({"source": {"kind": "file", "paths": "a.txt"}})


@pytest.mark.parametrize("paths", ["", (), ("a.txt", "")])
def test_no_path_is_an_error(paths: str | tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"data\.source\.paths=.*: expected at least one file"):
        FilesSource(kind="files", paths=paths)


def test_batches_have_to_be_divisible_by_lanes_and_lanes_by_ranks() -> None:
    config = DataConfig(source=PYTHON, lanes=8)
    assert config.batch_problems(16, world=4) == []
    rows, ranks = config.batch_problems(10, world=3)
    assert rows == (
        "train.global_batch=10: not divisible by data.lanes=8; choose a multiple of 8, or "
        "data.lanes from 1, 2, 5, 10"
    )
    assert ranks == (
        "data.lanes=8: not divisible by the 3 ranks of this run; choose a multiple of 3 for a new "
        "run, or a number of ranks from 1, 2, 4, 8"
    )


def test_a_given_tokenizer_cannot_be_given_a_size() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=300: a given tokenizer\.path has"):
        TokenizerConfig(path="a.model", vocab_size=300)
