"""Everything that decides a run: one small frozen dataclass for each part, joined in `Config`.

Defaults are written down in these classes and nowhere else; the files in `conf/` hold differences
from them. The model's settings are in `phd.config`, the data's in `data.config`, the engine's in
`train.engine_config`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from math import ceil, inf
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from conf.durations import Seconds
from conf.errors import ConfigError, Problem
from conf.seed import Seed
from conf.settings import Settings, above, at_least, seconds_to_wait, without_effect
from conf.task_names import MOST_SHOTS, OlmoTask, without_paper
from conf.validation import as_dict, build
from conf.wording import plural
from data.config import DataConfig, TokenizerConfig
from phd.config import ModelConfig
from train.engine_config import DeepSpeedConfig, FsdpConfig

DEFAULT_STEPS = 320  # 0.66 M tokens with the default batch: minutes on two CPU cores
LENGTHS = (
    *("train.max_steps", "train.max_tokens", "train.max_tokens_per_parameter"),
    "train.max_flops",
)

Copies = Annotated[
    dict[float, int], "the K from each fraction of the run on, such as {0: 1, 0.75: 2}"
]


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
        start_optimizer: also take AdamW's moments and its count of steps from there. The step, the
            learning rate and the text begin anew.
    """

    name: str | None = None
    dir: str | None = None
    resume: Literal["auto", "must", "never"] = "auto"
    start_from: str | None = None
    start_optimizer: bool = False

    def problems(self) -> list[Problem]:
        found = []
        if self.start_optimizer and self.start_from is None:
            reason = "there is no other run to take AdamW's moments from"
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


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """The optimizer.

    Attributes:
        kind: AdamW (arXiv 1711.05101).
        lr: the peak learning rate, which the schedule scales.
        betas: the decay rates of the running means of the gradient and of its square.
        eps: is added to the root of the mean square, so that nothing is divided by 0.
        weight_decay: each step multiplies all parameters but the embedding by
            1 - lr * weight_decay.
        grad_clip: the largest L2 norm of the gradient of all parameters; a longer gradient is
            scaled down to it. null: no clipping.
        z_loss: the weight in the loss of the mean squared log of the softmax's denominator.
    """

    kind: Literal["adamw"] = "adamw"
    lr: float = 3e-3  # for the size tiny; arXiv 2504.14992 and recipe=olmo2 have 3e-4
    betas: tuple[float, float] = (0.9, 0.95)  # this and what follows as in the paper
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0
    z_loss: float = 0.0

    def problems(self) -> list[Problem]:
        found = above(self, "optim", 0, "lr", "eps", "grad_clip")
        found += at_least(self, "optim", 0.0, "weight_decay", "z_loss")
        if not all(0 <= beta < 1 for beta in self.betas):
            expected = "expected two numbers from 0 to below 1"
            found.append(Problem("optim.betas", self.betas, expected))
        return found


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings):
    """The learning rate as a function of the step: a linear warm-up, then `kind`.

    And the copies of each token, where they are not the same in the whole run.

        cosine    /``\\__    half a cosine down to final_ratio
        linear    /\\___     a straight line down to final_ratio
        wsd       /````\\    the peak, then a straight line down in the last decay_fraction
        constant  /`````    the peak

    Attributes:
        kind: the course of the learning rate after the warm-up, as drawn above.
        warmup_steps: the length of the warm-up in steps; null: `warmup_tokens` says it.
        warmup_tokens: the length of the warm-up in tokens of text; null: `warmup_fraction` says it.
        warmup_fraction: the length of the warm-up as a fraction of the run.
        final_ratio: the last learning rate, as a fraction of the peak.
        decay_fraction: the last part of the run, as a fraction, in which `wsd` decays.
        copies: K as a function of the step, where it is switched within the run:
            `{0: 1, 0.75: 2}` trains without hidden copies at first, and with one of each token in
            the last quarter. The last K has to be `model.K`. null: `model.K` all the time.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    warmup_fraction: float = 0.05
    final_ratio: float = 0.1
    decay_fraction: float = 0.2
    copies: Copies | None = None

    def problems(self) -> list[Problem]:
        found = at_least(self, "schedule", 0, "warmup_steps", "warmup_tokens")
        found += [
            Problem("schedule.copies", _as_typed(self.copies), reason, COPIES_HINT)
            for reason in self._flaws_of_copies()
        ]
        found += [
            Problem(f"schedule.{name}", value, "expected a number from 0 to 1")
            for name in ("warmup_fraction", "final_ratio", "decay_fraction")
            if not 0 <= (value := getattr(self, name)) <= 1
        ]
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            found.append(
                Problem(
                    "schedule.warmup_tokens",
                    self.warmup_tokens,
                    f"schedule.warmup_steps={self.warmup_steps} already says how long",
                    "set one to null",
                    others=("schedule.warmup_steps",),
                )
            )
        return found

    def _flaws_of_copies(self) -> Iterator[str]:
        """Why `copies` cannot be, whatever the run's length."""
        if self.copies is None:
            return
        starts, copies = list(self.copies), list(self.copies.values())
        if starts[:1] != [0]:
            yield "the first fraction must be 0, where the run begins"
        if any(start >= end for start, end in pairwise(starts)):
            yield "the fractions must increase"
        if any(not 0 <= start < 1 for start in starts):
            yield "fractions are from 0 to below 1, where the run ends"
        if any(K < 1 for K in copies):
            yield "each token enters the network at least once, so K is at least 1"
        if len(copies) == 1 or any(before == after for before, after in pairwise(copies)):
            yield "a fraction that does not change K says nothing"

    def unused(self) -> list[Problem]:
        """The settings that the kind, or another length of the warm-up, leaves without effect."""
        found = []
        if self.kind != "wsd":
            reason = f"schedule.kind={self.kind} has no decay_fraction"
            found += without_effect(
                self, "schedule", reason, "choose schedule=wsd", "decay_fraction"
            )
        if self.kind == "constant":
            reason, hint = "schedule.kind=constant stays at the peak", "choose another schedule"
            found += without_effect(self, "schedule", reason, hint, "final_ratio")
        for name in ("warmup_steps", "warmup_tokens"):
            if (length := getattr(self, name)) is not None:
                reason = f"schedule.{name}={length} says how long the warm-up is"
                hint = f"set schedule.{name}=null"
                found += without_effect(self, "schedule", reason, hint, "warmup_fraction")
                break
        return found


