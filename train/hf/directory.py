"""Whether a path is the directory of a Hugging Face model. Needs no torch, which takes seconds."""

from pathlib import Path

from conf.errors import DataError

CONFIG = "config.json"


def check_directory(path: Path) -> None:
    """Make sure that a path looks like the directory of a Hugging Face model.

    Raises:
        DataError: it is none; says what to do.
    """
    if not path.exists():
        raise DataError(
            f"{path}: no such directory; download a model from the Hub first, for example with "
            f"`hf download allenai/OLMo-2-0425-1B --local-dir {path}`"
        )
    if not path.is_dir():
        raise DataError(f"{path}: not a directory; give the one that {CONFIG} is in")
