"""`run.`: where the run's files are and whether an earlier run is continued."""

import re
from dataclasses import dataclass
from typing import Literal

from conf.errors import Problem
from conf.settings import Settings


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """Where the run's files are and whether an earlier run is continued.

    Attributes:
        name: the run's name; null: one is made of the variant, the size, and what differs from the
            size's defaults, such as `phd_cswa-2-16-32-tiny-lr_0.001`.
        dir: the run's directory; null: `runs/<name>` below the current directory.
        resume: `auto` continues from the newest checkpoint in the run's directory, or starts from
            step 0 if there is none. `must` continues or fails. `never` starts from step 0.
        start_from: whose weights a new run begins with: the directory of another run, which gives
            its newest checkpoint, one of its checkpoints (`runs/a/checkpoints/step_00000100`), or
            a Hugging Face directory of an OLMo 2 or Llama model. null: random weights. If it has a
            `tokenizer.model`, that is the run's tokenizer.
        start_optimizer: also take the optimizer's moments and its count of steps from there. The
            step, the learning rate and the text begin anew.
        decay_of: the directory of another run, its trunk, of which this run with `schedule=wsd` is
            a decay: it starts from the trunk's checkpoint before the decay begins, and is equal
            to a run that takes all steps itself. null: it is none.
        decays: whether the command of a trunk (`schedule=wsd_s`) also trains its decays, one after
            another. If not, each has a command of its own, with `run.decay_of`.
    """

    name: str | None = None
    dir: str | None = None
    resume: Literal["auto", "must", "never"] = "auto"
    start_from: str | None = None
    start_optimizer: bool = False
    decay_of: str | None = None
    decays: bool = True

    def problems(self) -> list[Problem]:
        found = []
        if self.start_optimizer and self.start_from is None:
            reason = "there is no other run to take the optimizer's moments from"
            hint, others = "give it as run.start_from=RUN", ("run.start_from",)
            found.append(Problem("run.start_optimizer", True, reason, hint, others))
        return found + self._name_problems()

    def _name_problems(self) -> list[Problem]:
        if self.name is None or re.fullmatch(r"[\w+-][\w.+-]*", self.name):
            return []
        why = "because it names a directory"
        if self.name.startswith("."):
            expected = f"expected a name that does not begin with a point, {why}"
        else:
            expected = f"expected letters, digits and _ . + - only, {why}"
        return [Problem("run.name", self.name, expected, "run.dir may be any path")]


def decay_name(trunk: str, length: int) -> str:
    """The name of the run that a trunk's decay makes, or its directory.

    >>> decay_name("runs/law", 80)
    'runs/law-80_steps'
    """
    return f"{trunk}-{length}_steps"
