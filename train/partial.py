"""Directories in which checkpoints are written before they get their names.

.step_00000200.<host>.<process>.<token>.partial

A name is used once, so that a rank of a job that is thought dead can no longer write into a later
one's files. What dead processes have left is deleted; what may belong to a live one is not.
"""

import os
import re
import secrets
import shutil
from pathlib import Path
from socket import gethostname

LIVE_S = 3600.0
"""Seconds after its last file for which an unfinished directory may belong to a live process."""


def new_partial(path: Path) -> Path:
    """Make the directory that will become `path`, after deleting what crashes have left there."""
    owner = f"{gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.name}.{owner}.partial")
    partial.mkdir(parents=True)
    now = partial.stat().st_mtime  # by the file system's clock
    for other in path.parent.glob(".step_*.partial"):
        if other != partial and not _may_live(other, now):
            shutil.rmtree(other)
    return partial


def _may_live(partial: Path, now: float) -> bool:
    """Whether the process that writes a directory may still be alive."""
    owner = re.fullmatch(r"\.step_\d+\.(.+)\.(\d+)\.\w+\.partial", partial.name)
    if owner is None or partial.stat().st_mtime < now - LIVE_S:
        return False
    host, process = owner[1], int(owner[2])
    return host != gethostname() or (process != os.getpid() and _runs(process))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True
