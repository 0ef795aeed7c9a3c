"""A snapshot of the source code in a run's directory.

runs/<name>/source/<hash>/
    revision.json    the commit, the branch, and whether there are uncommitted changes
    changes.patch    the uncommitted changes, including new files; empty if there are none
    source.tar.gz    the packages' files, without those that git ignores
"""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_128_hexdigest

from data.storage.atomic import new_directory

ROOT = Path(__file__).parents[2]
PACKAGES = ("phd", "data", "train", "launch", "conf")


class Revision(NamedTuple):
    """The git revision of the source.

    Attributes:
        commit: None if it is not known.
        branch: None if it is not known, or if no branch is checked out.
        dirty: whether there are uncommitted changes; None if it is not known.
        unknown: why nothing is known; None if the revision is known.
        changes: the uncommitted changes as a patch.
    """

    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None
    unknown: str | None = None
    changes: str = ""


def write_snapshot(directory: Path, revision: Revision, root: Path = ROOT) -> Path:
    """Write the source into `<directory>/source/`, unless it is there already.

    Args:
        directory: of the run.
        revision: of the source.
        root: the directory that has the packages.

    Returns:
        The snapshot's directory.

    Raises:
        OSError: it cannot be written.
    """
    archive = _archive(root, _files(root, revision))
    described = revision._asdict()
    changes = described.pop("changes")
    files = {
        "revision.json": (json.dumps(described, indent=1) + "\n").encode(),
        "changes.patch": changes.encode(errors="surrogateescape"),
    }
    # The hash is that of the uncompressed archive, because versions of zlib compress differently.
    name = xxh3_128_hexdigest(files["revision.json"] + files["changes.patch"] + archive)[:12]
    path = directory / "source" / name
    if path.exists():
        if _is_whole(path, files, archive):
            return path
        shutil.rmtree(path)  # a loss of power has left files empty
    # A run that is started a hundred times from one source has one snapshot of it.
    for unfinished in path.parent.glob(f".{name}.*.partial"):  # a killed start left it
        shutil.rmtree(unfinished)
    with new_directory(path) as partial:
        # 0.04 s; level 9 takes 0.2 s at each start of a run, for a file that is 5% smaller.
        packed = gzip.compress(archive, compresslevel=4, mtime=0)
        for file, content in {**files, "source.tar.gz": packed}.items():
            (partial / file).write_bytes(content)
    return path


def _is_whole(path: Path, files: dict[str, bytes], archive: bytes) -> bool:
    """Whether a snapshot holds these files; its archive may be compressed differently."""
    try:
        packed = (path / "source.tar.gz").read_bytes()
        same = all((path / name).read_bytes() == content for name, content in files.items())
        return same and gzip.decompress(packed) == archive
    except (OSError, EOFError, zlib.error):  # gzip.BadGzipFile is an OSError
        return False


def read_revision(root: Path = ROOT) -> Revision:
    """Ask git for the revision of the packages in `root`."""
    if shutil.which("git") is None:
        return Revision(unknown="git is not installed")
    try:
        if not _git(root, "ls-files", *PACKAGES):
            return Revision(unknown=f"{root} is in a repository that does not hold the packages")
        commit = _git(root, "rev-parse", "HEAD").strip()
        branch = _git(root, "branch", "--show-current").strip() or None
        changes = _git(root, "diff", *PLAIN, "HEAD")
        # `git diff HEAD` leaves out new files; each is compared with an empty one.
        listed = _git(root, "ls-files", "-z", "--others", "--exclude-standard", *PACKAGES)
        for name in filter(None, listed.split("\0")):
            changes += _git(root, "diff", *PLAIN, "--no-index", os.devnull, name, differs=True)
    except subprocess.CalledProcessError as error:
        return Revision(unknown=error.stderr.strip())
    return Revision(commit, branch, bool(changes), None, changes)


PLAIN = ("--no-color", "--no-ext-diff", "--no-textconv")
"""Options of `git diff` that turn off a user's settings, which can make an unusable patch."""


def _git(root: Path, *arguments: str, differs: bool = False) -> str:
    """The output of a git command. `differs`: it exits with 1, as `git diff --no-index` does."""
    # A git hook sets GIT_DIR and the like, which would select another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments],
        cwd=root,
        env=environment | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    if done.returncode != (1 if differs else 0):
        done.check_returncode()
    return done.stdout


def _files(root: Path, revision: Revision) -> list[Path]:
    """The packages' files; without those that git ignores, which may hold keys or be large."""
    if revision.unknown:
        found = [path for name in PACKAGES for path in (root / name).rglob("*")]
    else:
        listed = _git(root, "ls-files", "-z", "-co", "--exclude-standard", *PACKAGES)
        found = [root / name for name in set(filter(None, listed.split("\0")))]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def _archive(root: Path, files: list[Path]) -> bytes:
    """The files as a tar. It has no times and owners, so equal files give equal bytes."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in files:
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(root).as_posix())
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return written.getvalue()
