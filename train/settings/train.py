"""`train.`: how long the run is and how much it reads in each step."""

from dataclasses import dataclass
from math import ceil, inf
from typing import Literal

from conf.durations import Seconds
from conf.errors import ConfigError, Problem
from conf.settings import Settings, at_least, without_effect
from phd.config import ModelConfig

DEFAULT_STEPS = 320  # 0.66 M tokens with the default batch: minutes on two CPU cores
LENGTHS = (
    *("train.max_steps", "train.max_tokens", "train.max_tokens_per_parameter"),
    "train.max_flops",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How long the run is and how much it reads in each step.

    Attributes:
        max_steps: the length in optimizer steps; null: no limit of this kind. If several limits are
            set, the run ends at the one that it reaches first; if none is, it has 320 steps.
        max_tokens: the length in tokens of text, whatever K is; the run has as many whole steps as
            fit into it. null: no limit of this kind.
        max_tokens_per_parameter: the length in tokens for each of the model's parameters, with the
            embedding, so that all sizes are trained equally far; about 20 are compute-optimal
            (arXiv 2203.15556). null: no limit of this kind.
        max_flops: the length in training FLOPs, so that runs of different K cost the same; the run
            has as many whole steps as fit into it. A step counts as rows of one document each:
            isolated documents and padding need fewer. null: no limit of this kind.
        flops_of: a variant by its name, such as `phd_cswa-2`; what the name leaves out, as W and C
            here, is as in this run. The other limits are this variant's, and the run has as many
            whole steps as fit into the FLOPs that it would take: a cheaper model reads more text.
            null: the limits are the run's own.
        max_time: a limit in seconds, or as `30m` or `2h`, for each start of the command; null: no
            limit of this kind. Only `schedule=constant` can do without one of the others.
        global_batch: how many rows an optimizer step has, over all ranks.
        micro_batch: how many rows of a rank go through one forward and backward pass; null: all
            rows of the rank. `auto`: the most whose predicted memory fits the device, with the
            least activation checkpointing with which at least one row does.
        seq_len: T, the tokens of a row.
        profile: profile a few steps on rank 0: a trace, the memory's history on CUDA, and a table
            of where the time of a step goes, in the folder `profile` of the run's directory.
        profile_start: the first step that is profiled, counted from the beginning of the run; the
            first steps compile and warm up.
        profile_steps: how many steps are profiled.
    """

    max_steps: int | None = None
    max_tokens: int | None = None
    max_tokens_per_parameter: float | None = None
    max_flops: float | None = None
    flops_of: str | None = None
    max_time: Seconds | None = None
    global_batch: int = 8
    micro_batch: Literal["auto"] | int | None = None
    seq_len: int = 256
    profile: bool = False
    profile_start: int = 11
    profile_steps: int = 3

    def problems(self) -> list[Problem]:
        positive = ["max_steps", "max_tokens", "global_batch", "seq_len"]
        positive += ["profile_start", "profile_steps"]
        rows = self.micro_batch
        if rows != "auto":
            positive.append("micro_batch")
        found = at_least(self, "train", 1, *positive)
        if self.max_time is not None and self.max_time <= 0:
            expected = "expected more than 0 seconds"
            found.append(Problem("train.max_time", self.max_time, expected))
        for name in ("max_tokens_per_parameter", "max_flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                expected = "expected a number above 0, or null"
                found.append(Problem(f"train.{name}", value, expected))
        if rows is None or rows == "auto" or rows > 0:
            found += self.problems_on(1)
        if 0 < (self.max_tokens or 0) < self.tokens_per_step:
            found.append(
                Problem(
                    "train.max_tokens",
                    self.max_tokens,
                    f"less than one step, which is train.global_batch={self.global_batch} rows of "
                    f"train.seq_len={self.seq_len} tokens = {self.tokens_per_step}",
                    others=("train.global_batch", "train.seq_len"),
                )
            )
        return found

    def problems_on(self, world_size: int) -> list[Problem]:
        """Why `world_size` ranks cannot cut a global batch into equal micro-batches."""
        rows = self.micro_batch_on(world_size)
        # All ranks must do the same number of equal passes: a rank that did one more would wait for
        # the others in its gradient sums for ever.
        if self.global_batch < 1 or self.global_batch % (world_size * rows) == 0:
            return []
        others = ("train.global_batch", "train.micro_batch")
        if world_size == 1:
            reason = f"must divide train.global_batch={self.global_batch}"
            return [Problem("train.micro_batch", rows, reason, others=others)]
        reason = f"not divisible by {world_size} ranks times train.micro_batch={rows} rows"
        return [Problem("train.global_batch", self.global_batch, reason, others=others)]

    def problems_with(self, model: ModelConfig) -> list[Problem]:
        """Why a model cannot read rows of this length."""
        longest = model.max_seq_len
        if self.seq_len <= longest:
            return []
        reason = f"longer than RoPE's table of model.max_seq_len={longest}"
        hint, others = "raise that or lower this", ("model.max_seq_len",)
        return [Problem("train.seq_len", self.seq_len, reason, hint, others)]

    def profile_problems(self, total: int | None) -> list[Problem]:
        """Why a run of `total` steps has none to profile; None: only time ends it."""
        steps = self.profiled_steps
        if not steps or total is None or steps[0] <= total:
            return []
        reason, hint = f"the run ends after step {total}", "choose an earlier step"
        return [Problem("train.profile_start", steps[0], reason, hint)]

    def unused(self) -> list[Problem]:
        """The settings of a profile that is not made."""
        if self.profile:
            return []
        reason, hint = "no step is profiled", "set train.profile=true"
        return without_effect(self, "train", reason, hint, "profile_start", "profile_steps")

    @property
    def profiled_steps(self) -> range:
        """The steps that are profiled; none if no profile is asked for."""
        return range(self.profile_start, self.profile_start + self.profile * self.profile_steps)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of text in one optimizer step."""
        return self.global_batch * self.seq_len

    def micro_batch_on(self, world_size: int = 1) -> int:
        """The rows of one forward pass on each of `world_size` ranks.

        Of `auto`, these are the most that may be chosen; see `train.engines.memory`.
        """
        whole = ceil(self.global_batch / world_size)
        rows = self.micro_batch
        return whole if rows is None or rows == "auto" else rows

    def accumulation(self, world_size: int = 1) -> int:
        """The forward passes of a step on each of `world_size` ranks.

        Raises:
            ConfigError: `global_batch` cannot be cut into equal parts of `micro_batch` rows.
        """
        if problems := self.problems_on(world_size):
            raise ConfigError(problems)
        return self.global_batch // (world_size * self.micro_batch_on(world_size))
