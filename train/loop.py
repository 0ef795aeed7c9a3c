"""The training loop."""

from collections.abc import Iterable
from dataclasses import replace
from time import perf_counter

from rich.progress import Progress

from conf.errors import ConfigError
from data.loader import Loader
from data.stream import OutOfTextError
from train.distributed.stop_sync import RankFlags
from train.engines.engine import Rows
from train.engines.schedule import learning_rate
from train.metrics.hooks import SaveCheckpoint
from train.metrics.record import Hook, Metrics, StepRecord, is_due
from train.metrics.sinks import Sink, console_lines
from train.run import Run


class StoppedEarlyError(Exception):
    """A signal came before there was anything to save."""


def train(run: Run, progress: Progress) -> tuple[StepRecord, Metrics]:
    """Train from the run's step to its end; return the last step's record and metrics.

    Nothing here waits for what was just asked of the device, except on steps after which a hook is
    due; the outcome of the step before is looked at, which has been computed meanwhile. All ranks
    take the same steps, and end after the same one.

    Raises:
        OutOfTextError: there is nothing to train on.
        StoppedEarlyError: a signal came before the first step.
        RollBackError, BadStepError: see `train.anomalies.policy`.
    """
    config, engine, stop_sync = run.config, run.engine, run.stop_sync
    bar = progress.add_task(
        "training", total=config.train.total_steps, completed=run.step, status=""
    )
    started, hooks_s = perf_counter(), 0.0
    record: StepRecord | None = None
    with Loader(
        run.stream,
        workers=config.data.workers,
        depth=config.data.prefetch,
        stop_requested=run.stop_signal.is_set,
        batches_done=run.batches,
        skip_batches=run.skip_batches,
    ) as loader:
        _agree_to_begin(run, loader)
        for step, batch in enumerate(loader, run.step + 1):
            number = loader.number
            assert batch.stats is not None
            lr = learning_rate(config, step - 1)
            stop_sync.begin(_rank_flags(run, loader, perf_counter() - started - hooks_s))
            result = engine.step(
                Rows.of(batch), lr, run.bad_step_policy.limits(step), stop_sync.stop
            )
            flags = stop_sync.end()
            if result is None:
                return _interrupted(run, record)
            run.bad_step_policy.take(step, number, batch, lr, result)

            ending = run.ending(step, flags)
            due = [hook for hook in run.hooks if ending or is_due(hook, step)]
            if due:
                run.bad_step_policy.flush()
                engine.synchronize()
            train_s = perf_counter() - started - hooks_s
            record = StepRecord(
                step=step,
                tokens=step * config.train.tokens_per_step,
                batches=number,
                lr=lr,
                loss=result.loss,
                grad_norm=result.grad_norm,
                batch=batch,
                stats=batch.stats,
                train_s=train_s,
                data_wait_s=(loader.wait_s,),
                ending=ending,
                failure=_failure(run, loader, ending),
            )
            metrics = _observe(run, record, due, run.sinks)
            hooks_s = perf_counter() - started - train_s

            progress.update(bar, completed=step)
            if status := " ".join(console_lines(metrics)[:1]):
                progress.update(bar, status=status)
            if ending:
                return record, metrics
            if stop_sync.signal:
                return _interrupted(run, record)
    raise AssertionError("the batches have no end")


def _rank_flags(run: Run, loader: Loader, train_s: float) -> RankFlags:
    """What this rank knows before a step."""
    following, limit = loader.peek(), run.config.train.max_time
    stats = following.stats if following else None
    return RankFlags(
        failed=loader.failure is not None and not isinstance(loader.failure, OutOfTextError),
        full=stats is not None and stats.targets > 0,
        late=limit is not None and train_s >= limit,
    )


def _agree_to_begin(run: Run, loader: Loader) -> None:
    """Make sure that every rank has a first batch."""
    run.stop_sync.begin(_rank_flags(run, loader, 0.0))
    flags = run.stop_sync.end()
    if run.stop_sync.signal:
        raise StoppedEarlyError
    if ending := run.data_ending(flags):
        failure = _failure(run, loader, ending)
        raise failure if isinstance(failure, OutOfTextError) else user_error(failure)


def _failure(run: Run, loader: Loader, ending: str | None) -> Exception | None:
    """Why there is no next batch, the same on all ranks; None if there is."""
    if ending == "out_of_text":
        return run.stream.out_of_text()
    if ending != "no_data":
        return None
    own = loader.failure
    told = run.groups.gather(None if own is None else (isinstance(own, ValueError), str(own)))
    if own is not None and not isinstance(own, OutOfTextError):
        return own
    refused, text = next(found for found in told if found is not None)
    return ValueError(text) if refused else RuntimeError(text)


def _observe(run: Run, record: StepRecord, hooks: list[Hook], sinks: Iterable[Sink]) -> Metrics:
    """Call hooks with what all ranks know of a step, and write what they return."""
    metrics: Metrics = {}
    if hooks:
        record = replace(record.of_all(run.groups), bad_steps=run.bad_step_policy.to_json())
    for hook in hooks:
        metrics |= hook(record)
    for sink in sinks if metrics else ():
        sink.write(record.step, metrics)
    return metrics


def _interrupted(run: Run, record: StepRecord | None) -> tuple[StepRecord, Metrics]:
    """End after a step that was taken for an ordinary one: save, and do what was not due."""
    assert run.stop_sync.signal is not None
    if record is None:
        raise StoppedEarlyError
    run.bad_step_policy.flush()
    record = replace(record, ending=run.stop_sync.signal.name)
    done = [hook for hook in run.hooks if is_due(hook, record.step)]
    rest = [hook for hook in run.hooks if isinstance(hook, SaveCheckpoint) or hook not in done]
    return record, _observe(run, record, rest, () if done else run.sinks)


def user_error(failure: Exception | None) -> Exception:
    """What the data refuses, such as too few documents, is the user's to mend; all else is not."""
    assert failure is not None
    return ConfigError([str(failure)], "the data") if isinstance(failure, ValueError) else failure
