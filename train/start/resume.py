"""The checkpoint that a run goes on from, and how far it is there."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console

from conf.errors import ConfigError, Problem
from conf.wording import plural
from train.checkpoint.reader import Checkpoint
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.console import warn
from train.engines.schedule import config_before, schedule_change
from train.start.changes import changes

# Settings that a resumed run must share with its checkpoint; the rest may be changed.
FIXED = ("seed", "model", "train.global_batch", "train.seq_len", "optim.kind")

# And those of a trunk and its decays, which are equal to runs that have taken all steps themselves.
FIXED_OF_TRUNK = (*FIXED, "optim.")


class Progress(NamedTuple):
    """How far a run is when it is opened.

    Attributes:
        step: optimizer steps.
        tokens: of all rows so far, their padding included.
        flops: `phd.flops.training_flops` of all ranks.
        batches: that the stream has given; more than steps where some were skipped.
        bad_steps: what is remembered of them; None: nothing is.
    """

    step: int
    tokens: int
    flops: int
    batches: int
    bad_steps: Any

    @classmethod
    def of(cls, config: Config, checkpoint: Checkpoint | None) -> "Progress":
        """What a checkpoint of the run tells; None: the run is a new one."""
        state, step = (checkpoint.state, checkpoint.step) if checkpoint else ({}, 0)
        return cls(
            step=step,
            tokens=step * config.train.tokens_per_step,
            # Checkpoints of version 0.1 have no such count; what it printed was that of whole rows.
            flops=state.get("train_flops", step * config.flops_per_step),
            batches=state.get("batches", 0),
            bad_steps=state.get("bad_steps"),
        )


def newest_checkpoint(
    config: Config, store: CheckpointStore, console: Console
) -> Checkpoint | None:
    """The checkpoint to go on from; prints which ones were rejected and what has changed.

    Raises:
        ConfigError: there has to be one and is none, or it is one of another run.
        DataError: every checkpoint is damaged.
    """
    if config.run.resume == "never":
        return None
    checkpoint = store.newest()
    if checkpoint is None:
        if config.run.resume == "must":
            missing = f"there is no checkpoint in {store.root}"
            hint = "check run.dir, or choose run.resume=auto"
            raise ConfigError([Problem("run.resume", "must", missing, hint)])
        return None
    for path, reason in checkpoint.rejected:
        warn(console, f"rejected the checkpoint {path}: {reason}")
    changed = changes(checkpoint.state["config"], config)
    of_trunk = config.schedule.is_trunk or config.run.decay_of is not None
    own = FIXED_OF_TRUNK if of_trunk else FIXED
    fixed = [line for key, line in changed.items() if key.startswith(own)]
    if fixed := [*fixed, *_other_decay(checkpoint, config)]:
        another = f"it holds another run: {'; '.join(fixed)}"
        hint = (
            "choose another run.name or run.dir, give the settings that it was trained with, or "
            "start anew with run.resume=never"
        )
        raise ConfigError([Problem("run.dir", str(config.run_dir), another, hint)])
    checkpoint.refuse_old_form(config.model)
    console.print(f"going on from {checkpoint.path}", markup=False)
    for line in changed.values():
        warn(console, f"changed since then: {line}")
    for line in _other_course(checkpoint, config):
        warn(console, line)
    return checkpoint


def _other_decay(checkpoint: Checkpoint, config: Config) -> Iterator[str]:
    """Why a trunk, or a decay of one, cannot go on from a checkpoint of its own.

    Its learning rate so far has to be that of a run which takes all its steps at once.
    """
    if not config.schedule.is_trunk and config.run.decay_of is None:
        return
    before = config_before(checkpoint.state["config"], config)
    if before is None:
        yield "its schedule is not one that this version knows"
    elif before.warmup_steps != config.warmup_steps:
        took = f"its warm-up took {plural(before.warmup_steps, 'step')}"
        yield f"{took}, and now it is schedule.warmup_steps={config.warmup_steps}"
    elif config.run.decay_of is not None and before.total_steps != config.total_steps:
        yield f"its decay ends at step {before.total_steps}, and now at step {config.total_steps}"
    elif config.run.decay_of is not None:
        for name in ("decay_fraction", "final_ratio"):
            then, now = getattr(before.schedule, name), getattr(config.schedule, name)
            if then != now:
                yield f"its decay has schedule.{name}={then}, and now it is {now}"


def _other_course(checkpoint: Checkpoint, config: Config) -> Iterator[str]:
    """How the learning rate and K go on otherwise than they would have."""
    before = config_before(checkpoint.state["config"], config)
    if before is None:
        yield "the learning rate's course so far is not one that this version can tell"
        return
    for told in (
        schedule_change(before, config, checkpoint.step),
        _other_copies(before, config, checkpoint.step),
    ):
        if told:
            yield told


def _other_copies(before: Config, now: Config, step: int) -> str | None:
    """How the next step of a resumed run differs in its K; None if it does not."""
    then, K = before.copy_stage(step).K, now.copy_stage(step).K
    if then == K:
        return None
    return f"K is {K} from step {step + 1} on; with the settings before, it would have been {then}"
