"""Downstream tasks in the loop: the same questions, on many ranks, and an end on a signal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import ConfigError
from data.tokenizer import Tokenizer
from tests.train.evaluation.olmo_wheel import QUESTIONS
from tests.train.many_ranks import run_ranks
from tests.train.metrics.test_hooks import record_of
from train.checkpoint.load_run import load_run
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.ending import Ending
from train.engines.fsdp import FsdpEngine
from train.evaluation.questions import Questions, check_lengths, read_questions
from train.evaluation.task_hook import TaskEvaluation, questions_of_run
from train.experiments.ledger import result_of
from train.experiments.task_scores import ASKED

pytest.importorskip("lm_eval", reason="needs lm-eval")
pytestmark = pytest.mark.usefixtures("unpacked")

TASKS = ("eval.tasks=[olmo_piqa,olmo_winogrande]", "eval.task_questions=6", "eval.task_shots=1")
SHORT = ("model.max_seq_len=8", "train.seq_len=8", "hooks.sample.tokens=2")
ACCURACIES = ("acc", "acc_stderr")


def test_a_run_logs_what_its_checkpoint_scores(
    config: Callable[..., Config], trained: Callable[..., Any], logged: Callable[..., Any]
) -> None:
    from train.evaluation.harness import CachedLM, measure

    settings = config(*TASKS, "eval.every=3", "model.max_seq_len=256")
    trained(settings)
    model, tokenizer, step, _ = load_run(settings.run_dir, torch.device("cpu"))
    tasks = [read_questions(name, 1, 6) for name in settings.eval.task_names]
    wanted = {}
    for name, found in measure(CachedLM(model, tokenizer), tasks).items():
        wanted |= found.logged(name)
    lines = [line for line in logged(settings.run_dir) if "eval/olmo_piqa_1shot/acc" in line]
    assert [line["step"] for line in lines] == [3, 6]
    assert step == 6
    assert {key: lines[-1][key] for key in wanted} == wanted
    piqa = {f"eval/olmo_piqa_1shot/{name}" for name in (*ACCURACIES, "acc_norm", "acc_norm_stderr")}
    plain = {f"eval/olmo_winogrande_1shot/{name}" for name in ACCURACIES}
    asked = {f"eval/{name}_1shot/{x}" for name in settings.eval.task_names for x in ASKED}
    assert set(wanted) == piqa | plain | asked
    # They are part of the run's result, as of six questions of all.
    scores = result_of(settings.run_dir).tasks
    assert scores.keys() == {"olmo_piqa_1shot", "olmo_winogrande_1shot"}
    score = scores["olmo_piqa_1shot"]
    assert score.accuracy.value == wanted["eval/olmo_piqa_1shot/acc"]
    assert (score.shots, score.questions, score.all_questions) == (1, 6, QUESTIONS)


def scores(groups: ProcessGroups, config: Config, tasks: list[Questions]) -> dict[str, Any]:
    """What an engine with new weights scores; asks how often a stop was asked for."""
    tokenizer = Tokenizer.load(config.run_dir / "tokenizer.model")
    engine = FsdpEngine(config, groups)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return False

    hook = TaskEvaluation(config, engine, tokenizer, tasks, stop)
    return hook.measure() | {"asked": asked}


@pytest.mark.process
def test_ranks_with_sharded_weights_share_the_questions(
    config: Callable[..., Config], trained: Callable[..., Any]
) -> None:
    settings = config(*TASKS, "train.max_steps=1", "model.max_seq_len=256")
    trained(settings)
    tasks = questions_of_run(settings, Tokenizer.load(settings.run_dir / "tokenizer.model"))
    alone = scores(ProcessGroups(), settings, tasks)
    for found in run_ranks(2, scores, settings, tasks):
        assert found == alone


def test_whoever_waits_for_the_end_is_not_kept_waiting(
    config: Callable[..., Config], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.evaluation import loglikelihood

    run = opened(config(*TASKS))
    hook = run.evaluations[-1]
    assert isinstance(hook, TaskEvaluation)
    assert hook(record_of(ending=Ending.SIGTERM)) == {}
    monkeypatch.setattr(loglikelihood, "BATCH_TOKENS", 1)
    hook.stop = lambda: True
    assert hook(record_of(ending=Ending.FINISHED)) == {}


def test_missing_questions_are_told_before_training(
    config: Callable[..., Config],
    opened: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PHD_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"eval\.tasks.*make eval-data"):
        opened(config(*TASKS))


def test_a_choice_that_is_too_long_for_the_model_is_told_before_training(
    config: Callable[..., Config], opened: Callable[..., Any]
) -> None:
    asked = config("eval.tasks=[olmo_piqa,olmo_mmlu]", *SHORT)
    told = r"eval\.tasks='?olmo_mmlu'?: has a choice of \d+ tokens, and model\.max_seq_len=8"
    with pytest.raises(ConfigError, match=told):
        opened(asked)


@pytest.mark.parametrize("room", [-1, 0])
def test_choices_are_as_long_as_the_harness_counts_them(
    room: int, config: Callable[..., Config], opened: Callable[..., Any]
) -> None:
    from train.evaluation.harness import CachedLM

    run = opened(config())
    tasks = [read_questions(name) for name in ("olmo_piqa", "olmo_winogrande")]
    lm = CachedLM(run.engine.model, run.tokenizer)
    for task in tasks:
        choices = [c for question in task.questions for prompt in question.prompts for c in prompt]
        longest = max(len(lm._encode_pair(*choice)[1]) for choice in choices)
        if room < 0:
            with pytest.raises(ConfigError, match=f"has a choice of {longest} tokens"):
                check_lengths([task], run.tokenizer, longest - 1, "tasks")
        else:
            check_lengths([task], run.tokenizer, longest, "tasks")


def test_a_misspelt_task_is_told(small: Callable[..., list[str]]) -> None:
    from train.compose import load

    with pytest.raises(ConfigError, match="olmo_piqa"):
        load(small("eval.tasks=[olmo_pica]"))
