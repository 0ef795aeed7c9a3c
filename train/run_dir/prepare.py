"""Preparing the directory of a run.

runs/phd_cswa-2-16-32-tiny/
    config.yaml        the whole configuration, every default included
    environment.json   command, machine, versions and source revision; see environment.py;
                       one entry per start
    source/            this project's source code and its git revision; see snapshot.py
    metrics.jsonl      one line per logging step
    quarantine.jsonl   records that are no documents, and where they are; absent if there are none
    bad_steps/         the batches of bad steps; see train/anomalies/report.py
    stacks/            stack traces of the ranks when a step took too long
    tokenizer.model    the SentencePiece model
    wandb_id.txt, wandb/
    checkpoints/       see train/checkpoint/store.py
    lock.json          who holds the directory, while it is held; see lock.py
"""

import json
from itertools import count
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from conf.errors import ConfigError, Problem, reason_of
from conf.redaction import holds_secret
from data.storage.atomic import write_atomic
from data.tokenizer import Tokenizer
from train.config import Config
from train.run_dir.environment import environment
from train.run_dir.lock import LOCK, RunLock
from train.run_dir.snapshot import read_revision, write_snapshot


def prepare_run_dir(config: Config, tokenizer: Tokenizer, console: Console) -> None:
    """Make the run's directory, and write the configuration and the environment of this start.

    Raises:
        ConfigError: the directory cannot be written.
    """
    directory = config.run_dir
    if config.run.resume == "never" and (moved := archive_run_dir(directory)):
        RunLock.follow(directory, moved)
        console.print(f"run.resume=never: the earlier run is now in {moved}", markup=False)
    try:
        _describe(config, directory, tokenizer)
    except OSError as error:
        hint = "choose another run.dir, or make room there"
        problem = Problem(
            "run.dir", str(directory), f"cannot be written ({reason_of(error)})", hint
        )
        raise ConfigError([problem]) from error


def archive_run_dir(directory: Path) -> Path | None:
    """Rename the directory of an earlier run to `<directory>.old-<n>`; None if there is none."""
    if not directory.exists() or all(path.name == LOCK for path in directory.iterdir()):
        return None
    names = (directory.with_name(f"{directory.name}.old-{n}") for n in count(1))
    return directory.rename(next(name for name in names if not name.exists()))


def _describe(config: Config, directory: Path, tokenizer: Tokenizer) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    revision = read_revision()
    write_snapshot(directory, revision)
    settings = OmegaConf.to_yaml(OmegaConf.create(config.to_dict()))
    write_atomic(directory / "config.yaml", settings, private=holds_secret(config.to_dict()))
    # A copy, so that the run can be resumed and used when the tokenizer's cache is gone.
    tokenizer.save(directory / "tokenizer.model")
    path = directory / "environment.json"
    # One entry per start: a run may be resumed on another machine, or with other versions.
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write_atomic(path, json.dumps([*starts, environment(revision)], indent=1))
