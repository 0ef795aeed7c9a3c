"""The trunk of several decays, and the decays as runs. Needs no torch, which takes seconds.

runs/law              the trunk, schedule=wsd_s: its decays have 80, 160 and 320 steps
runs/law-80_steps     decays: each a run with schedule=wsd, which starts from the trunk's
runs/law-160_steps    checkpoint of step 64, 128 or 256, and is equal to a run of as many
runs/law-320_steps    steps that has taken all of them itself
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

from conf.errors import ConfigError, DataError, Problem
from conf.wording import plural
from train.config import Config
from train.experiments.result import FILE, read_result
from train.settings.run import decay_name
from train.start.directory import CHECKPOINTS, RUN_CONFIG, STEPS, complete_checkpoints


def decays_of(trunk: Config) -> list[Config]:
    """The runs that the decays of a trunk are, the shortest first; none of any other run."""
    given = trunk.run.dir
    runs = {
        length: replace(
            trunk.run,
            name=decay_name(trunk.name, length),
            dir=None if given is None else decay_name(given.rstrip("/"), length),
            # What the trunk must have been given, a decay need not have yet.
            resume="auto" if trunk.run.resume == "must" else trunk.run.resume,
            decay_of=str(trunk.run_dir),
        )
        for length in trunk.branches
    }
    schedule = replace(
        trunk.schedule,
        kind="wsd",
        warmup_steps=trunk.warmup_steps,
        warmup_tokens=None,
        decays=None,
        decays_tokens=None,
        decays_tokens_per_parameter=None,
    )
    trains = {
        length: replace(
            trunk.train,
            max_steps=length,
            max_tokens=None,
            max_tokens_per_parameter=None,
            max_flops=None,
        )
        for length in trunk.branches
    }
    return [
        replace(trunk, run=run, schedule=schedule, train=trains[length])
        for length, run in runs.items()
    ]


def trunk_of(config: Config) -> Path:
    """The directory of a decay's trunk."""
    assert config.run.decay_of is not None
    return Path(config.run.decay_of).expanduser()


def check_trunk(config: Config) -> None:
    """Make sure that the trunk of a decay has a checkpoint that the decay can start from.

    Raises:
        ConfigError: there is no such run, or it has no such checkpoint.
    """
    run = trunk_of(config)
    names = [path.name.removeprefix("step_") for path in complete_checkpoints(run)]
    steps = sorted((int(name) for name in names if name.isdigit()), reverse=True)  # no user's copy
    if why := _why_not(config, run, steps):
        reason, hint = why
        raise ConfigError([Problem("run.decay_of", str(run), reason, hint)])


def _why_not(config: Config, run: Path, steps: Sequence[int]) -> tuple[str, str] | None:
    """Why a run has no checkpoint from which a decay could start, and what to do.

    Args:
        steps: of its complete checkpoints, newest first.
    """
    branch, total = config.branch, config.total_steps
    assert branch is not None
    assert total is not None
    here = f"a decay at the end of {plural(total, 'step')} begins after step {branch}"
    if not run.exists():
        return "no such directory", "give that of a run"
    if not (run / RUN_CONFIG).is_file() and not any(run.glob(f"{CHECKPOINTS}/{STEPS}")):
        return "is no directory of a run", "give that of a run"
    if not steps or steps[0] < branch:
        come = f"has come to step {steps[0]}" if steps else "has no complete checkpoint"
        come, hint = _ended(run) or (come, "let it train on, by its own command")
        return f"{come}, and {here}", hint
    if steps[-1] > branch:
        shortest = ceil(steps[-1] / (1 - config.schedule.decay_fraction))
        hint = f"let this run have about {plural(shortest, 'step')} or more, or train the trunk "
        hint += "anew with its length in schedule.decays"
        return f"its first checkpoint is of step {steps[-1]}, and {here}", hint
    return None


def _ended(run: Path) -> tuple[str, str] | None:
    """How a run has ended that its own command would not lead on, and what to do; else None."""
    try:
        result = read_result(run / FILE)
    except (OSError, DataError):  # none yet
        return None
    if result.status != "finished":
        return None
    if not result.at_end:
        hint = "raise data.sources.*.epochs of the trunk and give its command again, or let the "
        return f"its text ended after step {result.steps}", f"{hint}decay be shorter"
    longer = "with this length in schedule.decays" if result.is_trunk else "with a greater length"
    hint = f"give the trunk's command again, {longer}"
    return f"has ended after step {result.steps}, as it was told", hint
