"""The training loop."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from rich.progress import Progress

from data.batch import Batch
from data.loader import Loader
from data.prefetch import never
from data.stream import OutOfTextError
from phd.flops import training_flops
from train.console import TrainingBar
from train.distributed.process_groups import shared_error
from train.distributed.stop_sync import RankFlags
from train.ending import Ending
from train.engines.engine import Engine, StepResult
from train.engines.limits import NO_LIMITS, Limits
from train.engines.schedule import learning_rate
from train.metrics.record import Hook, Metrics, StepRecord, is_due
from train.run import Run


class StoppedEarlyError(Exception):
    """A signal came before there was anything to save."""


def train(run: Run, progress: Progress) -> tuple[StepRecord, Metrics]:
    """Train from the run's step to its end; return the last step's record and metrics.

    The host runs ahead of the device: nothing here waits for what the step at hand computes, but
    where a hook is due. All ranks take the same steps, and end after the same one.

    Raises:
        OutOfTextError: there is nothing to train on.
        StoppedEarlyError: a signal came before the first step.
        RollBackError, BadStepError: see `train.anomalies.policy`.
    """
    config, engine, policy, stop_sync = run.config, run.engine, run.bad_step_policy, run.stop_sync
    bar = TrainingBar(progress, run.step, config.total_steps, config.train.max_time)
    started, hooks_s = perf_counter(), 0.0
    flops, record, ending = run.flops, None, None
    with run.loader() as loader, run.profile:
        wait_for_first_batch(run, loader)
        for step, batch in enumerate(loader, run.step + 1):
            assert batch.stats is not None
            lr, stage = learning_rate(config, step - 1), config.copy_stage(step - 1)
            engine.set_copies(stage.K)
            limits = policy.limits(step, since=stage.first + 1)
            run.profile.begin(step)
            stop_sync.start(rank_flags(run, loader, perf_counter() - started - hooks_s))
            result = train_step(engine, batch, lr, limits, stop_sync.stop_requested)
            flags = stop_sync.wait()
            if result is None:  # a signal came between micro-batches
                break
            run.profile.end(step)
            policy.observe(step, loader.number, batch, lr, result)
            flops += training_flops(engine.model.config, *batch.document_lengths)

            ending = run.ending(step, flags)
            due = partial(is_due, step=step)
            if ending or any(map(due, run.all_hooks)):
                policy.flush()
                engine.synchronize()
            train_s = perf_counter() - started - hooks_s
            record = StepRecord(
                step=step,
                tokens=step * config.train.tokens_per_step,
                flops=flops,
                batches=loader.number,
                lr=lr,
                loss=result.loss,
                grad_norm=result.grad_norm,
                batch=batch,
                stats=batch.stats,
                train_s=train_s,
                data_wait_s=(loader.wait_s,),
            )
            if ending:
                break
            metrics = measure_and_save(run, record, due)
            hooks_s = perf_counter() - started - train_s

            bar.update(step, metrics)
            if stop_sync.signal:  # it came while hooks were called
                break
        return end(run, loader, record, ending)


def train_step(
    engine: Engine,
    batch: Batch,
    lr: float,
    limits: Limits = NO_LIMITS,
    stop_requested: Callable[[], bool] = never,
) -> StepResult | None:
    """One optimizer step on this rank's rows of the global batch.

    The loss is a sum over targets, divided by the number of targets of the whole step, over all
    micro-batches and ranks. So gradients are summed, never averaged.

    Args:
        batch: as many rows on every rank.
        lr: the learning rate.
        limits: a step beyond them is not applied.
        stop_requested: asked between two micro-batches, by all ranks at once. If it says so, the
            step is given up: weights and moments stay as they were, and the result is None.
    """
    micro_batches = list(batch.split(engine.micro_batch))
    targets = engine.count_targets(batch)
    cross_entropy = torch.zeros((), device=engine.device)
    for number, micro_batch in enumerate(micro_batches, 1):
        if number > 1 and stop_requested():
            engine.drop_gradients()
            return None
        with engine.grad_sync(last=number == len(micro_batches)):
            loss = engine.forward(micro_batch)
            engine.backward(loss.total / targets)
        cross_entropy += loss.cross_entropy
    mean_loss = engine.sum_loss(cross_entropy) / targets
    grad_norm, applied = engine.optimizer_step(lr, mean_loss, limits)
    return StepResult(mean_loss, grad_norm, applied)


def measure_and_save(
    run: Run, record: StepRecord, due: Callable[[Hook], bool], *, log: bool = True
) -> Metrics:
    """Measure, save, evaluate, sample and log, each if it is due.

    The save comes before what takes long and could fail.
    """
    metrics: Metrics = {}
    if any(map(due, run.all_hooks)):
        record = replace(
            record.of_all(run.groups, run.engine.dims.ranks_per_row),
            bad_steps=run.bad_step_policy.to_json(),
        )
    for measure in filter(due, run.hooks):
        metrics |= measure(record)
    if due(run.save):
        metrics |= run.save(record)
    for evaluate in filter(due, run.evaluations):
        metrics |= evaluate(record)
    if due(run.sample):
        metrics |= run.sample(record)
    for sink in run.sinks if log and metrics else ():
        sink.write(record.step, metrics)
    return metrics


def end(
    run: Run, loader: Loader, record: StepRecord | None, ending: Ending | None
) -> tuple[StepRecord, Metrics]:
    """Save the last step, and do what else is due after the last step and has not been done."""
    if record is None:
        raise StoppedEarlyError
    done: list[Hook] = []
    if ending is None:  # the signal came after the step had been measured as any other
        assert run.stop_sync.signal is not None
        ending = Ending.of_signal(run.stop_sync.signal)
        done = [hook for hook in run.all_hooks if is_due(hook, record.step)]
    run.bad_step_policy.flush()
    record = replace(record, ending=ending, failure=_failure(run, loader, ending))

    def due(hook: Hook) -> bool:
        # A second save of the same step writes nothing, and waits for the first one.
        return hook is run.save or all(hook is not other for other in done)

    # A step has one line in each sink.
    return record, measure_and_save(run, record, due, log=not done)


def rank_flags(run: Run, loader: Loader, train_s: float) -> RankFlags:
    """What this rank knows before a step."""
    following, limit = loader.peek(), run.config.train.max_time
    stats = following.stats if following else None
    return RankFlags(
        data_failed=loader.failure is not None and not isinstance(loader.failure, OutOfTextError),
        has_next=stats is not None and stats.targets > 0,
        time_is_up=limit is not None and train_s >= limit,
    )


def wait_for_first_batch(run: Run, loader: Loader) -> None:
    """Make sure that every rank has a first batch; raises on all of them where one has none."""
    run.stop_sync.start(rank_flags(run, loader, 0.0))
    flags = run.stop_sync.wait()
    if run.stop_sync.signal:
        raise StoppedEarlyError
    if ending := run.data_ending(flags):
        failure = _failure(run, loader, ending)
        assert failure is not None
        raise failure


def _failure(run: Run, loader: Loader, ending: Ending) -> Exception | None:
    """Why there is no next batch, the same on all ranks; None if there is one."""
    if ending == Ending.OUT_OF_TEXT:
        return run.stream.out_of_text()
    if ending != Ending.DATA_FAILED:
        return None
    out_of_text = isinstance(loader.failure, OutOfTextError)
    return shared_error(run.groups, None if out_of_text else loader.failure)
