"""A run and its directory: everything the loop needs, opened, and resumed where it ended.

runs/phd_cswa-2-16-32-tiny/
    config.yaml        the whole configuration, every default included
    environment.json   versions, machine, source revision; one entry for each start
    metrics.jsonl      one line for each logging step
    quarantine.jsonl   what was found that is no document, and where; absent if nothing was
    tokenizer.model    the SentencePiece model
    wandb_id.txt, wandb/
    checkpoints/       see train/checkpoint.py
"""

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from itertools import count
from pathlib import Path
from signal import Signals
from time import strftime
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from data.config import TokenizerConfig
from data.documents import Documents
from data.fingerprint import changes, check_fingerprint
from data.heldout import heldout_rows
from data.stream import BatchShape, OutOfTextError, TokenStream
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from launch.place import Place
from train.checkpoint import Checkpoint, CheckpointStore
from train.config import Config
from train.device import choose_device
from train.engine import Engine, SingleEngine
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
from train.pretrained import pretrained_start
from train.sinks import ConsoleLine, MetricsFile, Sink, Wandb, warn, write_whole
from train.validation import ConfigError, as_dict, leaves

# Settings that a resumed run must share with its checkpoint; the rest may be changed.
FIXED = ("seed", "model", "train.global_batch", "train.seq_len")


@dataclass(frozen=True)
class Run:
    """An opened run; `step` optimizer steps are done."""

    config: Config
    directory: Path
    engine: Engine
    store: CheckpointStore
    tokenizer: Tokenizer
    stream: TokenStream
    hooks: tuple[Hook, ...]
    sinks: tuple[Sink, ...]
    step: int

    @property
    def finished(self) -> bool:
        """The run is as long as the configuration asks for."""
        total = self.config.train.total_steps
        return total is not None and self.step >= total

    def ending(
        self, step: int, train_s: float, received: Signals | None, failure: Exception | None
    ) -> str | None:
        """Why the run ends after this step; None if it goes on."""
        if received is not None:
            return received.name
        total, limit = self.config.train.total_steps, self.config.train.max_time
        if total is not None and step >= total:
            return "finished"
        if failure is not None:
            return "out_of_text" if isinstance(failure, OutOfTextError) else "no_data"
        return "max_time" if limit is not None and train_s >= limit else None

    def finish(self) -> Metrics:
        """What is measured at the end of a run, of one that was complete already."""
        metrics: Metrics = {}
        for hook in self.hooks:
            if isinstance(hook, Evaluation | Sample):
                metrics |= hook.measure()
        return metrics

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        for sink in self.sinks:
            sink.close()


def open_run(config: Config, console: Console) -> Run:
    """Open a run's directory, data and engine, and take up its newest whole checkpoint.

    Raises:
        ConfigError: something that the configuration names is missing, does not fit the rest, or
            is not what the checkpoint was made with.
    """
    place, directory = Place.from_environment(), config.run_dir
    if place.world > 1:
        alone = (
            f"engine.kind={config.engine.kind}: {place.world} processes were started, and this "
            "engine trains on one; start it without torchrun"
        )
        raise ConfigError([alone])
    try:
        device = choose_device(config.engine)
        if config.model.attention == "flex" and device.type != "cuda":
            raise ValueError(
                "model.attention=flex: FlexAttention has no backward on this machine's "
                f"{device.type}; choose model.attention=packed"
            )
        store = CheckpointStore(directory / "checkpoints", keep=config.checkpoint.keep)
        checkpoint = _newest(config, store, console)
        documents = Documents(config.data)
        tokenizer = prepare_tokenizer(
            _tokenizer_settings(config, checkpoint), documents, vocab_size=config.model.vocab_size
        )
        stream = TokenStream(
            documents,
            tokenizer,
            BatchShape(global_batch=config.train.global_batch, seq_len=config.train.seq_len),
            seed=config.seed,
            cursors=checkpoint.state["cursors"] if checkpoint else None,
        )
        if checkpoint:
            check_fingerprint(checkpoint.state["stream"], stream.fingerprint)
        engine = SingleEngine(config)
        measuring = _evaluations(config, documents, tokenizer, engine, console)
        if checkpoint:
            engine.restore(checkpoint)
        elif config.run.start_from is not None:
            engine.model.load(pretrained_start(Path(config.run.start_from), config.model))
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    step = checkpoint.step if checkpoint else 0
    if config.run.resume == "never" and (moved := set_aside(directory)):
        console.print(f"run.resume=never: the earlier run is now in {moved}", markup=False)
    _describe(config, directory, tokenizer)
    documents.quarantine.write_to(directory / "quarantine.jsonl")
    state = {"config": config.to_dict(), "stream": stream.fingerprint}
    return Run(
        config=config,
        directory=directory,
        engine=engine,
        store=store,
        tokenizer=tokenizer,
        stream=stream,
        hooks=(
            TrainingMetrics(config),
            DataProgress(config, documents.quarantine),
            Throughput(config, engine.device, step * config.train.tokens_per_step),
            KVCost(config, engine.dtype),
            Saving(config, engine, store, state),  # before anything that could fail
            *measuring,
            Sample(config, engine, tokenizer),
        ),
        sinks=_open_sinks(config, directory, step, console),
        step=step,
    )


