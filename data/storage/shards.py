"""Listing the shards of a corpus: files on this machine, on the web or in a store."""

import errno
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from functools import partial
from pathlib import PurePosixPath

from fsspec.utils import glob_translate

from conf.errors import ConfigError, Problem, TransientError, reason_of
from data.config import RemoteConfig
from data.storage.retry import PermanentError, retry
from data.storage.stores import Entry, Shard, Store
from data.storage.transport import is_local, store_of

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""How files are compressed, by the end of their names in small letters."""

FOLDER = "folder"
"""What stands in place of an ending for a folder that is left out."""

MAX_DEPTH = 99
"""Folders within folders that are listed; it ends a circle of links that no check has noticed."""

LISTING = RemoteConfig(timeout_s=10.0, retry_s=10.0)
"""Shorter times than for reading: before a run has begun nothing is lost, and a user waits."""

WRONG_PATH = (PermanentError, FileNotFoundError, NotADirectoryError, PermissionError)
WRONG_PATH_ERRNO = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""What says that the path is wrong. Any other error may go away, as that of a server which is
restarted does."""


class Listing(list[Shard]):
    """The shards that a pattern means, sorted by name.

    Attributes:
        in_folders: URLs of those that were found by their suffix in a folder, and not named
            themselves.
        passed_over: the URLs of the other files in these folders, with the endings of their names
            in small letters, and of folders that were left out. Names that begin with a dot are
            hidden, and not among them.
    """

    def __init__(
        self, shards: Iterable[Shard], in_folders: frozenset[str], passed_over: dict[str, str]
    ) -> None:
        # By name and not by URL: a corpus that is moved keeps its order, and its cursors.
        super().__init__(sorted(shards, key=lambda shard: shard.name))
        self.in_folders = in_folders
        self.passed_over = passed_over


def list_shards(
    pattern: str,
    suffixes: tuple[str, ...],
    remote: RemoteConfig = LISTING,
    *,
    setting: str = "paths",
) -> Listing:
    """The shards that a file, a folder or a glob means, sorted by name.

    A folder means the files in it, at any depth, with one of the `suffixes` in small or capital
    letters, also if compressed. A file means itself. A glob means the files that it matches, and
    the folders that are called like files, as `x.parquet/` is; if it matches no file, all folders
    that it matches. Names that begin with a dot are left out in folders and globs.

    Args:
        pattern: a path, such as `~/books/**/*.txt`, or a URL, such as
            `hf://datasets/allenai/c4/en/*.json.gz`.
        suffixes: such as `.jsonl`.
        setting: the full name of the setting that the pattern comes from, for errors.

    Raises:
        ConfigError: the pattern matches nothing, or the store refuses it for good.
        TransientError: the store cannot be reached.
    """
    local = pattern.removeprefix("file://")
    root = os.path.abspath(os.path.expanduser(local)) if is_local(local) else pattern
    is_relative = is_local(local) and not os.path.isabs(os.path.expanduser(local))
    here = f" (relative paths start at {os.getcwd()})" if is_relative else ""
    try:
        found = _find(root, suffixes, remote)
    except (PermanentError, OSError) as error:
        if isinstance(error, WRONG_PATH) or getattr(error, "errno", None) in WRONG_PATH_ERRNO:
            expected = _why_not_there(root, error)
            raise ConfigError([Problem(setting, pattern, expected, f"correct it{here}")]) from error
        raise TransientError(
            f"{setting}={pattern!r}: cannot be listed at present ({reason_of(error)}); make "
            "sure that it can be reached from here, and start the run again"
        ) from error
    if not found:
        expected = (
            f"neither a file, nor a folder with {', '.join(suffixes)} files in it (also with "
            f"{', '.join(COMPRESSED)}), nor a glob that matches any"
        )
        if found.passed_over:
            expected += f"; there are only {counted(found.passed_over.values())}"
        raise ConfigError([Problem(setting, pattern, expected, f"correct it{here}")])
    return found


def compression_of(name: str) -> str | None:
    """How a shard of this name is compressed; None if it is not.

    >>> compression_of("a.jsonl.gz"), compression_of("A.JSONL.GZ"), compression_of("a.jsonl")
    ('gzip', 'gzip', None)
    """
    return COMPRESSED.get(os.path.splitext(name)[1].lower())


def ending_of(name: str) -> str:
    """The ending of a file's name in small letters, with that of its compression.

    >>> ending_of("a/b.JSON.gz"), ending_of("a.b/README")
    ('.json.gz', '')
    """
    rest, last = os.path.splitext(os.path.basename(name).lower())
    return os.path.splitext(rest)[1] + last if last in COMPRESSED else last


def counted(endings: Iterable[str]) -> str:
    """How many files have each ending, the most frequent first.

    >>> counted([".md", "", ".png", ".png"])
    '2 .png, 1 .md, 1 without an ending'
    """
    counts = sorted(Counter(endings).items(), key=lambda item: (-item[1], item[0] == "", item[0]))
    words = {"": "without an ending", FOLDER: "folders"}
    return ", ".join(
        f"{count} {ending if count == 1 and ending else words.get(ending, ending)}"
        for ending, count in counts
    )


