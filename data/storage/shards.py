"""Listing the shards of a corpus: files on this machine, on the web or in a store."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fsspec.utils import glob_translate

from conf.errors import ConfigError, Problem, TransientError, reason_of
from data.config import RemoteConfig
from data.storage.retry import PermanentError, retry
from data.storage.stores import Entry, Shard, Store
from data.storage.transport import is_local, store_of

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
"""How files are compressed, by the end of their names; the values are Arrow's names."""

MAX_DEPTH = 99
"""Folders within folders that are listed; it ends a circle of links that no check has noticed."""

LISTING = RemoteConfig(timeout_s=10.0, retry_s=10.0)
"""Shorter times than for reading: before a run has begun nothing is lost, and a user waits."""

WRONG_PATH = (PermanentError, FileNotFoundError, NotADirectoryError, PermissionError)
WRONG_PATH_ERRNO = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""What says that the path is wrong. Any other error may go away, as that of a server which is
restarted does."""


def list_shards(
    pattern: str,
    suffixes: tuple[str, ...],
    remote: RemoteConfig = LISTING,
    *,
    setting: str = "paths",
) -> list[Shard]:
    """The shards that a file, a folder or a glob means, sorted by name.

    A folder means the files in it, at any depth, with one of the `suffixes`, also if compressed.
    A file or a glob means what it says. Names that begin with a dot are left out in both.

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
    here = f" (relative paths start at {os.getcwd()})" if is_local(local) else ""
    try:
        found = _find(root, suffixes, remote)
    except (PermanentError, OSError) as error:
        if isinstance(error, WRONG_PATH) or getattr(error, "errno", None) in WRONG_PATH_ERRNO:
            expected = f"cannot be listed ({reason_of(error)})"
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
        raise ConfigError([Problem(setting, pattern, expected, f"correct it{here}")])
    # By name and not by URL: a corpus that is moved keeps its order, and its cursors.
    return sorted(found, key=lambda shard: shard.name)


def compression_of(name: str) -> str | None:
    """How a shard of this name is compressed; None if it is not.

    >>> compression_of("a.jsonl.gz"), compression_of("a.jsonl")
    ('gzip', None)
    """
    return COMPRESSED.get(os.path.splitext(name)[1])


def _find(root: str, suffixes: tuple[str, ...], remote: RemoteConfig) -> list[Shard]:
    store = store_of(root, remote.timeout_s)
    # A path that exists is itself, even if its name holds the signs of a glob.
    if _is_glob(root) and not os.path.exists(root):
        folder, relative = _split(root)
        names = glob_translate(relative)
        depth = MAX_DEPTH if "**" in relative else relative.count("/") + 1
    else:
        entry = retry(partial(store.info, root), remote.retry_s)
        if not entry.is_folder:
            return [_shard(store, entry.name, entry, remote)]
        folder, depth = entry.url, MAX_DEPTH
        names = f".*({_any(suffixes)})({_any(COMPRESSED)})?"
    files = _walk(store, folder, depth, remote)
    found = [(name, entry) for name, entry in files if re.fullmatch(names, name)]
    # A web server is asked for the size of each file, one request per file.
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda file: _shard(store, file[0], file[1], remote), found))


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


def _walk(
    store: Store, folder: str, depth: int, remote: RemoteConfig
) -> Iterator[tuple[str, Entry]]:
    """The files in a folder, down to some depth, with their paths from there."""
    # Not the stores' own globs: these differ, and have no retries between two folders.
    for entry in retry(partial(store.ls, folder), remote.retry_s):
        if entry.name.startswith("."):
            continue
        if not entry.is_folder:
            yield entry.name, entry
        elif depth > 1:
            for name, inner in _walk(store, entry.url, depth - 1, remote):
                yield f"{entry.name}/{name}", inner


def _shard(store: Store, name: str, entry: Entry, remote: RemoteConfig) -> Shard:
    if entry.size is None:
        entry = retry(partial(store.info, entry.url), remote.retry_s)
    assert entry.size is not None, "Store.info tells the size of a file"
    return Shard(entry.url, name, entry.size, entry.tag)
