"""The training loop."""

from itertools import count
from time import perf_counter

from rich.progress import Progress

from data.loader import Loader
from data.prefetch import WaitEndedError
from data.stream import Batch, OutOfTextError
from train.engine import Rows
from train.hooks import Metrics, StepRecord
from train.interruption import Interruption
from train.run import Run
from train.schedule import learning_rate
from train.sinks import console_lines
from train.validation import ConfigError


def train(run: Run, progress: Progress) -> tuple[StepRecord, Metrics]:
    """Train from the run's step to its end; return the last step's record and metrics.

    Nothing here waits for the device, except on steps after which a hook is due.
    """
    config, engine = run.config, run.engine
    bar = progress.add_task(
        "training", total=config.train.total_steps, completed=run.step, status=""
    )
    started, hooks_s = perf_counter(), 0.0
    workers, depth = config.data.workers, config.data.prefetch
    with (
        Interruption() as interruption,
        Loader(run.stream, workers=workers, depth=depth, give_up=interruption.came) as batches,
    ):
        for step in count(run.step + 1):
            batch = _next(batches)
            lr = learning_rate(config, step - 1)
            result = engine.step(Rows.of(batch), lr)

            train_s = perf_counter() - started - hooks_s
            ending = run.ending(step, train_s, interruption.received, batches.failure)
            due = [hook for hook in run.hooks if ending or (hook.every and step % hook.every == 0)]
            if due:
                engine.synchronize()
                train_s = perf_counter() - started - hooks_s
            record = StepRecord(
                step=step,
                tokens=step * config.train.tokens_per_step,
                lr=lr,
                loss=result.loss,
                grad_norm=result.grad_norm,
                batch=batch,
                train_s=train_s,
                data_wait_s=batches.wait_s,
                ending=ending,
                failure=batches.failure,
            )
            metrics: Metrics = {}
            for hook in due:
                metrics |= hook(record)
            for sink in run.sinks if metrics else ():
                sink.write(step, metrics)
            hooks_s = perf_counter() - started - train_s

            progress.update(bar, completed=step)
            if status := " ".join(console_lines(metrics)[:1]):
                progress.update(bar, status=status)
            if ending:
                return record, metrics
    raise AssertionError("steps are counted without end")


def _next(batches: Loader) -> Batch:
    """The next batch."""
    try:
        return next(batches)
    except OutOfTextError:
        raise
    except ValueError as error:
        raise user_error(error) from error
    except WaitEndedError:
        raise KeyboardInterrupt from None  # before the first step: there is nothing to save


def user_error(failure: Exception | None) -> Exception:
    """What the data refuses, such as too few documents, is the user's to mend; all else is not."""
    assert failure is not None
    return ConfigError([str(failure)], "the data") if isinstance(failure, ValueError) else failure
