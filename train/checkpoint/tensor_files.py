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
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    SavePlan,
)
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from train.checkpoint.manifest import Entries, HashedFile, new_file
from train.checkpoint.staging import StagedPlanner

INDEX = "tensors.json"


class TensorSpec(NamedTuple):
    """What kind of tensor a name stands for."""

    dtype: torch.dtype
    shape: torch.Size

    def __str__(self) -> str:
        return f"{_dtype_name(self.dtype)} {list(self.shape)}"


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


def read_index(directory: Path) -> Metadata:
    """Read where the tensors of a verified directory are."""
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    tensors, storage = {}, {}
    for name, entry in index.items():
        chunks = []
        for number, piece in enumerate(entry["pieces"]):
            start, shape = torch.Size(piece["start"]), torch.Size(piece["shape"])
            chunks.append(ChunkStorageMetadata(start, shape))
            place = _StorageInfo(piece["file"], piece["offset"], piece["bytes"])
            storage[MetadataIndex(name, start, number)] = place
        properties = TensorProperties(_dtype_named(entry["dtype"]))
        tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(cast(Any, tensors), storage_data=storage)


def specs_in(metadata: Metadata) -> dict[str, TensorSpec]:
    """What the tensors are, by name."""
    tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
    return {name: TensorSpec(t.properties.dtype, t.size) for name, t in tensors.items()}


def read_tensors(directory: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place, from the pieces that overlap with what this rank holds of them."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader = FileSystemReader(directory)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def _to_json(metadata: Metadata) -> dict[str, Any]:
    tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
    return {
        name: {
            "dtype": _dtype_name(tensor.properties.dtype),
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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{INDEX} names a dtype {name!r}, which this torch does not know")
    return dtype
