"""Preparing the directory of a run.

runs/phd_cswa-2-16-32-tiny/
    config.yaml        the whole configuration, every default included
    environment.json   command, machine, versions and source revision; see environment.py;
                       one entry per start
    start.json         the checkpoint that run.start_from has given, its step and its seal
    trunk.json         the same of the checkpoint that run.decay_of has given
    source/            this project's source code and its git revision; see snapshot.py
    metrics.jsonl      one line per logging step
    result.json        what came of the run; see train/experiments/ledger.py
    ended.json         how the last start ended; absent while one is at work
    scores.json        what evaluate.py has found; absent if it was not run
    quarantine.jsonl   records that are no documents, and where they are; absent if there are none
    bad_steps/         the batches of bad steps; see train/anomalies/report.py
    stacks/            stack traces of the ranks when a step took too long
    tokenizer.model    the SentencePiece model
    wandb_id.txt, wandb/
    console.log        what the run has printed, where it ran side by side with others of a sweep
    checkpoints/       see train/checkpoint/store.py
    lock.json          who holds the directory, while it is held; see lock.py
"""

import json
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from conf.errors import ConfigError, Problem, reason_of
from conf.redaction import holds_secret
from data.storage.atomic import flush_names, write_atomic
from data.tokenizer import Tokenizer
from train.checkpoint.format import TOKENIZER
from train.config import Config
from train.console import LOG, warn
from train.metrics.lines import read_line
from train.run_dir.environment import environment
from train.run_dir.lock import LOCK, RunLock
from train.run_dir.snapshot import read_revision, write_snapshot

START, TRUNK, METRICS = "start.json", "trunk.json", "metrics.jsonl"


def prepare_run_dir(
    config: Config,
    tokenizer: Tokenizer,
    console: Console,
    start: Mapping[str, Any] | None = None,
) -> None:
    """Make the run's directory, and write the configuration and the environment of this start.

    Args:
        start: what the weights of a new run were taken from; None if it has random ones, or goes
            on from its own.

    Raises:
        ConfigError: the directory cannot be written.
    """
    directory = config.run_dir
    if config.run.resume == "never" and (moved := archive_run_dir(directory)):
        RunLock.follow(directory, moved)
        console.print(f"run.resume=never: the earlier run is now in {moved}", markup=False)
    try:
        _describe(config, tokenizer, console)
        if start is not None:
            write_atomic(directory / START, json.dumps(start, indent=1))
    except OSError as error:
        hint = "choose another run.dir, or make room there"
        problem = Problem(
            "run.dir", str(directory), f"cannot be written ({reason_of(error)})", hint
        )
        raise ConfigError([problem]) from error


def take_over(directory: Path, run: Path, checkpoint: Mapping[str, Any]) -> None:
    """Give a decay's directory what its trunk has measured on the way to a checkpoint.

    So its curves, tokens, FLOPs and time are those of all its steps, whoever took them.

    Args:
        directory: of the decay.
        run: of the trunk.
        checkpoint: of the trunk, with its `step`, as `trunk.json` names it.

    Raises:
        ConfigError: a file cannot be read or written.
    """
    try:
        write_atomic(directory / METRICS, _lines_until(run / METRICS, checkpoint["step"]))
        write_atomic(directory / TRUNK, json.dumps(checkpoint, indent=1))
        if (run / START).exists():
            shutil.copyfile(run / START, directory / START)
    except OSError as error:
        reason = f"files of its trunk {run} cannot be copied there ({reason_of(error)})"
        raise ConfigError([Problem("run.dir", str(directory), reason)]) from error


def _lines_until(metrics: Path, step: int) -> str:
    """The lines of a `metrics.jsonl` up to a step; none where there is no such file."""
    if not metrics.exists():
        return ""
    texts = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    read = ((text, read_line(text)) for text in texts)
    return "".join(f"{text}\n" for text, line in read if line and line["step"] <= step)


def archive_run_dir(directory: Path) -> Path | None:
    """Rename the directory of an earlier run to `<directory>.old-<n>`; None if there is none."""
    if not directory.exists() or {path.name for path in directory.iterdir()} <= {LOCK, LOG}:
        return None
    names = (directory.with_name(f"{directory.name}.old-{n}") for n in count(1))
    return directory.rename(next(name for name in names if not name.exists()))


def _describe(config: Config, tokenizer: Tokenizer, console: Console) -> None:
    directory = config.run_dir
    directory.mkdir(parents=True, exist_ok=True)
    flush_names(directory.parent)
    revision = read_revision()
    write_snapshot(directory, revision)
    settings = OmegaConf.to_yaml(OmegaConf.create(config.to_dict()))
    write_atomic(directory / "config.yaml", settings, private=holds_secret(config.to_dict()))
    _write_tokenizer(directory / TOKENIZER, tokenizer, console)
    path = directory / "environment.json"
    # One entry per start: a run may be resumed on another machine, or with other versions.
    starts = [*_earlier_starts(path, console), environment(revision)]
    write_atomic(path, json.dumps(starts, indent=1))


def _write_tokenizer(path: Path, tokenizer: Tokenizer, console: Console) -> None:
    """Write a copy, so that the run can be used when the tokenizer's cache is gone."""
    if path.exists():
        if path.read_bytes() == tokenizer.model:
            return
        warn(console, f"{path} was damaged, and is written anew")
    tokenizer.save(path)


def _earlier_starts(path: Path, console: Console) -> list[Any]:
    """The entries of earlier starts, which only describe: damaged ones do not stop a run."""
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_bytes())
    except ValueError:
        starts = None
    if isinstance(starts, list):
        return starts
    warn(console, f"{path} was damaged, and begins anew; what it told of earlier starts is lost")
    return []
