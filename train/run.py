"""A run: everything that the loop needs, opened, and resumed where it ended.

All ranks open the run and share its directory (train/run_dir). Rank 0 writes what is written once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from conf.errors import USER_ERRORS, ConfigError
from conf.redaction import redacted_tree
from data.loader import Loader
from data.stream import TokenStream
from data.tokenizer import Tokenizer
from train.anomalies.detection import SpikeDetector
from train.anomalies.policy import BadStepPolicy
from train.checkpoint.reader import Checkpoint
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.distributed.process_groups import ProcessGroups, raise_on_all_ranks
from train.distributed.signals import StopSignal
from train.distributed.stop_sync import RankFlags, StopSync
from train.distributed.watchdog import Watchdog
from train.ending import Ending
from train.engines.attention import configure_attention
from train.engines.device import choose_device, configure_process, device_memory, precision
from train.engines.engine import Engine
from train.engines.float8 import check_float8
from train.engines.fsdp import FsdpEngine
from train.engines.memory import fit
from train.evaluation.heldout_hook import HeldoutEvaluation, heldout_evaluations
from train.evaluation.task_hook import TaskEvaluation, task_evaluations
from train.experiments.result import Origin
from train.metrics.hooks import (
    DataProgress,
    KVCost,
    Sample,
    SaveCheckpoint,
    Throughput,
    TrainingMetrics,
    sample_prompt,
)
from train.metrics.record import Hook, Metrics
from train.metrics.sinks import (
    ConsoleLine,
    FailingSink,
    MetricsFile,
    Sink,
    Wandb,
    keep_run_id,
)
from train.profiling.window import ProfileWindow
from train.run_dir.lock import hold_run_dir
from train.run_dir.prepare import prepare_run_dir, take_over
from train.settings.engine import DeepSpeedConfig, FsdpConfig
from train.start.branch import branch_checkpoint
from train.start.resume import Progress, newest_checkpoint
from train.start.text import RunText, open_text, share_quarantine
from train.start.trunk import trunk_of
from train.start.weights import load_start, origin_of


@dataclass(frozen=True)
class Run:
    """An opened run on one of its ranks; `step` optimizer steps are done.

    Attributes:
        hooks: what is measured, in the order in which it is: the run's own, then the user's.
        save, evaluations, sample: hooks that the loop calls after them, in this order.
        profile: of a few steps, if one is asked for; the loop tells it of every step.
        flops: `phd.flops.training_flops` of all ranks so far, on rank 0; 0 on the others.
        batches: batches that the stream has given so far.
        skip_batches: numbers of batches that are not trained on.
    """

    config: Config
    directory: Path
    groups: ProcessGroups
    engine: Engine
    store: CheckpointStore
    tokenizer: Tokenizer
    stream: TokenStream
    stop_signal: StopSignal
    watchdog: Watchdog
    stop_sync: StopSync
    bad_step_policy: BadStepPolicy
    hooks: tuple[Hook, ...]
    save: SaveCheckpoint
    evaluations: tuple[HeldoutEvaluation | TaskEvaluation, ...]
    sample: Sample
    sinks: tuple[Sink, ...]
    profile: ProfileWindow
    step: int
    flops: int
    batches: int
    skip_batches: frozenset[int]

    @property
    def all_hooks(self) -> tuple[Hook, ...]:
        """Everything that is called after a step, in its order."""
        return (*self.hooks, self.save, *self.evaluations, self.sample)

    @property
    def finished(self) -> bool:
        """The run is as long as the configuration asks for."""
        total = self.config.total_steps
        return total is not None and self.step >= total

    @property
    def timed(self) -> bool:
        """The run has no length but its time."""
        return self.config.total_steps is None

    def ending(self, step: int, flags: RankFlags) -> Ending | None:
        """Why the run ends after this step; None if it goes on. The same on all ranks."""
        if flags.signal:
            return Ending.of_signal(flags.signal)
        total = self.config.total_steps
        if total is not None and step >= total:
            return Ending.FINISHED
        return self.data_ending(flags) or (Ending.MAX_TIME if flags.time_is_up else None)

    @staticmethod
    def data_ending(flags: RankFlags) -> Ending | None:
        """Why there is nothing more to train on; None if there is something."""
        if flags.data_failed:
            return Ending.DATA_FAILED
        return None if flags.has_next else Ending.OUT_OF_TEXT

    def loader(self) -> Loader:
        """The batches from here on."""
        return Loader(
            self.stream,
            workers=self.config.data.workers,
            depth=self.config.data.prefetch,
            stop_requested=self.stop_signal.is_set,
            batches_done=self.batches,
            skip_batches=self.skip_batches,
        )

    def measure(self) -> Metrics:
        """The evaluation and the sample of a run that is complete already."""
        metrics: Metrics = {}
        for evaluation in self.evaluations:
            metrics |= evaluation.measure()
        return metrics | self.sample.measure()


@contextmanager
def open_run(
    config: Config,
    console: Console,
    groups: ProcessGroups | None = None,
    stop_signal: StopSignal | None = None,
    skip_batches: frozenset[int] = frozenset(),
    hooks: Sequence[Callable[[Run], Hook]] = (),
) -> Iterator[Run]:
    """Open a run's directory, data and engine, and take up its newest whole checkpoint.

    The directory is held for this run alone (see train/run_dir/lock.py). What was opened is closed,
    whatever fails on the way: first the store, which may still be writing, then the sinks, then the
    engine.

    Args:
        console: of rank 0; the others' are quiet.
        groups: ranks that open it together; None: this process alone.
        stop_signal: notes the signals that come; None: the run has one of its own.
        skip_batches: numbers of batches that are not trained on.
        hooks: functions that make the user's hooks from the opened run.

    Raises:
        ConfigError: something that the configuration names is missing, does not fit the rest, or
            is not what the checkpoint was made with; or another process holds the directory.
        DataError: the text is missing, damaged or too little.
        TransientError: a server or a disk does not answer for now.
    """
    groups, stop_signal = groups or ProcessGroups(), stop_signal or StopSignal()
    with ExitStack() as stack:
        stack.enter_context(hold_run_dir(config.run_dir, groups, console))
        with ExitStack() as on_error:
            run = _open(config, console, groups, stop_signal, skip_batches, on_error)
            on_error.pop_all()
        stack.enter_context(run.watchdog)
        stack.enter_context(run.stop_signal)
        stack.enter_context(run.stop_signal.on_first(run.watchdog.begin_exit))
        stack.callback(run.engine.close)
        for sink in reversed(run.sinks):
            stack.callback(sink.close)
        stack.callback(run.store.close)
        stack.callback(run.watchdog.heartbeat)
        yield replace(run, hooks=(*run.hooks, *(make(run) for make in hooks)))


def _open(
    config: Config,
    console: Console,
    groups: ProcessGroups,
    stop_signal: StopSignal,
    skip_batches: frozenset[int],
    on_error: ExitStack,
) -> Run:
    """Open everything in its order; what has to be closed after a failure goes to `on_error`."""
    torch.manual_seed(config.seed)  # else the generators would start from a random state
    _configure_process(config, groups)
    store = CheckpointStore(
        config.run_dir / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        keep_steps=config.branches.values(),
        groups=groups,
    )
    own = newest_checkpoint(config, store, console)
    branch = None
    if own is None and config.run.decay_of is not None:
        branch = branch_checkpoint(config, groups, console)
    checkpoint = own or branch
    progress = Progress.of(config, checkpoint)
    first = not skip_batches  # remarks are told once, and not after each rollback
    text = open_text(config, checkpoint, groups, console, with_remarks=first)
    tokenizer = text.tokenizer
    # Engines talk to other ranks after they have checked the configuration.
    engine = raise_on_all_ranks(groups, lambda: open_engine(config, groups), USER_ERRORS)
    on_error.callback(engine.close)
    timeouts = config.faults.step_timeout, config.faults.exit_timeout
    watchdog = Watchdog(config.run_dir, groups.rank, *timeouts)
    stop_sync = StopSync(groups, stop_signal, watchdog)
    stop = stop_sync.stop_requested
    heldout = heldout_evaluations(config, text.documents, tokenizer, engine, stop, console)
    prompt = sample_prompt(config, tokenizer, {e.name: e.text for e in heldout})
    engine.set_copies(config.copy_stage(progress.step).K)
    origin = _restore(config, engine, checkpoint, tokenizer, console)
    _prepare_files(config, text, origin or branch, groups, console)
    detector = SpikeDetector(config.faults, progress.bad_steps)
    saved = _same_in_all_checkpoints(config, text, own, groups, console)
    return Run(
        config=config,
        directory=config.run_dir,
        groups=groups,
        engine=engine,
        store=store,
        tokenizer=tokenizer,
        stream=text.stream,
        stop_signal=stop_signal,
        watchdog=watchdog,
        stop_sync=stop_sync,
        bad_step_policy=BadStepPolicy(detector, engine, tokenizer, config.run_dir, console),
        hooks=_measurements(config, engine, text, progress, groups),
        save=SaveCheckpoint(config, engine, store, saved, tokenizer),
        evaluations=(*heldout, *task_evaluations(config, tokenizer, engine, stop)),
        sample=Sample(config, engine, tokenizer, prompt, stop),
        sinks=_open_sinks(config, checkpoint, console, on_error) if groups.is_rank_zero else (),
        profile=ProfileWindow(
            config.train, engine, config.run_dir / "profile", console, progress.step
        ),
        step=progress.step,
        flops=progress.flops if groups.is_rank_zero else 0,
        batches=progress.batches,
        skip_batches=skip_batches,
    )


def _configure_process(config: Config, groups: ProcessGroups) -> None:
    """Prepare this process for the run's device and its kernels."""
    device = raise_on_all_ranks(groups, lambda: _device(config))
    configure_process(config.engine, device)
    raise_on_all_ranks(groups, lambda: configure_attention(config, device))


