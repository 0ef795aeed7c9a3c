"""`faults.`: what happens when something goes wrong."""

from dataclasses import dataclass
from typing import Literal

from conf.durations import Seconds
from conf.errors import Problem
from conf.settings import Settings, above, at_least, seconds_to_wait


@dataclass(frozen=True, kw_only=True)
class FaultsConfig(Settings):
    """What happens when something goes wrong. A run in which nothing does is not changed by it.

    A bad step is one whose loss or gradient norm is not finite or is a spike. It changes no weight,
    moment or step count, on any rank, and its batch is written to the run's `bad_steps/`.

    Attributes:
        policy: what follows a bad step. `skip` continues with the next batch. `rollback` loads the
            last checkpoint and leaves out the bad batch. `abort` ends the run without saving.
        spike: a loss or gradient norm that exceeds the median of the last `window` steps by this
            many robust standard deviations is a spike; null: only values that are not finite make
            a bad step.
        window: how many steps a loss is compared with. There are no spikes before half as many
            steps are done.
        most_in_a_row: this many bad steps in a row end the run, and so do more rollbacks than this
            to the same checkpoint.
        step_timeout: a step that takes longer than this, in seconds or as `30m`, counts as hung:
            every rank writes its stack to the run's `stacks/` and ends. Evaluations and saves
            between two steps count as part of the step.
        exit_timeout: how long, in seconds or as `2m`, a rank may take to save and end after a
            signal. It must be less than the launcher's `grace_s`, after which the rank is killed.
    """

    policy: Literal["abort", "skip", "rollback"] = "skip"
    spike: float | None = None
    window: int = 128
    most_in_a_row: int = 10
    step_timeout: Seconds = 1800.0
    exit_timeout: Seconds = 100.0  # less than the launcher's default grace_s=120

    def problems(self) -> list[Problem]:
        return [
            *at_least(self, "faults", 1, "most_in_a_row"),
            *at_least(self, "faults", 8, "window"),
            *above(self, "faults", 0, "spike"),
            *seconds_to_wait(self, "faults", "step_timeout", "exit_timeout"),
        ]
