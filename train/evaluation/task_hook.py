"""Downstream tasks in the training loop."""

from collections.abc import Callable, Sequence

from data.tokenizer import Tokenizer
from train.config import Config
from train.distributed.process_groups import raise_on_all_ranks
from train.engines.engine import Engine
from train.evaluation.loglikelihood import StoppedError
from train.evaluation.questions import Questions, check_lengths, check_there, read_questions
from train.metrics.record import Metrics, StepRecord


class TaskEvaluation:
    """The accuracy in some downstream tasks, always of the same questions.

    The questions are divided among the ranks.

        eval/<task>/acc, acc_stderr              the right choice has the greatest log-likelihood
        eval/<task>/acc_norm, acc_norm_stderr    the same of log-likelihoods per character
        eval/<task>_5shot/acc, ...               with five examples before each question
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        tokenizer: Tokenizer,
        tasks: Sequence[Questions],
        stop: Callable[[], bool],
    ) -> None:
        self.every = config.eval.every
        self.engine, self.tokenizer, self.tasks, self.stop = engine, tokenizer, tasks, stop

    def __call__(self, record: StepRecord) -> Metrics:
        return {} if record.ending and record.ending.by_signal else self.measure()

    def measure(self) -> Metrics:
        """The accuracies as metrics; `{}` if `stop` ends it early."""
        # Not needed by runs without tasks, and optional.
        from train.evaluation.harness import CachedLM, measure

        metrics: Metrics = {}
        with self.engine.summon_full_params() as model:
            lm = CachedLM(
                model, self.tokenizer, groups=self.engine.groups, stop_requested=self.stop
            )
            try:
                found = measure(lm, self.tasks)
            except StoppedError:
                return {}
        for name, measured in found.items():
            metrics |= measured.logged(name)
        return metrics


def task_evaluations(
    config: Config, tokenizer: Tokenizer, engine: Engine, stop: Callable[[], bool]
) -> list[TaskEvaluation]:
    """The evaluation in downstream tasks, if there are any.

    Rank 0 reads the questions and sends them to the other ranks.

    Raises:
        ConfigError, DataError: as `questions_of_run`, on all ranks.
    """
    if not config.eval.tasks:
        return []
    groups = engine.groups
    own = raise_on_all_ranks(
        groups, lambda: questions_of_run(config, tokenizer) if groups.is_rank_zero else None
    )
    tasks = groups.broadcast(own)
    assert tasks is not None
    return [TaskEvaluation(config, engine, tokenizer, tasks, stop)]


def questions_of_run(config: Config, tokenizer: Tokenizer) -> list[Questions]:
    """The questions that a run asks during training.

    Raises:
        ConfigError: they are not on this machine, or too long for the model.
        DataError: they are damaged.
    """
    settings = config.eval
    check_there(settings.task_names, "eval.tasks")
    tasks = [
        read_questions(task, settings.task_shots, settings.task_questions)
        for task in settings.task_names
    ]
    check_lengths(tasks, tokenizer, config.model.max_seq_len, "eval.tasks")
    return tasks