def _device(config: Config) -> torch.device:
    """The device, if this machine can do on it what the configuration asks for."""
    device = choose_device(config.engine)
    if problems := config.device_problems(device.type):
        raise ConfigError(problems)
    check_float8(config.engine, device)
    return device


def _restore(
    config: Config,
    engine: Engine,
    checkpoint: Checkpoint | None,
    tokenizer: Tokenizer,
    console: Console,
) -> Origin | None:
    """Give the engine the weights and moments of the checkpoint, or of what the run starts from.

    Returns:
        what a new run starts from; None if it goes on, or has random weights.
    """
    if checkpoint:
        engine.restore(checkpoint)
        return None
    return load_start(config, engine, tokenizer, console)


def _measurements(
    config: Config, engine: Engine, text: RunText, progress: Progress, groups: ProcessGroups
) -> tuple[Hook, ...]:
    """The hooks that measure the training itself."""
    return (
        TrainingMetrics(config),
        DataProgress(config, text.documents.quarantine, groups),
        Throughput(config, engine.device, progress.tokens, progress.flops, groups),
        KVCost(config, engine.dtype),
    )


def _prepare_files(
    config: Config,
    text: RunText,
    origin: Origin | Checkpoint | None,
    groups: ProcessGroups,
    console: Console,
) -> None:
    """Write what the run's directory has before the first step, on rank 0; see `train.run_dir`.

    Args:
        origin: what a new run starts from, or the checkpoint of its trunk.
    """
    started_from = asdict(origin) if isinstance(origin, Origin) else None

    def prepare() -> None:
        if not groups.is_rank_zero:
            return
        prepare_run_dir(config, text.tokenizer, console, started_from)
        if isinstance(origin, Checkpoint):
            take_over(config.run_dir, trunk_of(config), asdict(origin_of(origin)))

    raise_on_all_ranks(groups, prepare)
    share_quarantine(text.documents, config.run_dir, groups, config.engine.ranks_per_row)