def _tokenizer_settings(config: Config, checkpoint: Checkpoint | None) -> TokenizerConfig:
    """The settings; of a resumed run that has not changed them, those that name its own model.

    It would be trained again, and maybe otherwise, where the cache has been emptied.
    """
    model = config.run_dir / "tokenizer.model"
    same = checkpoint and checkpoint.state["config"]["tokenizer"] == as_dict(config.tokenizer)
    return TokenizerConfig(path=str(model)) if same and model.exists() else config.tokenizer


def _evaluations(
    config: Config, documents: Documents, tokenizer: Tokenizer, engine: Engine, console: Console
) -> list[Evaluation]:
    """One of each source that has documents held out; none where nothing is to be."""
    if config.data.holdout == 0:
        return []
    seq_len, limit = config.train.seq_len, config.eval.rows
    found = []
    for source in config.data.sources:
        text = heldout_rows(documents, tokenizer, source, seq_len=seq_len, limit=limit)
        name = "heldout" if len(config.data.sources) == 1 else source
        if text is None:
            warn(console, f"data.sources.{source}: none of its documents are held out to evaluate")
        else:
            found.append(Evaluation(config, engine, name, text))
    if not found:
        raise ValueError(
            f"data.holdout={config.data.holdout}: holds out none of the documents; raise it, add "
            "documents, or set it to 0 to go without an evaluation"
        )
    return found


def set_aside(directory: Path) -> Path | None:
    """Rename an earlier run's directory to `<directory>.old-<n>`; None if there is none."""
    if not directory.exists():
        return None
    names = (directory.with_name(f"{directory.name}.old-{n}") for n in count(1))
    return directory.rename(next(name for name in names if not name.exists()))


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


def _describe(config: Config, directory: Path, tokenizer: Tokenizer) -> None:
    """Write down what this start of the run is made of."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = OmegaConf.to_yaml(OmegaConf.create(config.to_dict()))
    write_whole(directory / "config.yaml", settings)
    tokenizer.save(directory / "tokenizer.model")
    path = directory / "environment.json"
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_whole(path, json.dumps([*starts, environment()], indent=1))


def environment() -> dict[str, Any]:
    """The machine, the versions and the source revision of this process."""
    packages = ("torch", "numpy", "sentencepiece", "datasets", "hydra-core", "wandb")
    return {
        "time": strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "revision": _revision(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def _revision() -> str | None:
    """The commit of this source; None where there is no git, or no repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return git.stdout.strip() or None


def _open_sinks(config: Config, directory: Path, step: int, console: Console) -> tuple[Sink, ...]:
    sinks: list[Sink] = [MetricsFile(directory / "metrics.jsonl", step, console)]
    if config.hooks.console:
        sinks.append(ConsoleLine(console, config.train.total_steps))
    if config.hooks.wandb.mode != "disabled":
        sinks.append(Wandb(config, directory, console))
    return tuple(sinks)
