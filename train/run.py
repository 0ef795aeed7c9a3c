"""A run: everything the loop needs, opened, and resumed where it ended.

All ranks open the run, and share its directory (train/run_directory.py). The first one writes what
is written once.
"""

from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from rich.console import Console

from data.config import TokenizerConfig
from data.documents import Documents
from data.fingerprint import changes, check_fingerprint
from data.heldout import HeldOut, heldout_rows
from data.stream import BatchShape, TokenStream
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from train.agreement import Agreement, Standing
from train.bad_steps import BadSteps
from train.checkpoint import Checkpoint, CheckpointStore
from train.config import Config
from train.device import choose_device
from train.engine import Engine
from train.engine_config import DeepSpeedConfig, FsdpConfig
from train.fsdp import FsdpEngine
from train.hooks import (
    DataProgress,
    Evaluation,
    Hook,
    KVCost,
    Metrics,
    Sample,
    Saving,
    Throughput,
    TrainingMetrics,
)
from train.interruption import Interruption, nothing
from train.pretrained import pretrained_start
from train.ranks import Ranks, agreed
from train.run_directory import claim
from train.sinks import ConsoleLine, MetricsFile, Sink, Wandb, warn
from train.validation import ConfigError, as_dict, leaves
from train.verdicts import Verdicts
from train.watchdog import Watchdog

# Settings that a resumed run must share with its checkpoint; the rest may be changed.
FIXED = ("seed", "model", "train.global_batch", "train.seq_len")


@dataclass(frozen=True)
class Run:
    """An opened run on one of its ranks; `step` optimizer steps are done.

    Attributes:
        batches: batches that the stream has given so far.
        pass_over: numbers of batches that are not trained on.
    """

    config: Config
    directory: Path
    ranks: Ranks
    engine: Engine
    store: CheckpointStore
    tokenizer: Tokenizer
    stream: TokenStream
    interruption: Interruption
    watchdog: Watchdog
    agreement: Agreement
    verdicts: Verdicts
    hooks: tuple[Hook, ...]
    sinks: tuple[Sink, ...]
    step: int
    batches: int
    pass_over: frozenset[int]

    @property
    def finished(self) -> bool:
        """The run is as long as the configuration asks for."""
        total = self.config.train.total_steps
        return total is not None and self.step >= total

    def ending(self, step: int, standing: Standing) -> str | None:
        """Why the run ends after this step; None if it goes on. The same on all ranks."""
        if standing.signal:
            return Signals(standing.signal).name
        total = self.config.train.total_steps
        if total is not None and step >= total:
            return "finished"
        return self.data_ending(standing) or ("max_time" if standing.late else None)

    @staticmethod
    def data_ending(standing: Standing) -> str | None:
        """Why there is nothing more to train on; None if there is."""
        if standing.failed:
            return "no_data"
        return None if standing.full else "out_of_text"

    def finish(self) -> Metrics:
        """What is measured at the end of a run, of one that was complete already."""
        metrics: Metrics = {}
        for hook in self.hooks:
            if isinstance(hook, Evaluation | Sample):
                metrics |= hook.measure()
        return metrics

    def __enter__(self) -> "Run":
        self.watchdog.__enter__()
        self.interruption.at_first = self._leave
        self.interruption.__enter__()
        if self.interruption.came():  # while the run was opened
            self._leave()
        return self

    def _leave(self) -> None:
        """The process is to end: it has so much time left."""
        self.watchdog.leave_within(self.config.faults.exit_timeout)

    def __exit__(self, *error: object) -> None:
        self.watchdog.pet()
        try:
            self.store.close()
            for sink in self.sinks:
                sink.close()
            self.engine.close()
        finally:
            self.interruption.__exit__()
            self.interruption.at_first = nothing
            self.watchdog.__exit__()


