"""Everything that decides a run: one small frozen value per owner, joined in `Config`.

These classes are the only place where a default is written down; the files in `conf/` hold
differences from them. The model's part is in `phd.config`, the data's in `data.config`.
"""

import re
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Literal

from conf.durations import Seconds
from conf.settings import Settings, at_least
from conf.validation import as_dict, build
from data.config import DataConfig, TokenizerConfig
from phd.config import ModelConfig
from train.engines.config import DeepSpeedConfig, FsdpConfig

DEFAULT_STEPS = 450


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """Where a run lives and whether it goes on.

    Attributes:
        name: null: `Config.name` makes one from the variant and the size.
        dir: the run's directory; null: `runs/<name>` under the current directory.
        resume: `auto` goes on where the directory's newest checkpoint ends, or starts anew where
            there is none; `must` goes on or fails; `never` starts anew.
        start_from: a Hugging Face directory of an OLMo 2 or Llama whose weights a new run begins
            with; null: random ones.
    """

    name: str | None = None
    dir: str | None = None
    resume: Literal["auto", "must", "never"] = "auto"
    start_from: str | None = None

    def problems(self) -> list[str]:
        if self.name is None or re.fullmatch(r"[\w+-][\w.+-]*", self.name):
            return []
        allowed = "letters, digits and _ . + - only, because it names a directory"
        return [f"run.name={self.name!r}: expected {allowed}; run.dir may be any path"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """How much is trained, in what portions.

    Attributes:
        max_steps: optimizer steps. With neither this, `max_tokens` nor `max_time`, the run is
            `DEFAULT_STEPS` long.
        max_tokens: tokens of text (copies are not counted), in whole steps and never exceeded.
        max_time: seconds of training in each start, also `30m` or `2h`; it stops a run, but is no
            length that a schedule could follow.
        global_batch: rows of one optimizer step, over all ranks.
        micro_batch: rows of one forward pass on one rank; null: as many as the rank has.
        seq_len: T, tokens in a row.
    """

    max_steps: int | None = None
    max_tokens: int | None = None
    max_time: Seconds | None = None
    global_batch: int = 8
    micro_batch: int | None = None
    seq_len: int = 256

    def problems(self) -> list[str]:
        found = at_least(
            self, "train", 1, "max_steps", "max_tokens", "global_batch", "micro_batch", "seq_len"
        )
        if self.max_time is not None and self.max_time <= 0:
            found.append(f"train.max_time={self.max_time}: expected more than 0 seconds")
        if self.micro_batch and self.micro_batch > 0 and self.global_batch % self.micro_batch:
            found.append(
                f"train.micro_batch={self.micro_batch}: must divide "
                f"train.global_batch={self.global_batch}"
            )
        if 0 < (self.max_tokens or 0) < self.tokens_per_step:
            found.append(
                f"train.max_tokens={self.max_tokens}: less than one step, which is "
                f"train.global_batch={self.global_batch} rows of train.seq_len={self.seq_len} "
                f"tokens = {self.tokens_per_step}"
            )
        return found

    @property
    def tokens_per_step(self) -> int:
        """Tokens of text in one optimizer step."""
        return self.global_batch * self.seq_len

    @property
    def total_steps(self) -> int | None:
        """Steps until `max_steps` or `max_tokens`, the first; None if time alone ends it."""
        bounds = [] if self.max_steps is None else [self.max_steps]
        if self.max_tokens is not None:
            bounds.append(self.max_tokens // self.tokens_per_step)
        if not bounds and self.max_time is None:
            bounds = [DEFAULT_STEPS]
        return min(bounds, default=None)

    def accumulation(self, world_size: int = 1) -> int:
        """Forward passes per step on each of `world_size` ranks.

        Raises:
            ValueError: `global_batch` cannot be cut into equal parts of `micro_batch` rows.
        """
        micro_batch = self.micro_batch or ceil(self.global_batch / world_size)
        passes, rest = divmod(self.global_batch, world_size * micro_batch)
        if rest:
            raise ValueError(
                f"train.global_batch={self.global_batch}: not divisible by {world_size} ranks "
                f"times train.micro_batch={micro_batch} rows"
            )
        return passes


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """The optimizer.

    Attributes:
        kind: AdamW, with weight decay on everything but embeddings.
        lr: the schedule's peak.
        grad_clip: largest L2 norm of the gradient of all parameters; null: no clipping.
        z_loss: weight of the mean squared log-normaliser of the logits in the loss.
    """

    kind: Literal["adamw"] = "adamw"
    lr: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0
    z_loss: float = 0.0

    def problems(self) -> list[str]:
        found = [
            f"optim.{name}={value}: expected a number above 0"
            for name in ("lr", "eps", "grad_clip")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        found += [
            f"optim.{name}={value}: expected a number of at least 0"
            for name in ("weight_decay", "z_loss")
            if not (value := getattr(self, name)) >= 0
        ]
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"optim.betas={list(self.betas)}: expected two numbers from 0 to below 1")
        return found


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings):
    """The learning rate as a function of the step: a linear warm-up, then `kind`.

        cosine    /``\\__    half a cosine down to final_ratio
        linear    /\\___     a straight line down to final_ratio
        wsd       /````\\    the peak, then a straight line down in the last decay_fraction
        constant  /`````    the peak

    Attributes:
        warmup_steps: length of the warm-up; null: by `warmup_tokens`.
        warmup_tokens: the same in tokens of text; null: by `warmup_fraction`.
        warmup_fraction: the same as a fraction of the run.
        final_ratio: the last learning rate over the peak.
        decay_fraction: the part of the run in which `wsd` decays.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    warmup_fraction: float = 0.05
    final_ratio: float = 0.1
    decay_fraction: float = 0.2

    def problems(self) -> list[str]:
        found = at_least(self, "schedule", 0, "warmup_steps", "warmup_tokens")
        found += [
            f"schedule.{name}={value}: expected a number from 0 to 1"
            for name in ("warmup_fraction", "final_ratio", "decay_fraction")
            if not 0 <= (value := getattr(self, name)) <= 1
        ]
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            found.append(
                f"schedule.warmup_tokens={self.warmup_tokens}: "
                f"schedule.warmup_steps={self.warmup_steps} already says how long; set one to null"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """When the run's state is saved; it always is at the end and when interrupted.

    Attributes:
        every: steps between two checkpoints; 0: only at the end.
        keep: the newest checkpoints that are kept.
        keep_every: checkpoints of every so many steps are kept for ever; 0: none.
    """

    every: int = 100
    keep: int = 2
    keep_every: int = 0

    def problems(self) -> list[str]:
        return at_least(self, "checkpoint", 0, "every", "keep_every") + at_least(
            self, "checkpoint", 1, "keep"
        )


@dataclass(frozen=True, kw_only=True)
class FaultsConfig(Settings):
    """What happens when something goes wrong; nothing of it changes a run in which nothing does.

    A bad step is one whose loss or gradient norm is not finite, or a spike. No weight, moment or
    step count is changed by it, on any rank, and its batch is written to `bad_steps/`.

    Attributes:
        policy: `skip` goes on with the next batch; `rollback` goes back to the last checkpoint and
            passes over the batch; `abort` ends the run without saving.
        spike: a loss or gradient norm this many robust standard deviations above the median of the
            last `window` steps is a spike; null: only what is not finite is bad.
        window: steps that a spike is compared with; none is one before half of them are known.
        most_in_a_row: so many bad steps in a row end the run; more rollbacks to one checkpoint do.
        step_timeout: seconds after which a step, with what is measured after it, counts as hung:
            every rank writes its stack to `stacks/` and ends.
        exit_timeout: seconds that a rank has to save and leave after a signal; less than the
            launcher grants before it kills (`grace_s`).
    """

    policy: Literal["abort", "skip", "rollback"] = "skip"
    spike: float | None = None
    window: int = 128
    most_in_a_row: int = 10
    step_timeout: Seconds = 1800.0
    exit_timeout: Seconds = 100.0

    def problems(self) -> list[str]:
        found = at_least(self, "faults", 1, "most_in_a_row") + at_least(self, "faults", 8, "window")
        return found + [
            f"faults.{name}={value}: expected a number above 0"
            for name in ("spike", "step_timeout", "exit_timeout")
            if (value := getattr(self, name)) is not None and not value > 0
        ]


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings):
    """When the loss on held-out documents is measured; it always is at the end.

    Attributes:
        every: steps between two evaluations; 0: only at the end.
        rows: rows of T tokens that are read each time.
    """

    every: int = 100
    rows: int = 128

    def problems(self) -> list[str]:
        return at_least(self, "eval", 0, "every") + at_least(self, "eval", 1, "rows")


@dataclass(frozen=True, kw_only=True)
class WandbConfig(Settings):
    """Weights & Biases; `auto` is `online` after `wandb login` and `offline` before."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "phd"


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """Text that the model writes; it always does at the end.

    Attributes:
        every: steps between two samples; 0: only at the end.
        prompt: what it goes on from.
        tokens: how much it writes.
    """

    every: int = 0
    prompt: str = "def "
    tokens: int = 100

    def problems(self) -> list[str]:
        return at_least(self, "hooks.sample", 0, "every") + at_least(
            self, "hooks.sample", 1, "tokens"
        )


@dataclass(frozen=True, kw_only=True)
class KVConfig(Settings):
    """The KV cache's size; `context` is the tokens in it for which the hook reports bytes."""

    context: int = 4096

    def problems(self) -> list[str]:
        return at_least(self, "hooks.kv", 1, "context")


@dataclass(frozen=True, kw_only=True)
class HooksConfig(Settings):
    """What is told during the run; `log_every` is in steps, `metrics.jsonl` is always written."""

    log_every: int = 20
    console: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    kv: KVConfig = field(default_factory=KVConfig)

    def problems(self) -> list[str]:
        return at_least(self, "hooks", 1, "log_every")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A whole run in one value."""

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: FsdpConfig | DeepSpeedConfig = field(default_factory=FsdpConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    hooks: HooksConfig = field(default_factory=HooksConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The config that plain values describe, as YAML or JSON give them.

        Raises:
            ConfigError: with every unknown key, wrong type and impossible combination.
        """
        return build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON, every default included."""
        return as_dict(self)

    @property
    def name(self) -> str:
        """`run.name`, or the paper's name of the variant and the size: `phd_cswa-2-16-32-tiny`."""
        return self.run.name or f"{self.model.name}-{self.model.size}"

    @property
    def run_dir(self) -> Path:
        """Where the run's files are, relative to the current directory; the same every time."""
        return Path(self.run.dir) if self.run.dir else Path("runs", self.name)

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up; 0 for a run without a length that sets none."""
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        if self.schedule.warmup_tokens is not None:
            return ceil(self.schedule.warmup_tokens / self.train.tokens_per_step)
        return round(self.schedule.warmup_fraction * (self.train.total_steps or 0))

    @property
    def decay_steps(self) -> int:
        """Steps in which the learning rate falls, at the end of the run."""
        if self.schedule.kind == "constant":
            return 0
        total = self.train.total_steps
        assert total is not None, "only a constant schedule may have no end"
        if self.schedule.kind == "wsd":
            return round(self.schedule.decay_fraction * total)
        return total - self.warmup_steps

    def problems_on(self, world_size: int) -> list[str]:
        """Why the run cannot be dealt to so many ranks."""
        found = self.data.batch_problems(self.train.global_batch, world_size)
        try:
            self.train.accumulation(world_size)
        except ValueError as error:
            found.append(str(error))
        return [*found, *self.engine.problems_on(world_size)]

    def problems(self) -> list[str]:
        """Every combination across sections that cannot be; each section checks its own."""
        found = [f"seed={self.seed}: expected an integer of at least 0"] if self.seed < 0 else []
        return [*found, *self._length_problems(), *self._shape_problems()]

    def _length_problems(self) -> list[str]:
        total, schedule = self.train.total_steps, self.schedule
        if total is None:
            unbounded = (
                f"train.max_time={self.train.max_time}: schedule.kind={schedule.kind} has to know "
                "the run's length in steps; also set train.max_steps or train.max_tokens, or "
                "choose schedule=constant"
            )
            return [] if schedule.kind == "constant" else [unbounded]
        decay = self.decay_steps if schedule.kind == "wsd" else 0
        if self.warmup_steps + decay <= total:
            return []
        setting = next(
            f"schedule.{name}={value}"
            for name in ("warmup_steps", "warmup_tokens", "warmup_fraction")
            if (value := getattr(schedule, name)) is not None
        )
        needs = f"{self.warmup_steps} steps" + (f" and the decay {decay}" if decay else "")
        too_long = (
            f"{setting}: the warm-up takes {needs}, but the run has {total}; shorten it, or raise "
            "train.max_steps or train.max_tokens"
        )
        return [too_long]

    def _shape_problems(self) -> list[str]:
        found = self.data.batch_problems(self.train.global_batch)
        longest = self.model.max_seq_len
        if self.train.seq_len > longest:
            found.append(
                f"train.seq_len={self.train.seq_len}: longer than RoPE's table of "
                f"model.max_seq_len={longest}; raise that or lower this"
            )
        if (self.tokenizer.vocab_size or 0) > self.model.vocab_size:
            found.append(
                f"tokenizer.vocab_size={self.tokenizer.vocab_size}: the model has embeddings for "
                f"model.vocab_size={self.model.vocab_size} only; raise that or lower this"
            )
        if self.hooks.sample.tokens >= longest:
            found.append(
                f"hooks.sample.tokens={self.hooks.sample.tokens}: leaves no room for the prompt in "
                f"model.max_seq_len={longest}; choose less"
            )
        if self.model.attention == "flex" and self.engine.device == "cpu":
            found.append(
                "model.attention=flex: FlexAttention has no backward on engine.device=cpu; "
                "choose model.attention=packed"
            )
        return found
