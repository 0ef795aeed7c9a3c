"""Recording in the ledger how a start of a run has ended.

Rank 0 writes. That it cannot costs the result, which can be made again, and not the run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from conf.errors import DataError, TransientError
from train.config import Config
from train.console import warn
from train.distributed.process_groups import ProcessGroups
from train.experiments.ledger import (
    Ended,
    add_scores,
    config_of,
    heldout_of,
    is_run,
    result_of,
)
from train.experiments.ledger import record_end as write_end
from train.experiments.result import Status
from train.experiments.task_scores import scores_in
from train.metrics.record import Metrics
from train.run_dir.name import identity


def record_end(config: Config, groups: ProcessGroups, console: Console, ended: Ended) -> None:
    """Write how the run has ended, and its result."""
    if groups.is_rank_zero:
        with _told(console):
            write_end(config.run_dir, ended)


def record_complete(
    config: Config, groups: ProcessGroups, console: Console, step: int, metrics: Metrics
) -> None:
    """Write the result of a run that had nothing left to train, with what was measured of it now.

    So a run of a version that kept no standard errors gets them by its own command.
    """
    if groups.is_rank_zero:
        with _told(console):
            finished = Ended(status="finished")
            write_end(config.run_dir, finished)
            heldout, tasks = heldout_of([metrics]), scores_in(metrics)
            if heldout or tasks:
                add_scores(config.run_dir, step=step, heldout=heldout, tasks=tasks)
                # It knows that the process that holds the directory is this one.
                write_end(config.run_dir, finished)


@contextmanager
def failures_recorded(config: Config, groups: ProcessGroups, console: Console) -> Iterator[None]:
    """Record an error that ends the run; it is raised all the same.

    A command that is refused because the directory holds another run, or one that is finished, says
    nothing about that run.
    """
    try:
        yield
    except Exception as error:
        if groups.is_rank_zero and is_run(config.run_dir):
            with _told(console):
                _record_failure(config, error)
        raise


def _record_failure(config: Config, error: Exception) -> None:
    directory = config.run_dir
    # The same command may go on later, and is asked to.
    status: Status = "unfinished" if isinstance(error, TransientError) else "failed"
    reason = f"{type(error).__name__}: {error}"
    try:
        own = identity(config_of(directory)) == identity(config)
    except DataError:  # of a version with other settings
        return
    if own and result_of(directory, held=False).status != "finished":
        write_end(directory, Ended(status=status, reason=" ".join(reason.split())))


@contextmanager
def _told(console: Console) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # also one of the program's: a run of weeks is not lost for it
        warn(console, f"result.json is not written: {type(error).__name__}: {error}")
