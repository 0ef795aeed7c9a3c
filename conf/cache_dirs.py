"""A cache is no condition of a run: where one cannot be written, another place is used and told.

A home may be read-only, on a full or missing disk, or not exist at all: in a container under a user
of its own, in a job of a cluster. Our caches and those of the libraries below lie there by default.
"""

import os
import sys
import tempfile
from pathlib import Path

from conf.errors import reason_of

HOME_CACHE = "${XDG_CACHE_HOME}"

COMPILED = "TORCHINDUCTOR_CACHE_DIR"
"""The variable of what `torch.compile` makes. Several processes may write there at once: torch
writes each file beside, and renames it."""

CACHES = {
    "PHD_CACHE": "${PHD_CACHE}",
    "HF_HUB_CACHE": "${HF_HOME}/hub",
    "HF_ASSETS_CACHE": "${HF_HOME}/assets",
    "HF_XET_CACHE": "${HF_HOME}/xet",
    "HF_DATASETS_CACHE": "${HF_HOME}/datasets",
    "HF_MODULES_CACHE": "${HF_HOME}/modules",
    COMPILED: "${PHD_CACHE}/torchinductor",
    "TRITON_CACHE_DIR": "${TRITON_HOME}/.triton/cache",
    "TORCH_EXTENSIONS_DIR": f"{HOME_CACHE}/torch_extensions",
    "MPLCONFIGDIR": "~/.config/matplotlib",
    "WANDB_CACHE_DIR": f"{HOME_CACHE}/wandb",
    "WANDB_CONFIG_DIR": "~/.config/wandb",
    "WANDB_DATA_DIR": "~/.local/share/wandb",
}
"""The variable that moves each cache, and where it is without. Of Hugging Face's, `HF_HOME` itself
stays: it also holds the token, which can be read in a home that cannot be written."""

DEFAULTS = {
    "XDG_CACHE_HOME": "~/.cache",
    "HF_HOME": f"{HOME_CACHE}/huggingface",
    "TRITON_HOME": "~",
    "PHD_CACHE": f"{HOME_CACHE}/phd",
}


def use_writable_caches() -> None:
    """Point the caches that cannot be written to a directory of this user's for temporary files.

    Each command's entry point calls it, before the libraries that read the variables are imported.
    The processes that a command starts inherit what it decides. It is told once on stderr.

    What `torch.compile` makes is kept with our own cache: torch's choice is the directory for
    temporary files, which a machine empties when it starts, and a container begins without.
    """
    reasons: dict[Path, str] = {}
    moved = {}
    for variable, default in CACHES.items():
        try:
            place = Path(os.environ.get(variable) or _expanded(default)).expanduser().absolute()
        except RuntimeError as error:  # there is no home to expand `~` to
            moved[variable] = str(error)
            continue
        existing = next(p for p in (place, *place.parents) if _exists(p))
        if existing not in reasons:
            reasons[existing] = _why_not(existing)
        if not reasons[existing] and variable == COMPILED:
            os.environ[variable] = str(place)
        if reasons[existing]:
            moved[variable] = f"{place}: {reasons[existing]}"
    if not moved:
        return
    try:
        instead = _temporary()
    except OSError:
        return  # what needs a place then says so itself
    for variable in moved:
        os.environ[variable] = str(instead / variable.lower())
    print(
        f"caches cannot be written ({next(iter(moved.values()))}); this command keeps them in "
        f"{instead}. To choose another place, set {', '.join(moved)}",
        file=sys.stderr,
    )


def _expanded(default: str) -> str:
    for variable, value in reversed(DEFAULTS.items()):
        default = default.replace(f"${{{variable}}}", os.environ.get(variable) or value)
    return default


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a parent that may not be entered
        return False


def _why_not(directory: Path) -> str:
    """Why no file can be made in an existing directory; empty if one can.

    Permissions do not tell: a disk may be read-only or full, or the directory another machine's.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return error.strerror or reason_of(error)  # without the name of a file that is not there


def _temporary() -> Path:
    """A directory for this user alone, the same for all processes of this machine.

    Raises:
        OSError: there is none.
    """
    path = Path(tempfile.gettempdir(), f"phd-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid() or _why_not(path):
        return Path(tempfile.mkdtemp(prefix="phd-"))  # another user has taken the name
    return path
