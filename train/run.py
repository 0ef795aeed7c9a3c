"""A run: everything the loop needs, opened, and resumed where it ended.

All ranks open the run and share its directory (train/run_dir). Rank 0 writes what is written once.
"""

from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from rich.console import Console

from conf.errors import ConfigError
from conf.validation import as_dict, flatten_keys
from data.batch import Batch
from data.config import TokenizerConfig
from data.fingerprint import changed_settings, check_fingerprint
from data.heldout import heldout_rows
from data.sources.documents import Documents
from data.stream import BatchShape, TokenStream
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from train.anomalies.detection import SpikeDetector
from train.anomalies.policy import BadStepPolicy
from train.checkpoint.store import Checkpoint, CheckpointStore
from train.config import Config
from train.distributed.process_groups import ProcessGroups, raise_on_all_ranks
from train.distributed.signals import StopSignal, nothing
from train.distributed.stop_sync import RankFlags, StopSync
from train.distributed.watchdog import Watchdog
from train.engines.config import DeepSpeedConfig, FsdpConfig
from train.engines.device import choose_device
from train.engines.engine import Engine
from train.engines.fsdp import FsdpEngine
from train.hf.pretrained import pretrained_start
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
from train.metrics.sinks import ConsoleLine, MetricsFile, Sink, Wandb, warn
from train.run_dir.prepare import prepare_run_dir

# Settings that a resumed run must share with its checkpoint; the rest may be changed.
FIXED = ("seed", "model", "train.global_batch", "train.seq_len")


