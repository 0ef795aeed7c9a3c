"""A run: everything that the loop needs, opened, and resumed where it ended.

All ranks open the run and share its directory (train/run_dir). Rank 0 writes what is written once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from conf.errors import USER_ERRORS, ConfigError, DataError, Problem
from conf.redaction import redacted_tree
from conf.validation import as_dict, defaults, flatten_keys
from data.batch import Batch
from data.config import TokenizerConfig
from data.fingerprint import changed_settings
from data.heldout import first_words, heldout_rows
from data.loader import Loader
from data.sources.documents import Documents
from data.stream import BY_DOCUMENTS, BatchShape, TokenStream
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from train.anomalies.detection import SpikeDetector
from train.anomalies.policy import BadStepPolicy
from train.checkpoint.format import TOKENIZER
from train.checkpoint.reader import Checkpoint
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.console import warn
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
from train.engines.schedule import config_before, schedule_change
from train.evaluation.task_hook import TaskEvaluation, questions_of_run
from train.metrics.documents import bytes_of_documents
from train.metrics.hooks import (
    DataProgress,
    Evaluation,
    KVCost,
    Sample,
    SaveCheckpoint,
    Throughput,
    TrainingMetrics,
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
from train.run_dir.prepare import prepare_run_dir
from train.settings.engine import DeepSpeedConfig, FsdpConfig
from train.start.tokenizer_of_weights import tokenizer_of_weights
from train.start.weights import Source, read_start

# Settings that a resumed run must share with its checkpoint; the rest may be changed.
FIXED = ("seed", "model", "train.global_batch", "train.seq_len")


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
    evaluations: tuple[Evaluation | TaskEvaluation, ...]
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
    device = raise_on_all_ranks(groups, lambda: _device(config))
    configure_process(config.engine, device)
    raise_on_all_ranks(groups, lambda: configure_attention(config, device))
    store = CheckpointStore(
        config.run_dir / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        groups=groups,
    )
    checkpoint = _newest(config, store, console)
    state = checkpoint.state if checkpoint else {}
    documents = raise_on_all_ranks(groups, lambda: Documents(config.data))
    for remark in () if skip_batches else documents.remarks:  # once, and not after each rollback
        console.print(remark, markup=False)
    tokenizer = _tokenizer(config, checkpoint, documents, groups, console)
    stream = _stream(config, checkpoint, documents, tokenizer, groups, console)
    # Engines talk to other ranks after they have checked the configuration.
    engine = raise_on_all_ranks(groups, lambda: open_engine(config, groups), USER_ERRORS)
    on_error.callback(engine.close)
    watchdog = Watchdog(
        config.run_dir, groups.rank, config.faults.step_timeout, config.faults.exit_timeout
    )
    stop_sync = StopSync(groups, stop_signal, watchdog)
    evaluations = _evaluations(config, documents, tokenizer, engine, stop_sync, console)
    prompt = _prompt(config, tokenizer, evaluations)
    step = checkpoint.step if checkpoint else 0
    engine.set_copies(config.copy_stage(step).K)
    source = _restore(config, engine, checkpoint, tokenizer, console)
    raise_on_all_ranks(
        groups,
        lambda: (
            prepare_run_dir(config, tokenizer, console, source._asdict() if source else None)
            if groups.is_rank_zero
            else None
        ),
    )
    _write_quarantine(documents, config.run_dir, groups)
    tokens = step * config.train.tokens_per_step
    # Checkpoints of version 0.1 have no such count; what it printed was that of whole rows.
    flops = state.get("train_flops", step * config.flops_per_step)
    detector = SpikeDetector(config.faults, state.get("bad_steps"))
    # A checkpoint is copied and shared; nothing that resuming needs is a secret.
    saved: dict[str, Any] = {"config": redacted_tree(config.to_dict())}
    saved["stream"] = stream.fingerprint
    if groups.is_rank_zero and config.hooks.wandb.mode != "disabled":
        saved["wandb_id"] = keep_run_id(config.run_dir, state.get("wandb_id"), console)
    return Run(
        config=config,
        directory=config.run_dir,
        groups=groups,
        engine=engine,
        store=store,
        tokenizer=tokenizer,
        stream=stream,
        stop_signal=stop_signal,
        watchdog=watchdog,
        stop_sync=stop_sync,
        bad_step_policy=BadStepPolicy(detector, engine, tokenizer, config.run_dir, console),
        hooks=(
            TrainingMetrics(config),
            DataProgress(config, documents.quarantine, groups),
            Throughput(config, engine.device, tokens, flops, groups),
            KVCost(config, engine.dtype),
        ),
        save=SaveCheckpoint(config, engine, store, saved, tokenizer),
        evaluations=(*evaluations, *_task_evaluations(config, tokenizer, engine, stop_sync)),
        sample=Sample(config, engine, tokenizer, prompt, stop_sync.stop_requested),
        sinks=_open_sinks(config, checkpoint, console, on_error) if groups.is_rank_zero else (),
        profile=ProfileWindow(config.train, engine, config.run_dir / "profile", console, step),
        step=step,
        flops=flops if groups.is_rank_zero else 0,
        batches=state.get("batches", 0),
        skip_batches=skip_batches,
    )


def _restore(
    config: Config,
    engine: Engine,
    checkpoint: Checkpoint | None,
    tokenizer: Tokenizer,
    console: Console,
) -> Source | None:
    """Give the engine the weights and moments of the checkpoint, or of what the run starts from.

    Returns:
        what a new run starts from; None if it goes on, or has random weights.
    """
    if checkpoint:
        engine.restore(checkpoint)
        return None
    if config.run.start_from is None:
        return None
    start = read_start(config, engine.groups)
    if start.tokenizer not in (None, tokenizer.fingerprint):
        another = "its weights were trained with another tokenizer than the run's"
        hint = "give the run that they are of, with its own tokenizer.model"
        raise ConfigError([Problem("run.start_from", config.run.start_from, another, hint)])
    for path, reason in start.rejected:
        warn(console, f"rejected the checkpoint {path}: {reason}")
    console.print(f"starts from {start.source.path}", markup=False)
    engine.load(start.weights, start.optimizer)
    return start.source


def smallest_memory(config: Config, groups: ProcessGroups) -> int:
    """Bytes of the smallest of the ranks' devices. Every rank calls this."""
    device = choose_device(config.engine)
    return min(groups.gather(device_memory(device, groups.dist_env.local_world_size)))