def _why_not_there(root: str, error: Exception) -> str:
    """Why a path cannot be listed; of a misspelt file, the file whose name is closest."""
    missing = error.filename if isinstance(error, FileNotFoundError) else None
    if not is_local(root) or not missing:
        return f"cannot be listed ({reason_of(error)})"
    if os.path.islink(missing):
        return f"{missing} is a link to {os.readlink(missing)}, which is not there"
    if missing != root:
        return f"there is no {missing}"
    folder, name = os.path.split(root)
    if not os.path.isdir(folder):
        return f"no such file, and no folder {folder}"
    close = get_close_matches(name, os.listdir(folder), n=1)
    return "no such file or folder" + (f"; {close[0]} is there" if close else "")


def _find(root: str, suffixes: tuple[str, ...], remote: RemoteConfig) -> Listing:
    store = store_of(root, remote.timeout_s)
    read = re.compile(f".*({_any(suffixes)})({_any(COMPRESSED)})?", re.IGNORECASE | re.DOTALL)
    # A path that exists is itself, even if its name holds the signs of a glob.
    if _is_glob(root) and not os.path.exists(root):
        folder, relative = _split(root.rstrip("/"))
        glob = re.compile(glob_translate(relative))
        depth = MAX_DEPTH if "**" in relative else relative.count("/") + 1
        walk = _Walk(store, remote, read, glob)
        walk.enter(folder, depth)
        if not walk.named and not walk.inside:
            for name, entry in walk.folders.items():
                walk.enter(entry.url, path=f"{name}/", inside=True)
            walk.folders.clear()
    else:
        entry = retry(partial(store.info, root), remote.retry_s)
        if not entry.is_folder:
            return Listing([_shard(store, entry.name, entry, remote)], frozenset(), {})
        walk = _Walk(store, remote, read)
        walk.enter(entry.url, inside=True)
    in_folders = {name: entry for name, entry in walk.inside.items() if read.fullmatch(name)}
    passed_over = {
        **{e.url: ending_of(name) for name, e in walk.inside.items() if name not in in_folders},
        **{e.url: FOLDER for name, e in walk.folders.items() if name not in walk.entered},
    }
    # A web server is asked for the size of each file, one request per file.
    with ThreadPoolExecutor(8) as pool:
        files = [*walk.named.items(), *in_folders.items()]
        shards = list(pool.map(lambda file: _shard(store, file[0], file[1], remote), files))
    urls = frozenset(shard.url for shard in shards[len(walk.named) :])
    return Listing(shards, urls, passed_over)


def _is_glob(text: str) -> bool:
    """Whether it has a glob's signs in it; in a URL, a question mark begins the query."""
    return re.search(r"[*?[]" if is_local(text) else r"[*[]", text) is not None


def _split(pattern: str) -> tuple[str, str]:
    """The folder in which a glob begins, and the rest of it.

    >>> _split("https://host/data/*/part-*.jsonl")
    ('https://host/data/', '*/part-*.jsonl')
    """
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if re.search(r"[*?[]", part))
    return "/".join(parts[:fixed]) + "/", "/".join(parts[fixed:])


def _any(endings: Iterable[str]) -> str:
    return "|".join(map(re.escape, endings))


class _Walk:
    """A walk through folders, for files that a glob matches and for those in certain folders.

    Not the stores' own globs: these differ, and have no retries between two folders.

    Args:
        read: what files that can be read are called.
        glob: of whole paths, from where the walk begins; None: only folders are wanted.

    Attributes:
        named: the files whose paths the glob matches, by their paths.
        folders: the folders whose paths it matches, without those that are called like files.
        entered: the folders in which, at any depth, files are named.
        inside: the files in the folders that are wanted, at any depth, by their paths.
    """

    def __init__(
        self,
        store: Store,
        remote: RemoteConfig,
        read: re.Pattern[str],
        glob: re.Pattern[str] | None = None,
    ) -> None:
        self.named: dict[str, Entry] = {}
        self.folders: dict[str, Entry] = {}
        self.entered: set[str] = set()
        self.inside: dict[str, Entry] = {}
        self._read = read
        self._store = store
        self._remote = remote
        self._glob = glob

    def enter(
        self, folder: str, depth: int = MAX_DEPTH, path: str = "", *, inside: bool = False
    ) -> None:
        """Walk through a folder, down to some `depth`; `inside`: all of its files are wanted."""
        for entry in retry(partial(self._store.ls, folder), self._remote.retry_s):
            if entry.name.startswith("."):
                continue
            name = path + entry.name
            matches = self._glob is not None and self._glob.fullmatch(name) is not None
            if entry.is_folder:
                # Spark and others write a table as a folder that is called like a file.
                table = matches and self._read.fullmatch(entry.name) is not None
                if matches and not table and not inside:
                    self.folders[name] = entry
                if depth > 1 or table:
                    below = MAX_DEPTH if table else depth - 1
                    self.enter(entry.url, below, f"{name}/", inside=inside or table)
            elif matches:
                self.named[name] = entry
                self.entered.update(str(above) for above in PurePosixPath(name).parents)
            elif inside:
                self.inside[name] = entry


def _shard(store: Store, name: str, entry: Entry, remote: RemoteConfig) -> Shard:
    if entry.size is None:
        entry = retry(partial(store.info, entry.url), remote.retry_s)
    assert entry.size is not None, "Store.info tells the size of a file"
    return Shard(entry.url, name, entry.size, entry.tag)
