"""The shards of a corpus: files on this machine, on the web or in a store, and their sizes."""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fsspec.utils import glob_translate

from data.config import RemoteConfig
from data.storage.retry import PermanentError, retry
from data.storage.stores import Entry, Shard, Store
from data.storage.transport import is_local, store_of

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
"""How files are compressed, by the end of their names, in Arrow's words."""

DEPTH = 99  # of folders in folders

LISTING = RemoteConfig(timeout_s=10.0, retry_s=10.0)
"""Shorter than for reading: a run that has not begun loses nothing, and somebody waits for it."""


def list_shards(
    pattern: str, suffixes: tuple[str, ...], remote: RemoteConfig = LISTING
) -> list[Shard]:
    """The shards that a file, a folder or a glob means, sorted by name.

    A folder means the files in it, at any depth, with one of the `suffixes`, also if compressed;
    a file or glob means what it says. Names that begin with a dot are passed over in either.

    Args:
        pattern: a path, such as `~/books/**/*.txt`, or a URL, such as
            `hf://datasets/allenai/c4/en/*.json.gz`.
        suffixes: such as `.jsonl`.

    Raises:
        ValueError: there are none, or the store refuses or cannot be reached.
    """
    local = pattern.removeprefix("file://")
    where = os.path.abspath(os.path.expanduser(local)) if is_local(local) else pattern
    start = f" (relative paths start at {os.getcwd()})" if is_local(local) else ""
    try:
        found = _find(where, suffixes, remote)
    except (PermanentError, OSError) as error:
        raise ValueError(
            f"{pattern!r}: cannot be listed ({error}); correct it{start}, or see that it can be "
            "reached"
        ) from error
    if not found:
        raise ValueError(
            f"{pattern!r}: neither a file, nor a folder with {', '.join(suffixes)} files in it "
            f"(also with {', '.join(COMPRESSED)}), nor a glob that matches any; correct it{start}"
        )
    return sorted(found, key=lambda shard: shard.name)


def compression_of(name: str) -> str | None:
    """How a shard of this name is compressed; None if it is not.

    >>> compression_of("a.jsonl.gz"), compression_of("a.jsonl")
    ('gzip', None)
    """
    return COMPRESSED.get(os.path.splitext(name)[1])


def _find(where: str, suffixes: tuple[str, ...], remote: RemoteConfig) -> list[Shard]:
    store = store_of(where, remote.timeout_s)
    if _is_glob(where) and not os.path.exists(where):
        folder, wanted = _split(where)
        names = glob_translate(wanted)
        depth = DEPTH if "**" in wanted else wanted.count("/") + 1
    else:
        entry = retry(partial(store.info, where), remote.retry_s)
        if not entry.is_folder:
            return [_shard(store, entry.name, entry, remote)]
        folder, depth = entry.url, DEPTH
        names = f".*({_any(suffixes)})({_any(COMPRESSED)})?"
    files = _walk(store, folder, depth, remote)
    found = [(name, entry) for name, entry in files if re.fullmatch(names, name)]
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
    assert entry.size is not None, "a file's size is known after a look"
    return Shard(entry.url, name, entry.size, entry.tag)