def open_engine(config: Config, groups: ProcessGroups) -> Engine:
    """The engine that the configuration names, with new weights.

    What is `auto` is chosen for the smallest of the ranks' devices, so all choose the same.

    Raises:
        ConfigError: the configuration fits neither the ranks nor the memory of a device.
    """
    world_size = groups.world_size
    if problems := [
        *config.train.problems_on(world_size),
        *config.engine.problems_on(world_size),
    ]:
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


def _device(config: Config) -> torch.device:
    """The device, if this machine can do on it what the configuration asks for."""
    device = choose_device(config.engine)
    if problems := config.device_problems(device.type):
        raise ConfigError(problems)
    check_float8(config.engine, device)
    return device


def _tokenizer(
    config: Config,
    checkpoint: Checkpoint | None,
    documents: Documents,
    groups: ProcessGroups,
    console: Console,
) -> Tokenizer:
    """The run's tokenizer: made or read by rank 0, and sent to the other ranks."""

    def prepare() -> Tokenizer | None:
        if not groups.is_rank_zero:
            return None
        # The weights of a resumed run are its own.
        start_from = None if checkpoint else config.run.start_from
        return prepare_tokenizer(
            _tokenizer_settings(config, checkpoint, console),
            documents,
            vocab_size=config.model.vocab_size,
            of_weights=tokenizer_of_weights(start_from, console),
        )

    own = raise_on_all_ranks(groups, prepare)
    model = groups.broadcast(own.model if own else b"")
    return own or Tokenizer(model)


