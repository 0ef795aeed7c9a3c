"""A checkpoint's tensors as files, in the format of torch.distributed.checkpoint (DCP).

    __<rank>_0.distcp  the pieces that a rank wrote
    tensors.json       where each tensor's pieces are; what we read
    .metadata          the same as DCP pickles it, for DCP's own tools; we never open it

Nothing that is read can run code: the one is JSON, and the pieces pass through
`torch.load(weights_only=True)`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import (
    FileSystemWriter,
    SavePlan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from train.checkpoint.format import INDEX, dtype_name
from train.checkpoint.manifest import Entries, HashedFile, new_file
from train.checkpoint.staging import StagedPlanner


class TensorWriter(FileSystemWriter):
    """Writes tensors into a directory that exists, and tells of its files in `entries`."""

    def __init__(self, directory: Path) -> None:
        # Neither is anything copied ahead, for it is on the host, nor synced: our files do that.
        super().__init__(directory, sync_files=False, per_thread_copy_ahead=0)
        self.directory = directory
        self.entries: Entries = {}
        self.fs = _HashedFiles(self.entries)

    def storage_meta(self) -> StorageMeta:
        """Nothing: not the directory, which will be renamed, and no random identifiers."""
        return StorageMeta()

    def write_pieces(self, plan: SavePlan, planner: StagedPlanner) -> list[WriteResult]:
        """Write this rank's part of the global plan."""
        if not plan.items:
            return []
        return self.write_data(planner.finish_plan(plan), planner).value()

    def write_index(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write down where all ranks' pieces are."""
        self.finish(metadata, results)
        self.write_text(INDEX, json.dumps(_to_json(metadata)))

    def write_text(self, name: str, text: str) -> None:
        """Write another file."""
        with new_file(self.directory / name, self.entries) as file:
            file.write(text.encode())


class _HashedFiles(FileSystem):
    """DCP's way to the disk, past `manifest.new_file`."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries

    @contextmanager
    def create_stream(self, path: str | PathLike, mode: str) -> Iterator[HashedFile]:  # type: ignore[override]
        """A file that DCP writes, or rather what it needs of one."""
        assert mode == "wb", mode
        with new_file(Path(path), self.entries) as file:
            yield file

    def rename(self, path: str | PathLike, new_path: str | PathLike) -> None:
        """Give a file its name, in the entries too."""
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


def _to_json(metadata: Metadata) -> dict[str, Any]:
    tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
    return {
        name: {
            "dtype": dtype_name(tensor.properties.dtype),
            "shape": list(tensor.size),
            "pieces": [_piece(metadata, name, chunk) for chunk in tensor.chunks],
        }
        for name, tensor in tensors.items()
    }


def _piece(metadata: Metadata, name: str, chunk: ChunkStorageMetadata) -> dict[str, Any]:
    place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
    return {
        "start": list(chunk.offsets),
        "shape": list(chunk.sizes),
        "file": place.relative_path,
        "offset": place.offset,
        "bytes": place.length,
    }
