"""The tokenizer that lies beside given weights. Nothing here needs torch, which takes seconds."""

from pathlib import Path

from rich.console import Console

from conf.errors import DataError
from data.sources.documents import Documents
from data.tokenizer import Tokenizer
from data.tokenizer_training import TokenizerOfWeights, prepare_tokenizer
from train.config import Config
from train.console import warn

CONFIG = "config.json"
RUN_CONFIG = "config.yaml"  # which the directory of a run has
TOKENIZER = "tokenizer.model"


def check_directory(path: Path) -> None:
    """Make sure that a path looks like the directory of a Hugging Face model.

    Raises:
        DataError: it is none; says what to do.
    """
    if path.is_dir() and not (path / CONFIG).exists() and (path / RUN_CONFIG).is_file():
        raise DataError(
            f"{path}: the directory of a run, not of a Hugging Face model; export it first, with "
            f"`python train/export.py run={path} out={path}-exported`, and give that directory"
        )
    if not path.exists():
        raise DataError(
            f"{path}: no such directory; download a model from the Hub first, for example with "
            f"`hf download allenai/OLMo-2-0425-1B --local-dir {path}`"
        )
    if not path.is_dir():
        raise DataError(f"{path}: not a directory; give the one that {CONFIG} is in")


def tokenizer_of_weights(start_from: str | None, console: Console) -> TokenizerOfWeights | None:
    """The tokenizer in the directory of `run.start_from`; None, with a warning, if it has none.

    Weights are worth nothing under ids that mean other pieces. Nothing else would notice: such a
    run trains, only from a bad start.

    Raises:
        DataError: it is no such directory.
    """
    if start_from is None:
        return None
    check_directory(Path(start_from).expanduser())
    path = Path(start_from).expanduser() / TOKENIZER
    try:
        return TokenizerOfWeights("run.start_from", start_from, Tokenizer.load(path))
    except FileNotFoundError:
        why = f"it has no {TOKENIZER}"
    except (DataError, OSError) as error:
        why = str(error)
    warn(
        console,
        f"run.start_from={start_from}: {why}, so nothing says whether its weights were trained "
        "with the tokenizer of this run; if they were not, they are no better than random ones",
    )
    return None


def tokenizer_of_new_run(config: Config, documents: Documents, console: Console) -> Tokenizer:
    """The tokenizer that a new run with this configuration has.

    Raises:
        ConfigError, DataError: as `data.tokenizer_training.prepare_tokenizer`, and as
            `tokenizer_of_weights`.
    """
    return prepare_tokenizer(
        config.tokenizer,
        documents,
        vocab_size=config.model.vocab_size,
        of_weights=tokenizer_of_weights(config.run.start_from, console),
    )
