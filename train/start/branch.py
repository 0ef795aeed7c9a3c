"""A decay's start from the checkpoint of its trunk."""

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from conf.errors import ConfigError, Problem
from conf.wording import plural
from train.checkpoint.reader import Checkpoint
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.console import warn
from train.distributed.process_groups import ProcessGroups, raise_on_all_ranks
from train.run_dir.name import identity
from train.start.changes import changes
from train.start.directory import CHECKPOINTS
from train.start.trunk import check_trunk, trunk_of

OTHERWISE = "Restore one of them from a copy, or choose another run.decay_of."
OF_ANOTHER = "give a decay the settings of its trunk"

OWN = ("schedule.", "train.flops_of")
"""How the settings begin in which a decay may differ from its trunk, as its length says them."""


def branch_checkpoint(config: Config, groups: ProcessGroups, console: Console) -> Checkpoint:
    """The trunk's checkpoint from which a decay starts. Every rank calls this.

    That is the newest one that is not after the decay's beginning. Where the trunk has kept none
    of that very step, the steps between are taken again.

    Raises:
        ConfigError: as `check_trunk` and `check_settings`.
        DataError: all such checkpoints are damaged.
    """
    run, branch = trunk_of(config), config.branch
    assert branch is not None
    raise_on_all_ranks(groups, lambda: check_trunk(config))
    store = CheckpointStore(run / CHECKPOINTS, keep=1, groups=groups)
    checkpoint = store.newest(OTHERWISE, up_to=branch)
    if checkpoint is None:  # deleted since
        gone = Problem("run.decay_of", str(run), "its checkpoints are being deleted")
        raise ConfigError([gone])
    check_settings(config, checkpoint.state["config"], checkpoint.step)
    checkpoint.refuse_old_form(config.model)
    for path, reason in checkpoint.rejected:
        warn(console, f"rejected the checkpoint {path}: {reason}")
    told = f"decays from {checkpoint.path}: the trunk has {checkpoint.step} of the run's "
    console.print(f"{told}{config.total_steps} steps", markup=False)
    if (again := branch - checkpoint.step) > 0:
        text = f"the trunk keeps no whole checkpoint of step {branch}, where the decay begins: "
        warn(console, f"{text}{again} steps before it are taken once more")
    for key, line in changes(checkpoint.state["config"], config).items():
        if not key.startswith((*OWN, "train.max_")):
            warn(console, f"not as in the trunk: {line}")
    return checkpoint


def check_settings(config: Config, saved: dict[str, Any], step: int) -> None:
    """Make sure that a decay goes on as its trunk has begun.

    Args:
        config: of the decay.
        saved: the settings in the trunk's checkpoint.
        step: of that checkpoint.

    Raises:
        ConfigError: names all settings that differ, or why the trunk is none.
    """
    trunk = Config.from_dict(saved)
    found = [*_differences(trunk, config), *_other_course(trunk, config, step)]
    if found:
        raise ConfigError(found)


def _differences(trunk: Config, config: Config) -> list[Problem]:
    """The settings that make another run of a decay than of its trunk."""
    ours, theirs = (
        {key: value for key, value in identity(each).items() if not key.startswith(OWN)}
        for each in (config, trunk)
    )
    run = trunk_of(config)
    both = [
        Problem(key, ours[key], f"the trunk {run} has {_spelled(theirs[key])}", OF_ANOTHER)
        for key in ours.keys() & theirs.keys()
        if ours[key] != theirs[key]
    ]
    # What only one of them has follows from another setting, but where it is a source of text.
    alone = [
        Problem(key, expected=f"only the {who} has it", hint=OF_ANOTHER)
        for who, mine, others in (("decay", ours, theirs), ("trunk", theirs, ours))
        for key in mine.keys() - others.keys()
        if not both or key.startswith("data.")
    ]
    return sorted(both + alone, key=str)


def _spelled(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _other_course(trunk: Config, config: Config, step: int) -> Iterator[Problem]:
    """How the learning rate or the copies of a trunk were not those of the decay's run."""
    run = trunk_of(config)
    if trunk.warmup_steps != config.warmup_steps:
        reason = f"the trunk {run} had a warm-up of {plural(trunk.warmup_steps, 'step')}"
        hint = f"set schedule.warmup_steps={trunk.warmup_steps}"
        yield Problem("schedule.warmup_steps", config.warmup_steps, reason, hint)
    if trunk.schedule.copies is not None:
        reason = "schedule.copies has switched its K, which a decay does not do"
        yield Problem("run.decay_of", str(run), reason, "choose another trunk")
    total = trunk.total_steps
    if total is not None and step > (falls := total - trunk.decay_steps):
        reason = f"its learning rate falls from step {falls + 1} on, before the checkpoint of step"
        hint = "choose a run with schedule=wsd_s or schedule=constant"
        yield Problem("run.decay_of", str(run), f"{reason} {step}", hint)
