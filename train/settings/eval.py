"""`eval.`: when the loss on held-out documents is measured, and what else."""

from dataclasses import dataclass
from typing import Literal

from conf.errors import Problem
from conf.settings import Settings, at_least
from conf.task_names import MOST_SHOTS, OlmoTask, without_paper


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings):
    """When the loss on held-out documents is measured, and what else. It is also done at the end.

    Attributes:
        every: the steps between two evaluations; 0: only at the end.
        rows: how many rows of T tokens each evaluation reads.
        tasks: downstream tasks that are measured as well, such as `[olmo_hellaswag, olmo_piqa]`;
            `[paper]` stands for the seven of arXiv 2504.14992. `make eval-data` fetches their
            questions. An empty list: none.
        task_questions: how many questions of each task are asked, always the same ones.
        task_shots: solved examples in front of each question, at most 5; `olmo_mmlu_var` asks each
            question in seven ways, with up to 5.
    """

    every: int = 100
    rows: int = 128
    tasks: tuple[OlmoTask | Literal["paper"], ...] = ()
    task_questions: int = 200
    task_shots: int = 0

    def problems(self) -> list[Problem]:
        found = at_least(self, "eval", 0, "every", "task_shots")
        if self.task_shots > MOST_SHOTS:
            expected = f"expected at most {MOST_SHOTS}: there are no more examples"
            found.append(Problem("eval.task_shots", self.task_shots, expected))
        return found + at_least(self, "eval", 1, "rows", "task_questions")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, each once, with the paper's in place of `paper`."""
        return without_paper(self.tasks)
