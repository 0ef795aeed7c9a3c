"""Everything that decides a run, joined in one value, `Config`.

Its sections are one small frozen dataclass each. Those of training are in `train/settings/`; the
model's is in `phd.config`, and the data's and the tokenizer's are in `data.config`. Defaults are
written down in these classes and nowhere else; the files in `conf/` hold differences from them.
"""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, Problem
from conf.seed import Seed
from conf.settings import Settings, at_least, without_effect
from conf.validation import as_dict, build
from conf.wording import plural
from data.config import DataConfig, TokenizerConfig
from phd.config import ModelConfig
from train.settings.checkpoint import CheckpointConfig
from train.settings.engine import DeepSpeedConfig, FsdpConfig
from train.settings.eval import EvalConfig
from train.settings.faults import FaultsConfig
from train.settings.hooks import HooksConfig
from train.settings.optim import OptimConfig
from train.settings.run import RunConfig
from train.settings.schedule import CopyStage, ScheduleConfig
from train.settings.train import DEFAULT_STEPS, LENGTHS, TrainConfig


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

    @cached_property
    def step_limits(self) -> dict[str, int]:
        """The steps that each limit of the length allows, by its setting; not that of time.

        A trunk ends where its last decay begins, whatever else limits the lengths of its decays.
        """
        if self.branches:
            [key] = self.schedule.given_decays
            return {key: max(self.branches.values())}
        return self._limits_of_train

    @property
    def _limits_of_train(self) -> dict[str, int]:
        """The same of the settings under `train.` alone."""
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
    def branches(self) -> dict[int, int]:
        """The step after which each decay of a trunk begins, by the length of the decay's run.

        schedule.decays = [4, 8], decay_fraction = 0.5

        step        1  2  3  4  5  6  7  8
        trunk       ----------              keeps the checkpoints of steps 2 and 4
        run of 4          ----
        run of 8                ----------

        Empty for all other runs.
        """
        given = self.schedule.given_decays
        if not self.schedule.is_trunk or len(given) != 1:
            return {}
        [(key, lengths)] = given.items()
        per_step = self.train.tokens_per_step
        if key == "schedule.decays_tokens_per_parameter":
            lengths = tuple(int(ratio * self.parameters) for ratio in lengths)
        steps = [int(x) if key == "schedule.decays" else int(x // per_step) for x in lengths]
        return {length: length - self.schedule.last_part(length) for length in steps}

    @property
    def branch(self) -> int | None:
        """The step after which the decay of a trunk begins; None of a run that is no such decay."""
        total = self.total_steps
        if self.run.decay_of is None or total is None:
            return None
        return total - self.decay_steps

    @cached_property
    def copy_stages(self) -> tuple[CopyStage, ...]:
        """The parts of the run with a K each, in their order: one, without `schedule.copies`.

        schedule.copies = {0: 1, 0.75: 2}, 8 steps

        step   0  1  2  3  4  5  6  7
        K      1  1  1  1  1  1  2  2
        """
        total = self.total_steps
        if self.schedule.copies is None or total is None:
            return (CopyStage(0, None, self.model.K),)
        return self.schedule.stages(total)

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
        return sum(s.steps(first, end) * self._step_flops(s.K) for s in self.copy_stages)

    @property
    def mean_step_flops(self) -> float:
        """`flops_per_step`, as the mean over the run where K is switched within it."""
        total = self.total_steps
        return self.flops_per_step if total is None else self.flops_between(0, total) / total

    def _step_flops(self, K: int) -> int:
        model = self.model if K == self.model.K else replace(self.model, K=K)
        return self._flops_per_step_of(model)

    def _steps_within(self, flops: float) -> int:
        """The most steps whose training FLOPs are within a limit."""
        if self.schedule.copies is None:
            return int(flops // self.flops_per_step)
        return self.schedule.most_steps(flops, self._step_flops)

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up; of a run without a length in steps, 0 unless they are set."""
        # A trunk may be made longer, so a fraction is of the shortest of its decays' runs.
        length = min(self.branches) if self.branches else self.total_steps
        return self.schedule.warmup(length, self.train.tokens_per_step)

    @property
    def decay_steps(self) -> int:
        """Steps at the end of the run in which the learning rate falls."""
        return self.schedule.decay(self.total_steps, self.train.tokens_per_step)

    def problems_on(self, world_size: int) -> list[Problem]:
        """Why the run cannot be spread over this many ranks."""
        if world_size % self.engine.ranks_per_row:  # how many ranks read rows is not known
            return self.engine.problems_on(world_size)
        readers = self.engine.data_ranks(world_size)
        return [
            *self.data.batch_problems(self.train.global_batch, readers),
            *self.batch_problems_on(world_size),
        ]

    def batch_problems_on(self, world_size: int) -> list[Problem]:
        """Why these ranks can share neither the rows of a batch nor the model."""
        return [
            *self.train.problems_on(self.engine.data_ranks(world_size)),
            *self.engine.problems_on(world_size),
        ]

    def micro_batch_on(self, world_size: int = 1) -> int:
        """The rows of one forward pass on each of `world_size` ranks."""
        return self.train.micro_batch_on(self.engine.data_ranks(world_size))

    def accumulation(self, world_size: int = 1) -> int:
        """The forward passes of a step on each of `world_size` ranks."""
        return self.train.accumulation(self.engine.data_ranks(world_size))

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
        if found := self.schedule.variant_problems(self.model):
            return found  # copies have a share in the length
        if found := self._flops_of_problems():
            return found  # the length is not known, of which others are
        found += [*at_least(self, "", 0, "seed"), *self._length_problems(), *self._shape_problems()]
        found += self.schedule.problems_with(self.model)
        found += self._decay_problems()
        total = self.total_steps
        found += map(_of_length, self.schedule.stage_problems(total, self.shortest_limits))
        found += map(_of_length, self.train.profile_problems(total))
        found += self.engine.problems_with(self.model, self.train.seq_len)
        found += self._context_problems()
        found += self.engine.optimizer_problems(self.optim.kind)
        # `auto` is decided on the machine that trains; train/run.py asks again with its device.
        return found + (self.device_problems("cpu") if self.engine.device == "cpu" else [])

    def unused(self) -> list[Problem]:
        """The settings of all sections that change nothing in this run."""
        parts = (self.model, self.tokenizer, self.train, self.optim, self.schedule, self.engine)
        found = [problem for part in parts for problem in part.unused()]
        own = self.train.flops_of is not None and self.flops_model == self.model
        if own and self.schedule.copies is None:
            reason, hint = "these are the run's own FLOPs", "choose another variant"
            found += without_effect(self.train, "train", reason, hint, "flops_of")
        if not self.schedule.is_trunk:
            reason, hint = f"schedule.kind={self.schedule.kind} has no decays", "choose wsd_s"
            found += without_effect(self.run, "run", reason, hint, "decays")
        return found

    def _context_problems(self) -> list[Problem]:
        """Why the tokens of rows cannot be dealt over `engine.context` ranks."""
        context, seq_len = self.engine.context_ranks, self.train.seq_len
        if context == 1:
            return []
        found, others = [], ("engine.context",)
        backend, parts = self.model.attention, 2 * context
        if backend in ("reference", "flex"):
            reason = f"it computes whole rows, and engine.context={context} deals their tokens"
            hint = "choose model.attention=auto"
            found.append(Problem("model.attention", backend, reason, hint, others))
        if seq_len % parts:
            reason = f"with engine.context={context} it must be divisible by {parts}"
            hint = f"choose {seq_len - seq_len % parts or parts}"
            return [*found, Problem("train.seq_len", seq_len, reason, hint, others)]
        from phd.attention.parts import halo_tokens  # needs torch, as above
        from phd.pattern import patterns_of

        isolated, size = self.data.documents == "isolate", seq_len // parts
        reach = max(
            halo_tokens(pattern, size, documents=isolated)
            for stage in self.copy_stages
            for pattern in patterns_of(replace(self.model, K=stage.K))
        )
        if reach > size:
            reason = (
                f"reaches {reach} tokens back, and engine.context={context} deals rows of "
                f"{seq_len} tokens in parts of {size}"
            )
            hint = "choose a shorter window or chunk, longer rows or fewer ranks"
            found.append(Problem("model.window", self.model.window, reason, hint, others))
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
        if name is None or self.branches or limits.get(key, 0) > 0:
            return []
        if key in limits:
            return [Problem(key, name, "its FLOPs are less than one step", others=LENGTHS)]
        hint = "set train.max_steps, train.max_tokens or train.max_flops"
        return [Problem(key, name, "only time ends the run, which has no FLOPs to share", hint)]

    def _decay_problems(self) -> list[Problem]:
        """Why a run cannot be the decay of a trunk."""
        trunk, kind = self.run.decay_of, self.schedule.kind
        if trunk is None:
            return []
        key, others = "run.decay_of", ("schedule.kind",)
        if kind != "wsd":
            reason = f"schedule.kind={kind} has no end that could start from a trunk"
            return [Problem(key, trunk, reason, "choose schedule=wsd", others)]
        if self.schedule.copies is not None:
            reason = "a decay has the copies of its trunk in all steps"
            hint = "leave it out, or train the whole run with schedule.copies"
            return [self.schedule.copies_problem(reason, hint, (key,))]
        if self.decay_steps == 0:
            reason, hint = "the decay would have no steps", "choose a part of a run, such as 0.2"
            fraction = self.schedule.decay_fraction
            return [Problem("schedule.decay_fraction", fraction, reason, hint, (key,))]
        if self.run_dir.resolve() == Path(trunk).expanduser().resolve():
            hint = "choose another run.name or run.dir"
            return [Problem(key, trunk, "is the directory of this run itself", hint)]
        return []

    def _trunk_problems(self) -> list[Problem]:
        """Why the decays of a trunk do not fit its batch, its warm-up and the other limits."""
        [(key, lengths)] = self.schedule.given_decays.items()
        others = ("train.global_batch", "train.seq_len", "model", "schedule.decay_fraction")
        if len(self.branches) < len(lengths):
            steps = sorted(self.branches)
            reason = f"in steps these are {steps}, of which some are equal"
            hint = "let them be further apart"
            if steps == [0]:
                reason = f"less than one step, which is {self.train.tokens_per_step} tokens"
                hint = "let them be longer"
            return [Problem(key, lengths, reason, hint, others)]
        warmup = self.warmup_steps
        for length, branch in self.branches.items():
            if branch < max(warmup, 1):
                reason = f"the decay of a run of {plural(length, 'step')} begins after step "
                reason += f"{branch}, and the warm-up takes {plural(warmup, 'step')}"
                hint = "let the run be longer, or shorten the warm-up"
                if branch < 1:
                    reason = f"a run of {plural(length, 'step')} has no step before its decay"
                    hint = "let it be longer, or lower schedule.decay_fraction"
                return [Problem(key, lengths, reason, hint, others)]
            if branch == length:
                reason = f"schedule.decay_fraction={self.schedule.decay_fraction} of a run of "
                reason += f"{plural(length, 'step')} is no whole step"
                hint = "let it be longer, or raise schedule.decay_fraction"
                return [Problem(key, lengths, reason, hint, others)]
        if self.train.flops_of is not None:
            reason = f"{key} says how long the runs of the decays are"
            hint = "leave it out, or choose schedule=wsd"
            return [Problem("train.flops_of", self.train.flops_of, reason, hint, (key,))]
        limits, longest = self._limits_of_train, max(self.branches)
        if (most := min(limits.values(), default=longest)) >= longest:
            return []
        limit = next(name for name, steps in limits.items() if steps == most)
        reason = f"a decay ends at step {longest}, and {limit} allows {plural(most, 'step')}"
        return [
            Problem(key, lengths, reason, f"raise {limit}, or set it to null", (limit, *others))
        ]

    def _length_problems(self) -> list[Problem]:
        if self.branches:
            return self._trunk_problems()
        total = self.total_steps
        if total is None:
            return self._unbounded_problems()
        for name in ("train.max_tokens_per_parameter", "train.max_flops"):
            if self.step_limits.get(name) == 0:
                return [self._no_step_problem(name)]
        limits = [key for key in self.shortest_limits if key != "train.flops_of"]
        found = self.schedule.warmup_problems(total, self.train.tokens_per_step, limits)
        return list(map(_of_length, found))

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

    def _shape_problems(self) -> list[Problem]:
        """Of the batch, its rows, and the vocabulary."""
        found = self.data.batch_problems(self.train.global_batch)
        found += self.train.problems_with(self.model)
        if (self.tokenizer.vocab_size or 0) > (vocab_size := self.model.vocab_size):
            found.append(
                Problem(
                    "tokenizer.vocab_size",
                    self.tokenizer.vocab_size,
                    f"the model has embeddings for model.vocab_size={vocab_size} only",
                    "raise that or lower this",
                    others=("model.vocab_size",),
                )
            )
        return found + self.hooks.sample.problems_with(self.model)


def _of_length(problem: Problem) -> Problem:
    """The problem, which is not reported if a setting of the length is wrong by itself."""
    return replace(problem, others=(*problem.others, *LENGTHS))


SECTIONS = frozenset(setting.name for setting in fields(Config))
"""The first parts of the settings' names: `model`, `train`, ..."""
