"""Loading the model that a run has trained."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from conf.errors import ConfigError, DataError, reason_of
from data.tokenizer import Tokenizer
from phd.model import Transformer
from train.checkpoint.format import TOKENIZER
from train.checkpoint.reader import Checkpoint
from train.checkpoint.store import CheckpointStore
from train.config import Config


class LoadedRun(NamedTuple):
    """A trained model, its tokenizer, its number of optimizer steps, and its run's config."""

    model: Transformer
    tokenizer: Tokenizer
    step: int
    config: Config


def load_run(directory: Path, device: torch.device) -> LoadedRun:
    """Load the newest complete checkpoint of a run; the model is in evaluation mode.

    With `schedule.copies`, its K is that of its last step, as in the run's own evaluations.

    Raises:
        ConfigError: there is no such run, it has no complete checkpoint, its weights are of a norm
            wiring that has changed since, or its tokenizer is another one.
        DataError: its tokenizer is missing or damaged, and the checkpoint is of an earlier version
            that kept none.
    """
    if not (directory / "config.yaml").is_file() and not (directory / "checkpoints").is_dir():
        problem = f"run={directory}: no config.yaml there; give the directory of a run"
        raise ConfigError([problem], "the arguments")
    try:
        checkpoint = CheckpointStore(directory / "checkpoints", keep=1).newest()
    except DataError as error:
        raise ConfigError([f"run={directory}: {reason_of(error)}"], "the arguments") from error
    if checkpoint is None:
        problem = f"run={directory}: no checkpoint there yet; let it train on"
        raise ConfigError([problem], "the arguments")
    for path, reason in checkpoint.rejected:
        print(f"rejected the checkpoint {path}: {reason}", file=sys.stderr)
    # The checkpoint's own settings and tokenizer: their bytes have been verified. Those beside it
    # are for people, and a crash may have damaged them.
    config = Config.from_dict(checkpoint.state["config"])
    checkpoint.refuse_old_form(config.model)
    # On the meta device no weights are drawn, only to be overwritten.
    K, weights = config.copy_stage(max(0, checkpoint.step - 1)).K, checkpoint.load_weights()
    with torch.device("meta"):
        model = Transformer(replace(config.model, K=K))
    # Vectors and tables of copies that still wait are no part of it.
    if config.model.copy_embedding:
        weights["copy_embed.weight"] = weights["copy_embed.weight"][:K]
    if config.model.hidden_input == "table":
        rows = (K - 1) * config.model.vocab_size
        weights["copy_input.weight"] = weights["copy_input.weight"][:rows]
    model.to_empty(device=device).load(weights)
    tokenizer = _tokenizer(checkpoint, directory)
    return LoadedRun(model.eval(), tokenizer, checkpoint.step, config)


def _tokenizer(checkpoint: Checkpoint, directory: Path) -> Tokenizer:
    """The checkpoint's tokenizer; that of the run's directory if it is of an earlier version."""
    path = checkpoint.tokenizer_path or directory / TOKENIZER
    try:
        tokenizer = Tokenizer.load(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing. Restore it from a copy.") from error
    if tokenizer.fingerprint != checkpoint.state["stream"]["tokenizer"]:
        problem = f"run={directory}: its tokenizer.model is not the one that it was trained with"
        raise ConfigError([f"{problem}; copy that one there"], "the arguments")
    return tokenizer