def _stream(
    config: Config,
    checkpoint: Checkpoint | None,
    documents: Documents,
    tokenizer: Tokenizer,
    groups: ProcessGroups,
    console: Console,
) -> TokenStream:
    """This rank's part of the stream, from where the checkpoint has left it."""
    shape = BatchShape(
        global_batch=config.train.global_batch,
        seq_len=config.train.seq_len,
        rank=groups.rank,
        world_size=groups.world_size,
    )
    cursors = checkpoint.state["cursors"] if checkpoint else None
    stream = raise_on_all_ranks(
        groups,
        lambda: TokenStream(documents, tokenizer, shape, seed=config.seed, cursors=cursors),
    )
    if checkpoint:
        for line in stream.check_resumes(checkpoint.state["stream"]):
            warn(console, f"changed since then: {line}")
    _fill_lanes(stream, groups, console)
    return stream


def _fill_lanes(stream: TokenStream, groups: ProcessGroups, console: Console) -> None:
    """Cut the sources by documents of which a lane of any rank would be empty otherwise."""
    empty = raise_on_all_ranks(groups, stream.empty_lanes)
    for name in sorted(set().union(*groups.gather(empty))):

        def cut(name: str = name) -> list[Any] | None:
            return stream.cut_by_documents(name) if groups.is_rank_zero else None

        starts = groups.broadcast(raise_on_all_ranks(groups, cut))
        assert starts is not None
        stream.documents.set_lane_starts(name, starts)
        console.print(f"data.sources.{name}: {BY_DOCUMENTS}", markup=False)


def _write_quarantine(documents: Documents, directory: Path, groups: ProcessGroups) -> None:
    """Have all ranks append to one file; rank 0 first, which mends what a crash has left of it."""
    for rank_zero in (True, False):
        if groups.is_rank_zero == rank_zero:
            documents.quarantine.write_to(directory / "quarantine.jsonl")
        groups.barrier()


def _tokenizer_settings(
    config: Config, checkpoint: Checkpoint | None, console: Console
) -> TokenizerConfig:
    """The tokenizer's settings; a resumed run that has not changed them keeps its own model.

    If the cache has been emptied, the tokenizer would be trained again, and could come out
    differently. So the checkpoint has a copy, and the run's directory another one.
    """
    if checkpoint is None or checkpoint.state["config"]["tokenizer"] != as_dict(config.tokenizer):
        return config.tokenizer
    if checkpoint.tokenizer_path is not None:
        return TokenizerConfig(path=str(checkpoint.tokenizer_path))
    model = config.run_dir / TOKENIZER
    try:  # a checkpoint of an earlier version
        if Tokenizer.load(model).fingerprint == checkpoint.state["stream"]["tokenizer"]:
            return TokenizerConfig(path=str(model))
        flaw = "is not the one that the run began with"
    except FileNotFoundError:
        flaw = "is missing"
    except DataError:
        flaw = "is damaged"
    warn(console, f"{model} {flaw}; it is made again as the settings under tokenizer. say")
    return config.tokenizer


def _evaluations(
    config: Config,
    documents: Documents,
    tokenizer: Tokenizer,
    engine: Engine,
    stop_sync: StopSync,
    console: Console,
) -> list[Evaluation]:
    """An evaluation for each source that has held-out documents; none if `data.holdout` is 0.

    Rank 0 reads the documents and sends them to the other ranks.
    """
    names = config.data.heldout_names
    if not names:
        return []
    groups, seq_len, limit = engine.groups, config.train.seq_len, config.eval.rows

    def read() -> dict[str, Batch | None]:
        return {
            source: heldout_rows(documents, tokenizer, source, seq_len=seq_len, limit=limit)
            for source in (names if groups.is_rank_zero else ())
        }

    found = []
    for source, text in groups.broadcast(raise_on_all_ranks(groups, read)).items():
        if text is None:
            warn(console, f"data.sources.{source}: none of its documents are held out to evaluate")
        else:
            sizes = bytes_of_documents(text, tokenizer)
            stop = stop_sync.stop_requested
            found.append(Evaluation(config, engine, names[source], text, stop, sizes))
    if not found:
        hint = "raise it, add documents, or set it to 0 to go without an evaluation"
        none = "holds out none of the documents"
        raise ConfigError([Problem("data.holdout", config.data.holdout, none, hint)])
    return found


