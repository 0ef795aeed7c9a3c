"""Loading the model that a run has trained."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf

from conf.errors import ConfigError, DataError, reason_of
from data.tokenizer import Tokenizer
from phd.model import Transformer
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

    Raises:
        ConfigError: there is no such run, it has no complete checkpoint, or its weights are of a
            norm wiring that has changed since.
    """
    for name in ("config.yaml", "tokenizer.model"):
        if not (directory / name).is_file():
            problem = f"run={directory}: no {name} there; give the directory of a run"
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
    # The settings of the run itself: today's defaults may differ from those that it began with.
    settings = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    config = Config.from_dict(settings)  # type: ignore[arg-type]
    checkpoint.refuse_old_form(config.model)
    # On the meta device no weights are drawn, only to be overwritten.
    with torch.device("meta"):
        model = Transformer(config.model)
    model.to_empty(device=device).load(checkpoint.load_weights())
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    if tokenizer.fingerprint != checkpoint.state["stream"]["tokenizer"]:
        problem = f"run={directory}: its tokenizer.model is not the one that it was trained with"
        raise ConfigError([f"{problem}; copy that one there"], "the arguments")
    return LoadedRun(model.eval(), tokenizer, checkpoint.step, config)
