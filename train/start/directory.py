"""What kind of directory `run.start_from` names. Needs no torch, which takes seconds.

config.json                        a Hugging Face model
config.yaml, checkpoints/step_*    a run, whose newest complete checkpoint is meant
state.json, manifest.json, ...     one checkpoint of a run
"""

from enum import Enum
from pathlib import Path

from conf.errors import DataError
from train.checkpoint import manifest
from train.hf.directory import CONFIG, check_directory

RUN_CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
TOKENIZER = "tokenizer.model"


class Kind(Enum):
    """Who has written a directory of weights."""

    HUGGING_FACE = "a Hugging Face model"
    RUN = "a run"
    CHECKPOINT = "a checkpoint"


def kind_of(path: Path) -> Kind:
    """The kind of a directory of weights.

    Raises:
        DataError: it is none, or a run that has no complete checkpoint; says what to do.
    """
    if path.is_dir() and not (path / CONFIG).exists():
        if (path / manifest.MANIFEST).is_file():
            return Kind.CHECKPOINT
        if (path / RUN_CONFIG).is_file() or (path / CHECKPOINTS).is_dir():
            if not complete_checkpoints(path):
                raise DataError(f"{path}: the run has no complete checkpoint yet; let it train on")
            return Kind.RUN
    check_directory(path)
    return Kind.HUGGING_FACE


def tokenizer_path(path: Path) -> Path:
    """Where the SentencePiece model of the weights is, if there is one.

    Raises:
        DataError: as `kind_of`.
    """
    if kind_of(path) is Kind.RUN:
        # The copies of all checkpoints are the same. Those of version 0.1 have none.
        newest = complete_checkpoints(path)[0] / TOKENIZER
        return newest if newest.exists() else path / TOKENIZER
    return path / TOKENIZER


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run whose files have the right sizes, newest first."""
    found = sorted((run / CHECKPOINTS).glob("step_*"), reverse=True)
    return [path for path in found if manifest.damage(path, contents=False) is None]
