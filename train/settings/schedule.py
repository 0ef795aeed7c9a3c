"""`schedule.`: the learning rate, and the copies of each token, as functions of the step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Annotated, Literal, NamedTuple

from conf.errors import Problem
from conf.settings import Settings, at_least, without_effect
from conf.wording import plural
from phd.config import ModelConfig

Copies = Annotated[
    dict[float, int], "the K from each fraction of the run on, such as {0: 1, 0.75: 2}"
]

EXAMPLE_OF_DECAYS = "give them as in schedule.decays=[80,160,320]"

COPIES_HINT = (
    "expected fractions of the run with the K from there on, as in 'schedule.copies={0: 1, 0.75: "
    "2}'; with one K alone, set it as model.K"
)


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
class ScheduleConfig(Settings):
    """The learning rate as a function of the step: a linear warm-up, then `kind`.

    And the copies of each token, where they are not the same in the whole run.

        cosine    /``\\__    half a cosine down to final_ratio
        linear    /\\___     a straight line down to final_ratio
        wsd       /````\\    the peak, then a straight line down in the last decay_fraction
        wsd_s     /`````    the peak, for a trunk from which several decays start, each a run
                   \\ \\ \\    of its own that is like wsd of its length
        constant  /`````    the peak

    Attributes:
        kind: the course of the learning rate after the warm-up, as drawn above.
        warmup_steps: the length of the warm-up in steps; null: `warmup_tokens` says it.
        warmup_tokens: the length of the warm-up in tokens of text; null: `warmup_fraction` says it.
        warmup_fraction: the length of the warm-up as a fraction of the run; of the shortest decay's
            run, where there are several.
        final_ratio: the last learning rate, as a fraction of the peak.
        decay_fraction: the last part of the run, as a fraction, in which `wsd` decays, and so does
            each of the runs that `wsd_s` makes.
        decays: the lengths in steps of the runs that the decays of `wsd_s` make, such as
            `[80, 160, 320]`. The last decay_fraction of each is a run of its own, from a checkpoint
            that the trunk keeps. null: `decays_tokens` says it.
        decays_tokens: the same in tokens of text; null: `decays_tokens_per_parameter` says it.
        decays_tokens_per_parameter: the same in tokens for each of the model's parameters, with the
            embedding, such as `[5, 20, 80]`. null: one of the others says it.
        copies: K as a function of the step, where it is switched within the run:
            `{0: 1, 0.75: 2}` trains without hidden copies at first, and with one of each token in
            the last quarter. The last K has to be `model.K`. null: `model.K` all the time.
    """

    kind: Literal["cosine", "linear", "wsd", "wsd_s", "constant"] = "cosine"
    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    warmup_fraction: float = 0.05
    final_ratio: float = 0.1
    decay_fraction: float = 0.2
    decays: tuple[int, ...] | None = None
    decays_tokens: tuple[int, ...] | None = None
    decays_tokens_per_parameter: tuple[float, ...] | None = None
    copies: Copies | None = None

    def problems(self) -> list[Problem]:
        found = at_least(self, "schedule", 0, "warmup_steps", "warmup_tokens")
        found += self._problems_of_decays()
        found += [self.copies_problem(reason, COPIES_HINT) for reason in self._flaws_of_copies()]
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

    @property
    def is_trunk(self) -> bool:
        """Whether several decays start from the run."""
        return self.kind == "wsd_s"

    @property
    def given_decays(self) -> dict[str, tuple[float, ...]]:
        """The lengths of the decays' runs, by the full name of the setting that says them."""
        return {
            f"schedule.{name}": value
            for name in ("decays", "decays_tokens", "decays_tokens_per_parameter")
            if (value := getattr(self, name)) is not None
        }

    def _problems_of_decays(self) -> list[Problem]:
        """What is wrong with the decays of a trunk, whatever its batch and model are."""
        given = self.given_decays
        found = [
            Problem(key, lengths, "expected lengths above 0 that increase", EXAMPLE_OF_DECAYS)
            for key, lengths in given.items()
            if not lengths or lengths[0] <= 0 or any(a >= b for a, b in pairwise(lengths))
        ]
        if not self.is_trunk:
            return found
        if not given:
            reason = "schedule.kind=wsd_s has to know how long the runs of its decays are"
            found.append(Problem("schedule.decays", None, reason, EXAMPLE_OF_DECAYS))
        if len(given) > 1:
            first, second, *_ = given
            reason = f"{first} already says how long they are"
            found.append(Problem(second, given[second], reason, "set one to null", (first,)))
        if self.decay_fraction == 0:
            reason = "the decays of schedule.kind=wsd_s would have no steps"
            hint = "choose a part of a run, such as 0.2"
            found.append(Problem("schedule.decay_fraction", 0, reason, hint))
        if self.copies is not None:
            reason = "its fractions are of a run, and the runs of schedule.kind=wsd_s have several"
            hint = "choose schedule=wsd, and train a run for each length"
            found.append(self.copies_problem(f"{reason} lengths", hint, ("schedule.kind",)))
        return found

    def copies_problem(self, reason: str, hint: str, others: tuple[str, ...] = ()) -> Problem:
        """A problem of `copies`, which is told as it is typed, with 0 and not 0.0.

        >>> str(ScheduleConfig(copies={0.0: 1, 0.75: 2}).copies_problem("why", "what to do"))
        'schedule.copies={0: 1, 0.75: 2}: why; what to do'
        """
        copies = (self.copies or {}).items()
        typed = {int(start) if start.is_integer() else start: K for start, K in copies}
        return Problem("schedule.copies", typed, reason, hint, others)

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
        if self.kind not in ("wsd", "wsd_s"):
            reason = f"schedule.kind={self.kind} has no decay_fraction"
            found += without_effect(
                self, "schedule", reason, "choose schedule=wsd", "decay_fraction"
            )
        if not self.is_trunk:
            reason, hint = f"schedule.kind={self.kind} has no decays", "choose schedule=wsd_s"
            names = (key.removeprefix("schedule.") for key in self.given_decays)
            found += without_effect(self, "schedule", reason, hint, *names)
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

    def warmup(self, total: int | None, tokens_per_step: int) -> int:
        """Steps of the warm-up in a run of `total` steps; 0 if only time ends it, unless set."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_tokens is not None:
            return ceil(self.warmup_tokens / tokens_per_step)
        return round(self.warmup_fraction * (total or 0))

    def decay(self, total: int | None, tokens_per_step: int) -> int:
        """Steps at the end of a run of `total` steps in which the learning rate falls."""
        if self.kind == "constant" or self.is_trunk:
            return 0
        assert total is not None, "only a constant schedule may have no end"
        if self.kind == "wsd":
            return self.last_part(total)
        return total - self.warmup(total, tokens_per_step)

    def last_part(self, total: int) -> int:
        """Steps of the last `decay_fraction` of a run of `total` steps."""
        return round(self.decay_fraction * total)

    def warmup_problems(
        self, total: int, tokens_per_step: int, limits: Sequence[str]
    ) -> list[Problem]:
        """Why the warm-up does not fit into a run of `total` steps, which `limits` allow."""
        warmup = self.warmup(total, tokens_per_step)
        # The decay of the other kinds begins where the warm-up ends, and has no length of its own.
        decay = self.decay(total, tokens_per_step) if self.kind == "wsd" else 0
        if warmup + decay <= total:
            return []
        name, value = next(
            (name, value)
            for name in ("warmup_steps", "warmup_tokens", "warmup_fraction")
            if (value := getattr(self, name)) is not None
        )
        takes = plural(warmup, "step") + (f" and the decay {decay}" if decay else "")
        reason = f"the warm-up takes {takes}, but the run has {total}"
        hint = f"shorten it, or raise {' and '.join(limits) or 'train.max_steps'}"
        return [Problem(f"schedule.{name}", value, reason, hint)]

    def stages(self, total: int) -> tuple[CopyStage, ...]:
        """The stages of `copies` in a run of `total` steps; too short a run leaves some empty."""
        assert self.copies is not None
        firsts = [round(start * total) for start in self.copies]
        ends = [*firsts[1:], None]
        return tuple(map(CopyStage, firsts, ends, self.copies.values()))

    def most_steps(self, flops: float, step_flops: Callable[[int], int]) -> int:
        """The steps of the longest run with `copies` whose FLOPs are within a limit.

        Args:
            flops: the limit.
            step_flops: of a step with K copies.
        """
        assert self.copies is not None
        costs = [step_flops(K) for K in self.copies.values()]
        shares = [end - start for start, end in pairwise([*self.copies, 1.0])]
        mean = sum(share * cost for share, cost in zip(shares, costs, strict=True))

        def total_flops(steps: int) -> int:
            return sum(s.steps(0, steps) * step_flops(s.K) for s in self.stages(steps))

        # The stages have whole steps, so this is right but for a few steps.
        steps = int(flops / mean) + len(costs) * ceil(max(costs) / mean)
        while steps and total_flops(steps) > flops:
            steps -= 1
        return steps

    def variant_problems(self, model: ModelConfig) -> list[Problem]:
        """Why a variant has no copies."""
        if self.copies is None or model.variant != "vanilla":
            return []
        reason = "vanilla feeds each token once"
        choose = "choose model=naive_repeat, phd, phd_swa or phd_cswa"
        return [self.copies_problem(reason, choose, ("model.variant",))]

    def problems_with(self, model: ModelConfig) -> list[Problem]:
        """Why the K of `copies` do not fit that of the model."""
        if self.copies is None:
            return []
        copies = list(self.copies.values())
        if copies[-1] != model.K:
            reason = f"its last K is not model.K={model.K}, after which the run is named"
            hint = f"set model.K={copies[-1]}, or change the last K"
            return [self.copies_problem(reason, hint, ("model.K",))]
        if model.copy_embedding and max(copies) > model.K:
            reason = f"model.copy_embedding=true has vectors for the last model.K={model.K} copies"
            hint = "let the last K be the largest"
            return [self.copies_problem(reason, hint, ("model.copy_embedding",))]
        return self._input_problems(model, copies)

    def _input_problems(self, model: ModelConfig, copies: Sequence[int]) -> list[Problem]:
        """Why what hidden copies are fed does not fit these K."""
        others, name = ("model.copy_input",), f"model.copy_input={model.hidden_input}"
        if model.hidden_input != "token" and min(copies) == 1:
            reason = f"{name} is not trained while there are no hidden copies"
            hint = "let every K be 2 at least, or set model.copy_input=token"
            return [self.copies_problem(reason, hint, others)]
        if model.hidden_input == "table" and max(copies) > model.K:
            reason = f"{name} has tables for the last model.K={model.K} copies"
            return [self.copies_problem(reason, "let the last K be the largest", others)]
        return []

    def stage_problems(self, total: int | None, limits: Sequence[str]) -> list[Problem]:
        """Why a run of `total` steps, which `limits` allow, has no step with some K of `copies`.

        Args:
            total: None if only time ends the run.
            limits: the settings that end it.
        """
        if self.copies is None:
            return []
        if total is None:
            reason = "its fractions are of a run whose length in steps is known"
            hint = "set train.max_steps, train.max_tokens or train.max_flops"
        elif not all(stage.steps(0, total) for stage in self.stages(total)):
            reason = f"the run has {plural(total, 'step')}, too few for a step with each K"
            hint = f"raise {' and '.join(limits) or 'train.max_steps'}"
        else:
            return []
        return [self.copies_problem(reason, hint)]
