"""Our models in lm-evaluation-harness: equal to their exports in its own class."""

import json
from collections.abc import Callable
from math import isnan, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import ConfigError, TransientError
from train.checkpoint.load_run import load_run
from train.evaluation.questions import Choice, Question, Questions

pytest.importorskip("lm_eval", reason="needs lm-eval")
pytest.importorskip("transformers", reason="needs transformers")

CONTEXTS = ["def keep(only", "return [original for token", "1 def", "keep(only, its): return "]
AFTER = [" its): return", " hidden]", " é 😀", "# token in </s>"]


class Both:
    """A run and its export, each as the harness sees it."""

    def __init__(self, run: Path, out: Path) -> None:
        from train.arguments import ExportArguments
        from train.evaluation.exported import load_exported
        from train.evaluation.harness import CachedLM
        from train.export import main

        assert main(ExportArguments(run=str(run), out=str(out))) == 0
        cpu = torch.device("cpu")
        model, tokenizer, *_ = load_run(run, cpu)
        self.ours = CachedLM(model, tokenizer)
        self.theirs = load_exported(out, cpu)

    def __iter__(self) -> Any:
        return iter((self.ours, self.theirs))


@pytest.fixture(scope="module")
def both(
    small_at: Callable[..., list[str]],
    trained: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    from train.compose import load

    folder = tmp_path_factory.mktemp("evaluated")
    trained(load(small_at(folder / "run", "train.max_steps=4")))
    return Both(folder / "run", folder / "exported")


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


PAIRS = [(context, after) for context in [*CONTEXTS, "", "x " * 60] for after in AFTER]


def test_log_likelihoods_are_those_of_the_export(both: Both) -> None:
    """Of contexts that are empty or too long, too, and with the flag of greedy decoding."""
    ours, theirs = (lm.loglikelihood(instances("loglikelihood", PAIRS)) for lm in both)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    nats = [x for x, _ in ours], [x for x, _ in theirs]
    torch.testing.assert_close(*nats, rtol=1e-5, atol=1e-5)


def test_whole_texts_have_the_log_likelihood_of_the_export(both: Both) -> None:
    """Also those that are longer than the model's context."""
    texts = [(" ".join(CONTEXTS) * n,) for n in (1, 4)] + [("x",)]
    ours, theirs = (
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for lm in both
    )
    assert len(both.ours.tok_encode(texts[1][0])) > 2 * both.ours.max_length
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_greedy_texts_are_those_of_the_export(both: Both) -> None:
    wanted = {"until": ["o"], "max_gen_toks": 6}
    asked = [(context, dict(wanted)) for context in CONTEXTS]
    ours, theirs = (lm.generate_until(instances("generate_until", asked)) for lm in both)
    # Bytes that are no text become different numbers of replacement characters.
    ours, theirs = ([text.partition("\ufffd")[0] for text in texts] for texts in (ours, theirs))
    assert ours == theirs
    assert max(map(len, ours)) > 3
    assert len(set(ours)) > 1


def questions(count: int = 12, **given: Any) -> Questions:
    """Questions with two prompts each."""
    made = [
        Question(
            tuple(
                tuple(Choice(begin + CONTEXTS[i % 4] + str(i), after) for after in AFTER)
                for begin in ("", "def ")
            ),
            i % 4,
        )
        for i in range(count)
    ]
    return Questions("made_up", 0, tuple(made), **given)


def test_scores_are_those_of_the_export_and_of_the_definition(both: Both) -> None:
    from train.evaluation.harness import measure

    asked = questions()
    ours, theirs = (measure(lm, [asked])["made_up"] for lm in both)
    assert ours == theirs
    right, right_norm = [], []
    for question in asked.questions:
        of_prompts = []
        for prompt in question.prompts:
            found = both.ours.loglikelihood(instances("loglikelihood", list(prompt)))
            scores = [(x, x / len(after)) for (x, _), (_, after) in zip(found, prompt, strict=True)]
            best = [max(range(4), key=lambda i: scores[i][k]) for k in (0, 1)]
            of_prompts.append([best[k] == question.answer for k in (0, 1)])
        right.append(sum(a for a, _ in of_prompts) / 2)
        right_norm.append(sum(b for _, b in of_prompts) / 2)
    for name, each in (("acc", right), ("acc_norm", right_norm)):
        mean = sum(each) / 12
        error = sqrt(sum((x - mean) ** 2 for x in each) / 11 / 12)
        assert ours.metrics[name].value == pytest.approx(mean)
        assert ours.metrics[name].standard_error == pytest.approx(error)
    assert (ours.questions, ours.shots, ours.chance) == (12, 0, 0.25)


def test_a_task_without_a_score_by_length_has_none(both: Both) -> None:
    from train.evaluation.harness import measure

    found = measure(both.ours, [questions(2, normalised=False)])["made_up"]
    assert list(found.metrics) == ["acc"]
    assert found.score is not None
    assert found.score.accuracy_norm is None
    names = ("acc", "acc_stderr", "shots", "questions", "chance")
    assert set(found.logged("x")) == {f"eval/x/{name}" for name in names}


def test_a_stop_ends_it_early(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.evaluation import loglikelihood
    from train.evaluation.harness import CachedLM, measure

    monkeypatch.setattr(loglikelihood, "BATCH_TOKENS", 1)
    lm = CachedLM(both.ours.model, both.ours.text_tokenizer, stop_requested=lambda: True)
    with pytest.raises(loglikelihood.StoppedError):
        measure(lm, [questions(3)])


def test_scores_of_a_model_whose_logits_are_not_finite_are_nan() -> None:
    from train.evaluation.harness import OlmoTask

    task = OlmoTask(questions(1))
    doc = task.asked.questions[0]
    found = task.process_results(doc, [(float("nan"), False)] * 8)
    assert isnan(found["acc"])


TASK = """
task: made_up_file
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/shots.jsonl, test: {folder}/test.jsonl}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness with one task, which is made as its own are, with its questions on the disk."""
    from lm_eval.tasks import TaskManager

    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path))
    lines = [
        json.dumps({"question": CONTEXTS[i % 4] + str(i), "choices": AFTER, "answer": i % 4}) + "\n"
        for i in range(9)
    ]
    (tmp_path / "shots.jsonl").write_text("".join(lines[:3]))
    (tmp_path / "test.jsonl").write_text("".join(lines[3:]))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def test_a_task_of_the_harness_is_measured_with_shots_and_a_limit(
    both: Both, own_tasks: Any
) -> None:
    from train.evaluation.harness import measure_of_harness

    ours, theirs = (
        measure_of_harness(lm, ["made_up_file"], shots=2, limit=5, manager=own_tasks) for lm in both
    )
    assert ours == theirs
    assert (ours["made_up_file"].shots, ours["made_up_file"].questions) == (2, 5)
    assert ours["made_up_file"].all_questions > 5
    assert set(ours["made_up_file"].metrics) == {"acc", "acc_norm"}


def test_an_unknown_task_of_the_harness_is_told_with_a_guess(own_tasks: Any) -> None:
    from train.evaluation.harness import load_tasks

    with pytest.raises(ConfigError, match="Did you mean made_up_file"):
        load_tasks(["made_up_fil"], own_tasks)


def test_a_task_whose_questions_cannot_be_fetched_is_told(own_tasks: Any, tmp_path: Path) -> None:
    from train.evaluation.harness import load_tasks

    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(TransientError, match="make eval-data"):
        load_tasks(["made_up_file"], own_tasks)