@dataclass(frozen=True)
class Run:
    """An opened run on one of its ranks; `step` optimizer steps are done.

    Attributes:
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
    sinks: tuple[Sink, ...]
    step: int
    batches: int
    skip_batches: frozenset[int]

    @property
    def finished(self) -> bool:
        """The run is as long as the configuration asks for."""
        total = self.config.train.total_steps
        return total is not None and self.step >= total

    def ending(self, step: int, flags: RankFlags) -> str | None:
        """Why the run ends after this step; None if it goes on. The same on all ranks."""
        if flags.signal:
            return Signals(flags.signal).name
        total = self.config.train.total_steps
        if total is not None and step >= total:
            return "finished"
        return self.data_ending(flags) or ("max_time" if flags.late else None)

    @staticmethod
    def data_ending(flags: RankFlags) -> str | None:
        """Why there is nothing more to train on; None if there is."""
        if flags.failed:
            return "no_data"
        return None if flags.full else "out_of_text"

    def finish(self) -> Metrics:
        """What is measured at the end of a run, of one that was complete already."""
        metrics: Metrics = {}
        for hook in self.hooks:
            if isinstance(hook, Evaluation | Sample):
                metrics |= hook.measure()
        return metrics

    def __enter__(self) -> "Run":
        self.watchdog.__enter__()
        self.stop_signal.on_first_signal = self._leave
        self.stop_signal.__enter__()
        if self.stop_signal.is_set():  # while the run was opened
            self._leave()
        return self

    def _leave(self) -> None:
        """The process is to end: it has so much time left."""
        self.watchdog.exit_within(self.config.faults.exit_timeout)

    def __exit__(self, *error: object) -> None:
        self.watchdog.heartbeat()
        try:
            self.store.close()
            for sink in self.sinks:
                sink.close()
            self.engine.close()
        finally:
            self.stop_signal.__exit__()
            self.stop_signal.on_first_signal = nothing
            self.watchdog.__exit__()


def open_run(
    config: Config,
    console: Console,
    groups: ProcessGroups | None = None,
    stop_signal: StopSignal | None = None,
    skip_batches: frozenset[int] = frozenset(),
) -> Run:
    """Open a run's directory, data and engine, and take up its newest whole checkpoint.

    Args:
        console: of the first rank; the others' are quiet.
        groups: that open it together; None: this process alone.
        stop_signal: that signals are noted by; None: one of the run's own.
        skip_batches: numbers of batches that are not to be trained on.

    Raises:
        ConfigError: something that the configuration names is missing, does not fit the rest, or
            is not what the checkpoint was made with.
    """
    on_all_ranks = (groups or ProcessGroups(), stop_signal or StopSignal())
    try:
        return _open(config, console, *on_all_ranks, skip_batches)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def _open(
    config: Config,
    console: Console,
    groups: ProcessGroups,
    stop_signal: StopSignal,
    skip_batches: frozenset[int],
) -> Run:
    torch.manual_seed(config.seed)  # else by chance
    directory = config.run_dir
    raise_on_all_ranks(groups, lambda: _check(config))
    store = CheckpointStore(
        directory / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        groups=groups,
    )
    checkpoint = _newest(config, store, console)
    state = checkpoint.state if checkpoint else {}
    documents = raise_on_all_ranks(groups, lambda: Documents(config.data))
    tokenizer = _tokenizer(config, checkpoint, documents, groups)
    stream = _stream(config, checkpoint, documents, tokenizer, groups)
    engine = raise_on_all_ranks(groups, lambda: open_engine(config, groups))
    watchdog = Watchdog(directory, groups.rank, config.faults.step_timeout)
    stop_sync = StopSync(groups, stop_signal, watchdog)
    measuring = _evaluations(config, documents, tokenizer, engine, stop_sync, console)
    if checkpoint:
        engine.restore(checkpoint)
    elif config.run.start_from is not None:
        engine.load(pretrained_start(Path(config.run.start_from), config.model))
    step = checkpoint.step if checkpoint else 0
    raise_on_all_ranks(
        groups, lambda: prepare_run_dir(config, tokenizer, console) if groups.first else None
    )
    _write_quarantine(documents, directory, groups)
    bad_steps = SpikeDetector(config.faults, state.get("bad_steps"))
    saved = {"config": config.to_dict(), "stream": stream.fingerprint}
    return Run(
        config=config,
        directory=directory,
        groups=groups,
        engine=engine,
        store=store,
        tokenizer=tokenizer,
        stream=stream,
        stop_signal=stop_signal,
        watchdog=watchdog,
        stop_sync=stop_sync,
        bad_step_policy=BadStepPolicy(bad_steps, engine, tokenizer, directory, console),
        hooks=(
            TrainingMetrics(config),
            DataProgress(config, documents.quarantine, groups),
            Throughput(config, engine.device, step * config.train.tokens_per_step, groups),
            KVCost(config, engine.dtype),
            SaveCheckpoint(config, engine, store, saved),  # before anything that could fail
            *measuring,
            Sample(config, engine, tokenizer, stop_sync.stop),
        ),
        sinks=_open_sinks(config, directory, step, console) if groups.first else (),
        step=step,
        batches=state.get("batches", 0),
        skip_batches=skip_batches,
    )


def open_engine(config: Config, groups: ProcessGroups) -> Engine:
    """The engine that the configuration names, with new weights."""
    match config.engine:
        case FsdpConfig():
            return FsdpEngine(config, groups)
        case DeepSpeedConfig():
            from train.engines.zero import DeepSpeedEngine  # seconds, which nobody else should wait

            return DeepSpeedEngine(config, groups)


def _check(config: Config) -> None:
    """Refuse what this machine cannot do."""
    device = choose_device(config.engine)
    if config.model.attention == "flex" and device.type != "cuda":
        raise ValueError(
            "model.attention=flex: FlexAttention has no backward on this machine's "
            f"{device.type}; choose model.attention=packed"
        )


def _tokenizer(
    config: Config, checkpoint: Checkpoint | None, documents: Documents, groups: ProcessGroups
) -> Tokenizer:
    """The run's tokenizer: made or read by the first rank, and sent to the others."""

    def prepare() -> Tokenizer | None:
        if not groups.first:
            return None
        settings = _tokenizer_settings(config, checkpoint)
        return prepare_tokenizer(settings, documents, vocab_size=config.model.vocab_size)

    own = raise_on_all_ranks(groups, prepare)
    model = groups.broadcast(own.model if own else b"")
    return own or Tokenizer(model)