def _same_in_all_checkpoints(
    config: Config,
    text: RunText,
    checkpoint: Checkpoint | None,
    groups: ProcessGroups,
    console: Console,
) -> dict[str, Any]:
    """What is the same in the state of every checkpoint of the run."""
    # A checkpoint is copied and shared; nothing that resuming needs is a secret.
    saved: dict[str, Any] = {"config": redacted_tree(config.to_dict())}
    saved["stream"] = text.stream.fingerprint
    if groups.is_rank_zero and config.hooks.wandb.mode != "disabled":
        before = checkpoint.state.get("wandb_id") if checkpoint else None
        saved["wandb_id"] = keep_run_id(config.run_dir, before, console)
    return saved


def smallest_memory(config: Config, groups: ProcessGroups) -> int:
    """Bytes of the smallest of the ranks' devices. Every rank calls this."""
    device = choose_device(config.engine)
    return -groups.greatest(-device_memory(device, groups.dist_env.local_world_size))


def open_engine(config: Config, groups: ProcessGroups) -> Engine:
    """The engine that the configuration names, with new weights.

    What is `auto` is chosen for the smallest of the ranks' devices, so all choose the same.

    Raises:
        ConfigError: the configuration fits neither the ranks nor the memory of a device.
    """
    world_size = groups.world_size
    if problems := config.batch_problems_on(world_size):
        raise ConfigError(problems)
    device = choose_device(config.engine)
    dtype, memory = precision(config.engine, device), smallest_memory(config, groups)
    config = fit(config, dtype, world_size=world_size, device=device.type, available=memory).config
    match config.engine:
        case FsdpConfig():
            return FsdpEngine(config, groups)
        case DeepSpeedConfig():
            from train.engines.zero import DeepSpeedEngine  # importing DeepSpeed takes seconds

            return DeepSpeedEngine(config, groups)


def _open_sinks(
    config: Config, checkpoint: Checkpoint | None, console: Console, on_error: ExitStack
) -> tuple[Sink, ...]:
    step, log_every = 0, 1
    if checkpoint:
        step, log_every = checkpoint.step, checkpoint.state["config"]["hooks"]["log_every"]
    sinks: list[Sink] = [MetricsFile(config.run_dir / "metrics.jsonl", step, console, log_every)]
    on_error.callback(sinks[0].close)
    if config.hooks.console:
        sinks.append(ConsoleLine(console, config.total_steps))
    if config.hooks.wandb.mode != "disabled":
        sinks.append(Wandb(config, config.run_dir, console))
    return tuple(FailingSink(sink, console) for sink in sinks)
