"""The tokenizer that lies beside given weights. Nothing here needs torch, which takes seconds."""

from pathlib import Path

from rich.console import Console

from conf.errors import DataError
from data.sources.documents import Documents
from data.tokenizer import Tokenizer
from data.tokenizer_training import TokenizerOfWeights, prepare_tokenizer
from train.config import Config
from train.console import warn
from train.start.directory import tokenizer_path


def tokenizer_of_weights(start_from: str | None, console: Console) -> TokenizerOfWeights | None:
    """The tokenizer in the directory of `run.start_from`; None, with a warning, if it has none.

    Weights are worth nothing under ids that mean other pieces. Nothing else would notice: such a
    run trains, only from a bad start.

    Raises:
        DataError: it is no directory of weights.
    """
    if start_from is None:
        return None
    path = tokenizer_path(Path(start_from).expanduser())
    try:
        return TokenizerOfWeights("run.start_from", start_from, Tokenizer.load(path))
    except FileNotFoundError:
        why = f"it has no {path.name}"
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