COPIES_HINT = (
    "expected fractions of the run with the K from there on, as in 'schedule.copies={0: 1, 0.75: "
    "2}'; with one K alone, set it as model.K"
)


def _as_typed(copies: Mapping[float, int] | None) -> dict[float, int]:
    """A schedule of copies, with whole numbers as they are typed.

    >>> _as_typed({0.0: 1, 0.75: 2})
    {0: 1, 0.75: 2}
    """
    return {int(at) if at.is_integer() else at: K for at, K in (copies or {}).items()}


class CopyStage(NamedTuple):
    """A part of a run in which K is the same.

    Attributes:
        first: its first optimizer step, counted from 0.
        end: the step after its last one; None: it lasts until the run ends.
        K: copies of each token.
    """

    first: int
    end: int | None
    K: int

    def steps(self, first: int, end: int) -> int:
        """How many of the steps from `first` to before `end` are in it."""
        return max(0, min(end, end if self.end is None else self.end) - max(first, self.first))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """When the run's state is saved. It is also saved at the end and after a signal to stop.

    Attributes:
        every: the steps between two checkpoints; 0: only at the end.
        keep: how many of the newest checkpoints are kept.
        keep_every: the checkpoints of every multiple of this many steps are kept, too; 0: only the
            newest are kept.
    """

    every: int = 100
    keep: int = 2
    keep_every: int = 0

    def problems(self) -> list[Problem]:
        return at_least(self, "checkpoint", 0, "every", "keep_every") + at_least(
            self, "checkpoint", 1, "keep"
        )


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