def _stream(
    config: Config,
    checkpoint: Checkpoint | None,
    documents: Documents,
    tokenizer: Tokenizer,
    groups: ProcessGroups,
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
        check_fingerprint(checkpoint.state["stream"], stream.fingerprint)
    return stream


def _write_quarantine(documents: Documents, directory: Path, groups: ProcessGroups) -> None:
    """Have all ranks write to one file; the first one before: it mends what a crash has left."""
    for turn in (True, False):
        if groups.first == turn:
            documents.quarantine.write_to(directory / "quarantine.jsonl")
        groups.barrier()


def _tokenizer_settings(config: Config, checkpoint: Checkpoint | None) -> TokenizerConfig:
    """The settings; of a resumed run that has not changed them, those that name its own model.

    It would be trained again, and maybe otherwise, where the cache has been emptied.
    """
    model = config.run_dir / "tokenizer.model"
    same = checkpoint and checkpoint.state["config"]["tokenizer"] == as_dict(config.tokenizer)
    return TokenizerConfig(path=str(model)) if same and model.exists() else config.tokenizer


def _evaluations(
    config: Config,
    documents: Documents,
    tokenizer: Tokenizer,
    engine: Engine,
    stop_sync: StopSync,
    console: Console,
) -> list[Evaluation]:
    """One of each source that has documents held out; none where nothing is to be.

    The first rank reads them, and sends them to the others.
    """
    if config.data.holdout == 0:
        return []
    groups, seq_len, limit = engine.groups, config.train.seq_len, config.eval.rows

    def read() -> dict[str, Batch | None]:
        return {
            source: heldout_rows(documents, tokenizer, source, seq_len=seq_len, limit=limit)
            for source in (config.data.sources if groups.first else ())
        }

    found = []
    for source, text in groups.broadcast(raise_on_all_ranks(groups, read)).items():
        name = "heldout" if len(config.data.sources) == 1 else source
        if text is None:
            warn(console, f"data.sources.{source}: none of its documents are held out to evaluate")
        else:
            found.append(Evaluation(config, engine, name, text, stop_sync.stop))
    if not found:
        raise ValueError(
            f"data.holdout={config.data.holdout}: holds out none of the documents; raise it, add "
            "documents, or set it to 0 to go without an evaluation"
        )
    return found


def _newest(config: Config, store: CheckpointStore, console: Console) -> Checkpoint | None:
    """The checkpoint to go on from, after telling what was passed over and what has changed."""
    if config.run.resume == "never":
        return None
    checkpoint = store.newest()
    if checkpoint is None:
        if config.run.resume == "must":
            raise ValueError(
                f"run.resume=must: there is no checkpoint in {store.root}; check run.dir, or "
                "choose run.resume=auto"
            )
        return None
    for path, reason in checkpoint.rejected:
        warn(console, f"passed over the checkpoint {path}: {reason}")
    changes = _changes(checkpoint.state["config"], config.to_dict())
    if fixed := [line for key, line in changes.items() if key.startswith(FIXED)]:
        raise ValueError(
            f"{config.run_dir} holds another run: {'; '.join(fixed)}. Choose another run.name or "
            "run.dir, give the settings that it was trained with, or start anew with "
            "run.resume=never"
        )
    console.print(f"going on from {checkpoint.path}", markup=False)
    for line in changes.values():
        warn(console, f"changed since then: {line}")
    return checkpoint


def _changes(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs between two configurations, by key; not what only names, bounds or reports."""
    ignored = ("run.", "data.", "tokenizer.", "hooks.", "eval.", "checkpoint.", "model.attention")
    changed = changed_settings(flatten_keys(saved), flatten_keys(now))
    return {
        key: line
        for key, line in changed.items()
        if not key.startswith(ignored) or key.endswith(".epochs")
    }


def _open_sinks(config: Config, directory: Path, step: int, console: Console) -> tuple[Sink, ...]:
    sinks: list[Sink] = [MetricsFile(directory / "metrics.jsonl", step, console)]
    if config.hooks.console:
        sinks.append(ConsoleLine(console, config.train.total_steps))
    if config.hooks.wandb.mode != "disabled":
        sinks.append(Wandb(config, directory, console))
    return tuple(sinks)
