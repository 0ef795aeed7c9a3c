"""The corpus that is on every machine already: Python's own source files."""

import os
import sysconfig
from pathlib import Path

from xxhash import xxh3_64_intdigest

from data.sources.files import CorpusFile, FileCorpus
from data.sources.formats import PythonFile
from data.storage.shard_cache import ShardCache
from data.storage.stores import LocalStore, Shard

# Tests are the larger half of a full installation, much of it tables and deliberate nonsense, and
# many systems leave them out: without them the corpus is better text and more nearly the same.
PASSED_OVER = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


def python_corpus(name: str, *, packages: bool, cache: ShardCache) -> FileCorpus:
    """The standard library's `.py` files without its tests, and those of installed packages, in an
    order by a hash of their names."""
    paths = ["stdlib", *(["purelib", "platlib"] if packages else [])]
    roots = dict.fromkeys(Path(sysconfig.get_path(path)) for path in paths)
    shards = [shard for root in roots for shard in source_files(root)]
    # Lanes read neighbours: by name, one of them would have nothing but tables of characters.
    shards.sort(key=lambda shard: xxh3_64_intdigest(shard.name.encode()))
    return FileCorpus(name, tuple(CorpusFile(shard, PythonFile()) for shard in shards), cache)


def source_files(root: Path) -> list[Shard]:
    """The `.py` files under a directory, sorted by name; without tests, packages below it, and
    empty files, which many packages have for their `__init__.py`."""
    shards = []
    for directory, below, files in os.walk(root):
        below[:] = [name for name in below if name not in PASSED_OVER]
        for path in (Path(directory, name) for name in files if name.endswith(".py")):
            if path.is_file() and path.stat().st_size:
                shards.append(_shard(path, path.relative_to(root.parent).as_posix()))
    return sorted(shards, key=lambda shard: shard.name)


def _shard(path: Path, name: str) -> Shard:
    entry = LocalStore().info(str(path))
    assert entry.size is not None
    return Shard(entry.url, name, entry.size, entry.tag)
