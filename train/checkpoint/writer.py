"""Writing a checkpoint's tensors, in the format of torch.distributed.checkpoint (DCP).

    __<rank>_0.distcp  the pieces that a rank wrote
    tensors.json       the index: where each tensor's pieces are
    .metadata          the same index as DCP pickles it, for DCP's own tools

This project reads only tensors.json, because unpickling .metadata could run code.
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
    SavePlanner,
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


class TensorWriter(FileSystemWriter):
    """Writes tensors into an existing directory, and collects the files' hashes in `entries`."""

    def __init__(self, directory: Path) -> None:
        # DCP copies tensors ahead to overlap with writing, but these are on the host already. It
        # need not sync the files, because `new_file` does.
        super().__init__(directory, sync_files=False, per_thread_copy_ahead=0)
        self.directory = directory
        self.entries: Entries = {}
        self.fs = _HashedFiles(self.entries)

    def storage_meta(self) -> StorageMeta:
        """Return empty metadata.

        DCP's own has the directory, which is renamed later, and a random id, which would make two
        checkpoints of the same state differ.
        """
        return StorageMeta()

    def write_pieces(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        """Write this rank's part of the global plan; return where it is."""
        # DCP would write an empty file.
        if not plan.items:
            return []
        return self.write_data(planner.finish_plan(plan), planner).value()

    def write_index(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index of the pieces of all ranks."""
        self.finish(metadata, results)
        self.write_file(INDEX, json.dumps(_to_json(metadata)).encode())

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file that holds no tensors."""
        with new_file(self.directory / name, self.entries) as file:
            file.write(content)


class _HashedFiles(FileSystem):
    """The file system that DCP writes through. It opens files by `manifest.new_file`."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries

    @contextmanager
    def create_stream(self, path: str | PathLike, mode: str) -> Iterator[HashedFile]:  # type: ignore[override]
        """A file for DCP. `HashedFile` has the methods of a file that DCP calls."""
        assert mode == "wb", mode
        with new_file(Path(path), self.entries) as file:
            yield file

    def rename(self, path: str | PathLike, new_path: str | PathLike) -> None:
        """Rename a file, also in the entries."""
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


# `start` and `shape` describe a piece as a box within its tensor. `offset` and `bytes` say where in
# `file` its `torch.save` is.
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
    location = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
    return {
        "start": list(chunk.offsets),
        "shape": list(chunk.sizes),
        "file": location.relative_path,
        "offset": location.offset,
        "bytes": location.length,
    }