def _task_evaluations(
    config: Config, tokenizer: Tokenizer, engine: Engine, stop_sync: StopSync
) -> list[TaskEvaluation]:
    """The evaluation in downstream tasks, if there are any.

    Rank 0 reads the questions and sends them to the other ranks.
    """
    if not config.eval.tasks:
        return []
    groups = engine.groups
    own = raise_on_all_ranks(
        groups, lambda: questions_of_run(config, tokenizer) if groups.is_rank_zero else None
    )
    tasks = groups.broadcast(own)
    assert tasks is not None
    return [TaskEvaluation(config, engine, tokenizer, tasks, stop_sync.stop_requested)]


def _prompt(config: Config, tokenizer: Tokenizer, evaluations: Sequence[Evaluation]) -> str:
    """What samples begin with: the setting, or a held-out document's first words.

    Without held-out documents a sample begins as a document does, with nothing.
    """
    settings = config.hooks.sample
    room = config.model.max_seq_len - settings.tokens - 1  # one for the separator before it
    if settings.prompt is None:
        _, weights = config.data.mixture[0]
        used = [e for e in evaluations if weights.get(e.name, 1)] or evaluations
        return first_words(used[0].text, tokenizer, most_tokens=room) if used else ""
    if (count := len(tokenizer.encode(settings.prompt))) > room:
        reason = f"has {count} tokens, and there is room for {room} before the sample"
        hint = f"choose a shorter one, or a lower hooks.sample.tokens={settings.tokens}"
        raise ConfigError([Problem("hooks.sample.prompt", settings.prompt, reason, hint)])
    return settings.prompt


def _newest(config: Config, store: CheckpointStore, console: Console) -> Checkpoint | None:
    """The checkpoint to go on from; prints which ones were rejected and what has changed."""
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
    changes = _changes(checkpoint.state["config"], config)
    if fixed := [line for key, line in changes.items() if key.startswith(FIXED)]:
        another = f"it holds another run: {'; '.join(fixed)}"
        hint = (
            "choose another run.name or run.dir, give the settings that it was trained with, or "
            "start anew with run.resume=never"
        )
        raise ConfigError([Problem("run.dir", str(config.run_dir), another, hint)])
    checkpoint.refuse_old_form(config.model)
    console.print(f"going on from {checkpoint.path}", markup=False)
    for line in changes.values():
        warn(console, f"changed since then: {line}")
    before = config_before(checkpoint.state["config"], config)
    if before is None:
        warn(console, "the learning rate's course so far is not one that this version can tell")
    else:
        for told in (
            schedule_change(before, config, checkpoint.step),
            _other_copies(before, config, checkpoint.step),
        ):
            if told:
                warn(console, told)
    return checkpoint


def _other_copies(before: Config, now: Config, step: int) -> str | None:
    """How the next step of a resumed run differs in its K; None if it does not."""
    then, K = before.copy_stage(step).K, now.copy_stage(step).K
    if then == K:
        return None
    return f"K is {K} from step {step + 1} on; with the settings before, it would have been {then}"


def _changes(saved: dict[str, Any], config: Config) -> dict[str, str]:
    """What differs from a saved configuration, by key, of what may change the training.

    A setting that is newer than the saved configuration had its default then. One that changes
    nothing in this run, such as the chunk of `phd_swa`, may have had any value.
    """
    unused = {problem.key for problem in config.unused()}
    before = {**flatten_keys(defaults(Config)), **flatten_keys(saved)}
    ignored = (
        *("run.", "data.", "tokenizer.", "hooks.", "eval.", "checkpoint."),
        *("model.attention", "train.profile"),
    )
    changed = changed_settings(before, flatten_keys(config.to_dict()))
    return {
        key: line
        for key, line in changed.items()
        if (not key.startswith(ignored) or key.endswith(".epochs")) and key not in unused
    }


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
