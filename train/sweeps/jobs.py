"""The jobs of a command line, of which each may be right and all together wrong."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from conf.errors import Problem
from train.config import Config
from train.overrides import Typed


class Job(NamedTuple):
    """A run that a command starts, and the settings that its overrides name."""

    config: Config
    typed: Typed


def jobs_problems(jobs: Sequence[Job]) -> list[Problem]:
    """What is wrong with jobs whose configurations are right."""
    # What is varied to no effect also makes equal names, which is no problem of its own then.
    return _unused(jobs) or _shared_directories(jobs)


def _unused(jobs: Sequence[Job]) -> list[Problem]:
    """The settings of the command line that change nothing.

    One that all members of a sweep share must change at least one of them. One that is varied must
    change each, or two members would be the same run.
    """
    unused = [{problem.key: problem for problem in job.config.unused()} for job in jobs]
    everywhere = set.intersection(*map(set, unused)) if unused else set()
    return [
        problem
        for problems, job in zip(unused, jobs, strict=True)
        for key, problem in problems.items()
        if key in job.typed.varied and (job.typed.varied[key] or key in everywhere)
    ]


def _shared_directories(jobs: Iterable[Job]) -> list[Problem]:
    hint = "leave run.dir out, and sweep settings that make a difference"
    return [
        Problem("run.dir", str(path), f"{count} jobs of this sweep would share it", hint)
        for path, count in Counter(job.config.run_dir for job in jobs).items()
        if count > 1
    ]


def tell_of_no_chunk(jobs: Iterable[Job]) -> None:
    """Say what `model.chunk=null` means, once, before anything begins."""
    if "phd_swa" in {job.config.model.variant for job in jobs if job.typed.no_chunk}:
        print("model.chunk=null: no chunk, which is model=phd_swa", file=sys.stderr)


def in_group(config: Config, group: str | None) -> Config:
    """The config of a run that Weights & Biases shows with the others of its sweep."""
    if not group or config.hooks.wandb.group is not None:
        return config
    wandb = replace(config.hooks.wandb, group=group)
    return replace(config, hooks=replace(config.hooks, wandb=wandb))