def open_run(
    config: Config,
    console: Console,
    ranks: Ranks | None = None,
    interruption: Interruption | None = None,
    pass_over: frozenset[int] = frozenset(),
) -> Run:
    """Open a run's directory, data and engine, and take up its newest whole checkpoint.

    Args:
        console: of the first rank; the others' are quiet.
        ranks: that open it together; None: this process alone.
        interruption: that signals are noted by; None: one of the run's own.
        pass_over: numbers of batches that are not to be trained on.

    Raises:
        ConfigError: something that the configuration names is missing, does not fit the rest, or
            is not what the checkpoint was made with.
    """
    together = (ranks or Ranks(), interruption or Interruption())
    try:
        return _open(config, console, *together, pass_over)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def _open(
    config: Config,
    console: Console,
    ranks: Ranks,
    interruption: Interruption,
    pass_over: frozenset[int],
) -> Run:
    torch.manual_seed(config.seed)  # else by chance
    directory = config.run_dir
    agreed(ranks, lambda: _check(config))
    store = CheckpointStore(
        directory / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        ranks=ranks,
    )
    checkpoint = _newest(config, store, console)
    state = checkpoint.state if checkpoint else {}
    documents = agreed(ranks, lambda: Documents(config.data))
    tokenizer = _tokenizer(config, checkpoint, documents, ranks)
    stream = _stream(config, checkpoint, documents, tokenizer, ranks)
    engine = agreed(ranks, lambda: open_engine(config, ranks))
    watchdog = Watchdog(directory, ranks.rank, config.faults.step_timeout)
    agreement = Agreement(ranks, interruption, watchdog)
    measuring = _evaluations(config, documents, tokenizer, engine, agreement, console)
    if checkpoint:
        engine.restore(checkpoint)
    elif config.run.start_from is not None:
        engine.load(pretrained_start(Path(config.run.start_from), config.model))
    step = checkpoint.step if checkpoint else 0
    agreed(ranks, lambda: claim(config, tokenizer, console) if ranks.first else None)
    _write_quarantine(documents, directory, ranks)
    bad_steps = BadSteps(config.faults, state.get("bad_steps"))
    saved = {"config": config.to_dict(), "stream": stream.fingerprint}
    return Run(
        config=config,
        directory=directory,
        ranks=ranks,
        engine=engine,
        store=store,
        tokenizer=tokenizer,
        stream=stream,
        interruption=interruption,
        watchdog=watchdog,
        agreement=agreement,
        verdicts=Verdicts(bad_steps, engine, tokenizer, directory, console),
        hooks=(
            TrainingMetrics(config),
            DataProgress(config, documents.quarantine, ranks),
            Throughput(config, engine.device, step * config.train.tokens_per_step, ranks),
            KVCost(config, engine.dtype),
            Saving(config, engine, store, saved),  # before anything that could fail
            *measuring,
            Sample(config, engine, tokenizer, agreement.stop),
        ),
        sinks=_open_sinks(config, directory, step, console) if ranks.first else (),
        step=step,
        batches=state.get("batches", 0),
        pass_over=pass_over,
    )


def open_engine(config: Config, ranks: Ranks) -> Engine:
    """The engine that the configuration names, with new weights."""
    match config.engine:
        case FsdpConfig():
            return FsdpEngine(config, ranks)
        case DeepSpeedConfig():
            from train.zero import DeepSpeedEngine  # seconds, which nobody else should wait

            return DeepSpeedEngine(config, ranks)


def _check(config: Config) -> None:
    """Refuse what this machine cannot do."""
    device = choose_device(config.engine)
    if config.model.attention == "flex" and device.type != "cuda":
        raise ValueError(
            "model.attention=flex: FlexAttention has no backward on this machine's "
            f"{device.type}; choose model.attention=packed"
        )


def _tokenizer(
    config: Config, checkpoint: Checkpoint | None, documents: Documents, ranks: Ranks
) -> Tokenizer:
    """The run's tokenizer: made or read by the first rank, and sent to the others."""

    def prepare() -> Tokenizer | None:
        if not ranks.first:
            return None
        settings = _tokenizer_settings(config, checkpoint)
        return prepare_tokenizer(settings, documents, vocab_size=config.model.vocab_size)

    own = agreed(ranks, prepare)
    model = ranks.broadcast(own.model if own else b"")
    return own or Tokenizer(model)


def _stream(
    config: Config,
    checkpoint: Checkpoint | None,
    documents: Documents,
    tokenizer: Tokenizer,
    ranks: Ranks,
) -> TokenStream:
    """This rank's part of the stream, from where the checkpoint has left it."""
    shape = BatchShape(
        global_batch=config.train.global_batch,
        seq_len=config.train.seq_len,
        rank=ranks.rank,
        world=ranks.world,
    )
    cursors = checkpoint.state["cursors"] if checkpoint else None
    stream = agreed(
        ranks,
        lambda: TokenStream(documents, tokenizer, shape, seed=config.seed, cursors=cursors),
    )
    if checkpoint:
        check_fingerprint(checkpoint.state["stream"], stream.fingerprint)
    return stream


def _write_quarantine(documents: Documents, directory: Path, ranks: Ranks) -> None:
    """Have all ranks write to one file; the first one before: it mends what a crash has left."""
    for turn in (True, False):
        if ranks.first == turn:
            documents.quarantine.write_to(directory / "quarantine.jsonl")
        ranks.barrier()


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
    agreement: Agreement,
    console: Console,
) -> list[Evaluation]:
    """One of each source that has documents held out; none where nothing is to be.

    The first rank reads them, and sends them to the others.
    """
    if config.data.holdout == 0:
        return []
    ranks, seq_len, limit = engine.ranks, config.train.seq_len, config.eval.rows

    def read() -> dict[str, HeldOut | None]:
        return {
            source: heldout_rows(documents, tokenizer, source, seq_len=seq_len, limit=limit)
            for source in (config.data.sources if ranks.first else ())
        }

    found = []
    for source, text in ranks.broadcast(agreed(ranks, read)).items():
        name = "heldout" if len(config.data.sources) == 1 else source
        if text is None:
            warn(console, f"data.sources.{source}: none of its documents are held out to evaluate")
        else:
            found.append(Evaluation(config, engine, name, text, agreement.stop))
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
    for path, reason in checkpoint.passed_over:
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
    changed = changes(leaves(saved), leaves(now))
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
