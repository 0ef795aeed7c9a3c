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

RUN_CONFIG, CHECKPOINTS, STEPS = "config.yaml", "checkpoints", "step_*"
OTHERWISE = "Restore one of them from a copy, or choose another run.start_from."
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
    if not path.exists():
        raise DataError(
            f"{path}: no such directory; give that of a run, of one of its checkpoints, or of a "
            "model from the Hub, as `hf download allenai/OLMo-2-0425-1B --local-dir DIRECTORY` "
            "makes it"
        )
    if path.is_dir() and not (path / CONFIG).exists():
        if (path / manifest.MANIFEST).is_file():
            return Kind.CHECKPOINT
        if any(path.glob(STEPS)):
            raise DataError(
                f"{path}: these are the checkpoints of a run; give the run, {path.parent}, or one "
                "of them"
            )
        if (path / RUN_CONFIG).is_file() or (path / CHECKPOINTS).is_dir():
            if not complete_checkpoints(path):
                raise DataError(_why_no_checkpoint(path))
            return Kind.RUN
    check_directory(path)
    return Kind.HUGGING_FACE


def _why_no_checkpoint(run: Path) -> str:
    """Why a run gives no weights, and what to do."""
    found = sorted((run / CHECKPOINTS).glob(STEPS), reverse=True)
    if not found:
        return f"{run}: the run has no complete checkpoint yet; let it train on"
    flaws = "".join(f"  {x.name}: {manifest.damage(x, contents=False)}\n" for x in found)
    return f"every checkpoint of {run} is damaged:\n{flaws}{OTHERWISE}"


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
    found = sorted((run / CHECKPOINTS).glob(STEPS), reverse=True)
    return [path for path in found if manifest.damage(path, contents=False) is None]
