"""The source that a run is made with, kept in its directory.

runs/<name>/source/<hash>/
    revision.json    the commit and branch, and whether there are changes since
    changes.patch    those changes, with the packages' new files; empty if there are none
    source.tar.gz    the packages as they are
"""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_128_hexdigest

from data.storage.atomic import new_directory

ROOT = Path(__file__).parents[2]
PACKAGES = ("phd", "data", "train", "launch", "conf")


class Revision(NamedTuple):
    """What git says of the source.

    Attributes:
        commit, branch: None where they are not known, or there is no branch.
        dirty: whether the source is another than the commit's; None where it is not known.
        unknown: why nothing is known; None if it is.
        changes: the difference as a patch.
    """

    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    unknown: str | None = None
    changes: str = ""


def write_snapshot(directory: Path, revision: Revision, root: Path = ROOT) -> Path:
    """Keep the source in `<directory>/source/`, unless it is there; return where it is.

    Args:
        revision: what git says of it.
        root: where the packages are.

    Raises:
        OSError: the disk refuses.
    """
    archive = _archive(root)
    described = revision._asdict()
    changes = described.pop("changes")
    files = {
        "revision.json": (json.dumps(described, indent=1) + "\n").encode(),
        "changes.patch": changes.encode(errors="surrogateescape"),
        "source.tar.gz": gzip.compress(archive, mtime=0),
    }
    # Of what is in the archive: another version of zlib must not make it another source.
    name = xxh3_128_hexdigest(files["revision.json"] + files["changes.patch"] + archive)[:12]
    path = directory / "source" / name
    if path.exists():
        return path
    with new_directory(path) as partial:
        for file, content in files.items():
            (partial / file).write_bytes(content)
    return path


def read_revision(root: Path = ROOT) -> Revision:
    """What git says of the packages in `root`."""
    if shutil.which("git") is None:
        return Revision(unknown="git is not installed")
    try:
        if not _git(root, "ls-files", *PACKAGES):
            return Revision(unknown=f"{root} is in a repository that does not hold the packages")
        commit = _git(root, "rev-parse", "HEAD").strip()
        branch = _git(root, "branch", "--show-current").strip() or None
        changes = _git(root, "diff", *PLAIN, "HEAD")
        listed = _git(root, "ls-files", "-z", "--others", "--exclude-standard", *PACKAGES)
        for name in filter(None, listed.split("\0")):
            changes += _git(root, "diff", *PLAIN, "--no-index", os.devnull, name, differs=True)
    except subprocess.CalledProcessError as error:
        return Revision(unknown=error.stderr.strip())
    return Revision(commit, branch, bool(changes), None, changes)


PLAIN = ("--no-color", "--no-ext-diff", "--no-textconv")


def _git(root: Path, *arguments: str, differs: bool = False) -> str:
    """What git prints; `differs` is for commands that end with 1 where they find a difference."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments],
        cwd=root,
        env=own | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    if done.returncode != (1 if differs else 0):
        done.check_returncode()
    return done.stdout


def _archive(root: Path) -> bytes:
    """The packages' files as a tar, the same bytes whenever and by whomever it is made."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(path for name in PACKAGES for path in (root / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = path.read_bytes()
                entry = tarfile.TarInfo(path.relative_to(root).as_posix())
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return written.getvalue()