@dataclass(frozen=True, kw_only=True)
class WandbConfig(Settings):
    """Weights & Biases.

    Attributes:
        mode: `online` sends the metrics to the server, `offline` writes them to the run's
            directory, and `disabled` does not use it. `auto` is `online` if you have logged in
            with `wandb login`, and `offline` otherwise.
        project: the project there.
        group: the group that the run belongs to; null: in a sweep its name, such as `k+seeds`, and
            otherwise none.
        tags: what else to find the run by; the names of its variant and its size are tags, too.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "phd"
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """Text that the model writes during the run. It also writes one at the end.

    Attributes:
        every: the steps between two samples; 0: only at the end.
        prompt: the text that the model continues; null: the first words of a held-out document, so
            that it fits the corpus.
        tokens: how many tokens it adds.
    """

    every: int = 0
    prompt: str | None = None
    tokens: int = 100

    def problems(self) -> list[Problem]:
        return at_least(self, "hooks.sample", 0, "every") + at_least(
            self, "hooks.sample", 1, "tokens"
        )


@dataclass(frozen=True, kw_only=True)
class KVConfig(Settings):
    """The report of the KV cache's size.

    Attributes:
        context: the tokens in the cache whose bytes are reported.
    """

    context: int = 4096

    def problems(self) -> list[Problem]:
        return at_least(self, "hooks.kv", 1, "context")


@dataclass(frozen=True, kw_only=True)
class HooksConfig(Settings):
    """What the run reports. Its `metrics.jsonl` is always written.

    Attributes:
        log_every: the steps between two reports. Steps 1, 2, 5 and 10 are reported, too.
        console: print a line for each report.
        wandb: Weights & Biases.
        sample: text that the model writes.
        kv: the size of the KV cache.
    """

    log_every: int = 20
    console: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    kv: KVConfig = field(default_factory=KVConfig)

    def problems(self) -> list[Problem]:
        return at_least(self, "hooks", 1, "log_every")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A whole run in one value.

    Attributes:
        run: where the run's files are and whether it continues.
        seed: the seed of weights, data order and samples; at least 0.
        model: what the network computes.
        data: where the text comes from and in what order it is read.
        tokenizer: the SentencePiece model.
        train: how long the run is and how much it reads in each step.
        optim: the optimizer.
        schedule: the learning rate as a function of the step.
        engine: how the work is spread over devices and ranks.
        checkpoint: when the run's state is saved.
        faults: what happens when something goes wrong.
        eval: when the loss on held-out documents is measured.
        hooks: what the run reports.
    """

    run: RunConfig = field(default_factory=RunConfig)
    seed: Seed = 0
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
        """The directory of the run's files, relative to the current directory."""
        return Path(self.run.dir).expanduser() if self.run.dir else Path("runs", self.name)

    @property
    def flops_per_step(self) -> int:
        """Training FLOPs of a step with `model.K` copies and full rows of one document each."""
        return self._flops_per_step_of(self.model)

    def _flops_per_step_of(self, model: ModelConfig) -> int:
        from phd.flops import training_flops  # needs torch, which reading settings does not load

        return self.train.global_batch * training_flops(model, self.train.seq_len)

    @property
    def flops_model(self) -> ModelConfig:
        """The model whose FLOPs the run takes: that of `train.flops_of`, or its own."""
        name = self.train.flops_of
        return self.model if name is None else self.model.as_variant(name)

    @property
    def parameters(self) -> int:
        """Parameters of the model, with the embedding."""
        from phd.model import number_of_parameters  # needs torch, as above

        return number_of_parameters(self.model)

    @property
    def step_limits(self) -> dict[str, int]:
        """The steps that each limit of the length allows, by its setting; not that of time."""
        if self.train.flops_of is None:
            limits = self._limits_without_flops
            if self.train.max_flops is not None:
                limits["train.max_flops"] = self._steps_within(self.train.max_flops)
            return limits
        # The other model has its K all the time; `schedule.copies` is of this run alone.
        limits, of_step = self._limits_without_flops, self._flops_per_step_of(self.flops_model)
        if self.train.max_flops is not None:
            limits["train.max_flops"] = int(self.train.max_flops // of_step)
        steps = min(limits.values(), default=self._default_steps)
        return {} if steps is None else {"train.flops_of": self._steps_within(steps * of_step)}

    @property
    def _limits_without_flops(self) -> dict[str, int]:
        """The steps that the limits allow which are the same for all variants."""
        train, limits = self.train, {}
        if train.max_steps is not None:
            limits["train.max_steps"] = train.max_steps
        if train.max_tokens is not None:
            limits["train.max_tokens"] = train.max_tokens // train.tokens_per_step
        if train.max_tokens_per_parameter is not None:
            tokens = train.max_tokens_per_parameter * self.parameters
            limits["train.max_tokens_per_parameter"] = int(tokens // train.tokens_per_step)
        return limits

    @property
    def _default_steps(self) -> int | None:
        """The steps of a run without limits; None if its time is one."""
        # Not the field's default, or `train.max_tokens=1e9` would still end after 320 steps.
        return DEFAULT_STEPS if self.train.max_time is None else None

    @property
    def shortest_limits(self) -> list[str]:
        """The settings whose limit the run reaches first; none if none is set."""
        return [key for key, steps in self.step_limits.items() if steps == self.total_steps]

    @property
    def total_steps(self) -> int | None:
        """The steps of the limit that is reached first; None if only time ends the run."""
        return min(self.step_limits.values(), default=self._default_steps)

    @cached_property
    def copy_stages(self) -> tuple[CopyStage, ...]:
        """The parts of the run with a K each, in their order: one, without `schedule.copies`.

        schedule.copies = {0: 1, 0.75: 2}, 8 steps

        step   0  1  2  3  4  5  6  7
        K      1  1  1  1  1  1  2  2
        """
        total, copies = self.total_steps, self.schedule.copies
        if copies is None or total is None:
            return (CopyStage(0, None, self.model.K),)
        return self._stages_of(copies, total)

    @staticmethod
    def _stages_of(copies: Mapping[float, int], total: int) -> tuple[CopyStage, ...]:
        """The stages of a run of `total` steps; one may be empty where the run is too short."""
        firsts = [round(start * total) for start in copies]
        ends = [*firsts[1:], None]
        return tuple(map(CopyStage, firsts, ends, copies.values()))

    def copy_stage(self, step: int) -> CopyStage:
        """The stage of optimizer step `step`, counted from 0; of later steps, the last one."""
        return next(stage for stage in reversed(self.copy_stages) if step >= stage.first)

    @property
    def most_copies(self) -> ModelConfig:
        """The model with the largest K of the run, which needs the most memory."""
        return replace(self.model, K=max(stage.K for stage in self.copy_stages))

    def mean_copies(self, first: int, end: int) -> float:
        """The mean of K over the steps from `first`, counted from 0, to before `end`."""
        return sum(s.steps(first, end) * s.K for s in self.copy_stages) / (end - first)

    def flops_between(self, first: int, end: int) -> int:
        """Training FLOPs of the steps from `first` to before `end`, as `flops_per_step` counts."""
        return self._flops_of(self.copy_stages, first, end)

    @property
    def mean_step_flops(self) -> float:
        """`flops_per_step`, as the mean over the run where K is switched within it."""
        total = self.total_steps
        return self.flops_per_step if total is None else self.flops_between(0, total) / total

    def _flops_of(self, stages: Iterable[CopyStage], first: int, end: int) -> int:
        return sum(stage.steps(first, end) * self._step_flops(stage.K) for stage in stages)

    def _step_flops(self, K: int) -> int:
        model = self.model if K == self.model.K else replace(self.model, K=K)
        return self._flops_per_step_of(model)

    def _steps_within(self, flops: float) -> int:
        """The most steps whose training FLOPs are within a limit."""
        copies = self.schedule.copies
        if copies is None:
            return int(flops // self.flops_per_step)
        costs = [self._step_flops(K) for K in copies.values()]
        shares = [end - start for start, end in pairwise([*copies, 1.0])]
        mean = sum(share * cost for share, cost in zip(shares, costs, strict=True))
        # The stages have whole steps, so this is right but for a few steps.
        steps = int(flops / mean) + len(costs) * ceil(max(costs) / mean)
        while steps and self._flops_of(self._stages_of(copies, steps), 0, steps) > flops:
            steps -= 1
        return steps

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up; of a run without a length in steps, 0 unless they are set."""
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        if self.schedule.warmup_tokens is not None:
            return ceil(self.schedule.warmup_tokens / self.train.tokens_per_step)
        return round(self.schedule.warmup_fraction * (self.total_steps or 0))

    @property
    def decay_steps(self) -> int:
        """Steps at the end of the run in which the learning rate falls."""
        if self.schedule.kind == "constant":
            return 0
        total = self.total_steps
        assert total is not None, "only a constant schedule may have no end"
        if self.schedule.kind == "wsd":
            return round(self.schedule.decay_fraction * total)
        return total - self.warmup_steps

    def problems_on(self, world_size: int) -> list[Problem]:
        """Why the run cannot be spread over this many ranks."""
        return [
            *self.data.batch_problems(self.train.global_batch, world_size),
            *self.train.problems_on(world_size),
            *self.engine.problems_on(world_size),
        ]

    def device_problems(self, device: str) -> list[Problem]:
        """Why the run cannot train on a device of this type, `cpu` or `cuda`."""
        reasons = {
            "flex": f"FlexAttention has no backward pass on the device {device}",
            "fused": f"there are no Triton kernels on the device {device}",
        }
        chosen = self.model.attention
        if chosen not in reasons or device == "cuda":
            return []
        hint = "choose model.attention=packed"
        return [
            Problem("model.attention", chosen, reasons[chosen], hint, others=("engine.device",))
        ]

    def problems(self) -> list[Problem]:
        """Every combination across sections that cannot be; each section checks its own."""
        if self.schedule.copies is not None and self.model.variant == "vanilla":
            return self._no_copies_problems()  # which have a share in the length
        if found := self._flops_of_problems():
            return found  # the length is not known, of which others are
        found += [*at_least(self, "", 0, "seed"), *self._length_problems(), *self._shape_problems()]
        found += [*self._copies_problems(), *self._profile_problems(), *self._float8_problems()]
        # `auto` is decided on the machine that trains; train/run.py asks again with its device.
        return found + (self.device_problems("cpu") if self.engine.device == "cpu" else [])

    def unused(self) -> list[Problem]:
        """The settings of all sections that change nothing in this run."""
        parts = (self.model, self.tokenizer, self.train, self.schedule, self.engine)
        found = [problem for part in parts for problem in part.unused()]
        own = self.train.flops_of is not None and self.flops_model == self.model
        if own and self.schedule.copies is None:
            reason, hint = "these are the run's own FLOPs", "choose another variant"
            found += without_effect(self.train, "train", reason, hint, "flops_of")
        return found

    def _flops_of_problems(self) -> list[Problem]:
        key, name = "train.flops_of", self.train.flops_of
        try:
            self.flops_model  # noqa: B018
        except ConfigError as error:
            return [Problem(key, name, f"is no such model: {p}") for p in error.problems]
        except ValueError as error:
            return [Problem(key, name, str(error))]
        limits = self.step_limits
        if name is None or limits.get(key, 0) > 0:
            return []
        if key in limits:
            return [Problem(key, name, "its FLOPs are less than one step", others=LENGTHS)]
        hint = "set train.max_steps, train.max_tokens or train.max_flops"
        return [Problem(key, name, "only time ends the run, which has no FLOPs to share", hint)]

    def _length_problems(self) -> list[Problem]:
        total, schedule = self.total_steps, self.schedule
        if total is None:
            return self._unbounded_problems()
        for name in ("train.max_tokens_per_parameter", "train.max_flops"):
            if self.step_limits.get(name) == 0:
                return [self._no_step_problem(name)]
        # The decay of the other kinds begins where the warm-up ends, and has no length of its own.
        decay = self.decay_steps if schedule.kind == "wsd" else 0
        if self.warmup_steps + decay <= total:
            return []
        name, value = next(
            (name, value)
            for name in ("warmup_steps", "warmup_tokens", "warmup_fraction")
            if (value := getattr(schedule, name)) is not None
        )
        limits = [key for key in self.shortest_limits if key != "train.flops_of"]
        takes = plural(self.warmup_steps, "step") + (f" and the decay {decay}" if decay else "")
        return [
            Problem(
                f"schedule.{name}",
                value,
                f"the warm-up takes {takes}, but the run has {total}",
                f"shorten it, or raise {' and '.join(limits) or 'train.max_steps'}",
                others=LENGTHS,
            )
        ]

    def _no_copies_problems(self) -> list[Problem]:
        reason = "vanilla feeds each token once"
        choose = "choose model=naive_repeat, phd, phd_swa or phd_cswa"
        value = _as_typed(self.schedule.copies)
        return [Problem("schedule.copies", value, reason, choose, ("model.variant",))]

    def _copies_problems(self) -> list[Problem]:
        """Why K cannot be switched as `schedule.copies` says in this run of this model."""
        copies, model, total = self.schedule.copies, self.model, self.total_steps
        if copies is None:
            return []
        last = list(copies.values())[-1]
        found: list[tuple[str, str, tuple[str, ...]]] = []
        if last != model.K:
            reason = f"its last K is not model.K={model.K}, after which the run is named"
            found.append((reason, f"set model.K={last}, or change the last K", ("model.K",)))
        elif model.copy_embedding and max(copies.values()) > model.K:
            reason = f"model.copy_embedding=true has vectors for the last model.K={model.K} copies"
            hint = "let the last K be the largest"
            found.append((reason, hint, ("model.copy_embedding",)))
        if total is None:
            hint = "set train.max_steps, train.max_tokens or train.max_flops"
            found.append(
                ("its fractions are of a run whose length in steps is known", hint, LENGTHS)
            )
        elif any(first >= (total if end is None else end) for first, end, _ in self.copy_stages):
            reason = f"the run has {plural(total, 'step')}, too few for a step with each K"
            hint = f"raise {' and '.join(self.shortest_limits) or 'train.max_steps'}"
            found.append((reason, hint, LENGTHS))
        value = _as_typed(copies)
        return [Problem("schedule.copies", value, *problem) for problem in found]

    def _profile_problems(self) -> list[Problem]:
        steps, total = self.train.profiled_steps, self.total_steps
        if not steps or total is None or steps[0] <= total:
            return []
        reason, hint = f"the run ends after step {total}", "choose an earlier step"
        return [Problem("train.profile_start", steps[0], reason, hint, others=LENGTHS)]

    def _no_step_problem(self, name: str) -> Problem:
        train = self.train
        costs = {
            "train.max_tokens_per_parameter": f"tokens = {train.tokens_per_step}, of a model of "
            f"{self.parameters} parameters",
            "train.max_flops": f"tokens and takes {self.flops_per_step:.3g} FLOPs",
        }
        return Problem(
            name,
            getattr(train, name.removeprefix("train.")),
            f"less than one step, which is train.global_batch={train.global_batch} rows of "
            f"train.seq_len={train.seq_len} {costs[name]}",
            "raise it, or make the batch or the model smaller",
            others=("train.global_batch", "train.seq_len", "model"),
        )

    def _unbounded_problems(self) -> list[Problem]:
        if self.schedule.kind == "constant":
            return []
        return [
            Problem(
                "train.max_time",
                self.train.max_time,
                f"schedule.kind={self.schedule.kind} has to know the run's length in steps",
                "also set train.max_steps, train.max_tokens or train.max_flops, or choose "
                "schedule=constant",
                others=("schedule.kind", *LENGTHS),
            )
        ]

    def _float8_problems(self) -> list[Problem]:
        """Why the blocks' products cannot be float8, whose operands have sides of 16 n numbers."""
        if self.engine.precision != "fp8":
            return []
        model = self.model
        sides = {
            "model.dim": model.dim,
            "model.ffn_dim": model.ffn_dim,
            "model.heads x model.head_dim": model.heads * model.head_dim,
            "model.kv_heads x model.head_dim": model.kv_heads * model.head_dim,
            "train.seq_len": self.train.seq_len,  # the rows of a product are whole rows of text
        }
        reason = "with engine.precision=fp8 it must be divisible by 16"
        return [
            Problem(name, side, reason, "choose another, or engine.precision=bf16")
            for name, side in sides.items()
            if side % 16
        ]

    def _shape_problems(self) -> list[Problem]:
        found = self.data.batch_problems(self.train.global_batch)
        longest, vocab_size = self.model.max_seq_len, self.model.vocab_size
        if self.train.seq_len > longest:
            found.append(
                Problem(
                    "train.seq_len",
                    self.train.seq_len,
                    f"longer than RoPE's table of model.max_seq_len={longest}",
                    "raise that or lower this",
                    others=("model.max_seq_len",),
                )
            )
        if (self.tokenizer.vocab_size or 0) > vocab_size:
            found.append(
                Problem(
                    "tokenizer.vocab_size",
                    self.tokenizer.vocab_size,
                    f"the model has embeddings for model.vocab_size={vocab_size} only",
                    "raise that or lower this",
                    others=("model.vocab_size",),
                )
            )
        if self.hooks.sample.tokens >= longest:
            found.append(
                Problem(
                    "hooks.sample.tokens",
                    self.hooks.sample.tokens,
                    f"leaves no room for the prompt in model.max_seq_len={longest}",
                    "choose less",
                    others=("model.max_seq_len",),
                )
            )
        return found


SECTIONS = frozenset(setting.name for setting in fields(Config))
"""The first parts of the settings' names: `model`, `train`, ..."""
