"""Reading a checkpoint: verified, by name, into tensors that may be sharded in any way.

A checkpoint cannot run code when it is read: the index is JSON, and DCP reads the tensors by
`torch.load(weights_only=True)`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from conf.errors import ConfigError, DataError
from phd.block import is_old_hybrid
from phd.config import ModelConfig
from train.checkpoint import manifest
from train.checkpoint.format import INDEX, STATE, TOKENIZER, TensorSpec, dtype_named
from train.torch_private import StorageInfo

TensorTree: TypeAlias = "Mapping[str, Tensor | TensorTree]"

Index: TypeAlias = dict[str, dict[str, Any]]
"""What `tensors.json` holds; see `format.INDEX`."""

OLD_HYBRID = (
    "{path} is of the old form of model.norm={norm}, which normalised whole projections of "
    "queries, keys and values. HybridNorm normalises each head, so these weights would compute "
    "something else. Use them with the code that trained them, which is in source/ of the run's "
    "directory. To train again, choose another run.name or run.dir, or run.resume=never"
)

MISMATCHES_SHOWN = 8
"""Tensors that an error lists; a wrong model can have thousands."""


class RejectedCheckpoint(NamedTuple):
    """A damaged checkpoint, and what is wrong with it."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. Every byte of it has been verified.

    Attributes:
        path: its directory.
        state: the JSON that was saved with it, including its `step`.
        rejected: damaged checkpoints that are newer than this one, newest first.
    """

    path: Path
    state: dict[str, Any]
    rejected: tuple[RejectedCheckpoint, ...] = ()

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Verify the checkpoint at `path`.

        Raises:
            DataError: it is damaged.
        """
        if flaw := manifest.damage(path):
            raise DataError(f"{path} is not a complete checkpoint: {flaw}. Choose another one.")
        return cls(path, read_state(path))

    def refuse_old_form(self, config: ModelConfig) -> None:
        """Make sure that the weights mean what a model with this config computes from them.

        Raises:
            ConfigError: they are of a norm wiring that has changed since.
        """
        shapes = {name.removeprefix("model."): spec.shape for name, spec in self.specs.items()}
        if is_old_hybrid(config, shapes):
            raise ConfigError([OLD_HYBRID.format(path=self.path, norm=config.norm)])

    @property
    def step(self) -> int:
        """The number of optimizer steps that the model has taken."""
        return self.state["step"]

    @property
    def tokenizer_path(self) -> Path | None:
        """The run's SentencePiece model; None in a checkpoint of an earlier version."""
        path = self.path / TOKENIZER
        return path if path.exists() else None

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The dtype and shape of every tensor in the checkpoint, by name."""
        return {
            name: TensorSpec(dtype_named(entry["dtype"]), torch.Size(entry["shape"]))
            for name, entry in self._index.items()
        }

    def load(self, tensors: TensorTree) -> None:
        """Overwrite `tensors` in place with the saved ones, bit for bit.

        Each rank reads for itself, and reads only the saved pieces that overlap with its shards.

        Args:
            tensors: whole tensors or DTensors of any placement. Their names, shapes and dtypes must
                be the saved ones. Only `random` tensors may be missing on either side; they keep
                their values then.

        Raises:
            ConfigError: lists the tensors that do not fit. None has been changed.
        """
        self.check(tensors)
        # A checkpoint of a CPU run has no generator state for CUDA, and the other way round.
        wanted = flatten(tensors).items()
        self._read({name: tensor for name, tensor in wanted if name in self.specs})

    def check(self, tensors: TensorTree) -> None:
        """Raise the ConfigError of `load` if `tensors` do not fit; they may be meta tensors."""
        if mismatches := _mismatches(self.specs, flatten(tensors)):
            raise ConfigError([_mismatch_message(self.path, mismatches)])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors into new tensors on the CPU.

        One name at a time needs the memory of one tensor only.
        """
        tensors = {
            name: torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
            for name in names
        }
        self._read(tensors)
        return tensors

    def load_weights(self) -> dict[str, Tensor]:
        """Read the weights, without the optimizer's state, into new tensors on the CPU."""
        weights = self.read(name for name in self.specs if name.startswith("model."))
        return {name.removeprefix("model."): tensor for name, tensor in weights.items()}

    @cached_property
    def _index(self) -> Index:
        return json.loads((self.path / INDEX).read_text(encoding="utf-8"))

    def _read(self, tensors: dict[str, Tensor]) -> None:
        read_tensors(self.path, metadata_for(self._index, tensors), tensors)


def metadata_for(index: Index, tensors: Mapping[str, Tensor]) -> Metadata:
    """The pieces of an index that overlap with this rank's shards, as the metadata that DCP uses.

    A checkpoint of 1,024 ranks has a piece of every rank for each tensor, and a rank of as many
    reads one of them. DCP's objects for all pieces would take gigabytes on a machine, and seconds.
    """
    wanted, storage = {}, {}
    for name, tensor in tensors.items():
        entry, own = index[name], _boxes_of(tensor)
        chunks: list[ChunkStorageMetadata] = []
        for piece in entry["pieces"]:
            start, shape = piece["start"], piece["shape"]
            if not any(_overlap(start, shape, *box) for box in own):
                continue
            # Each piece is found by its offset in the tensor, its number, and the tensor's name.
            found = MetadataIndex(name, torch.Size(start), len(chunks))
            storage[found] = StorageInfo(piece["file"], piece["offset"], piece["bytes"])
            chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(shape)))
        properties = TensorProperties(dtype_named(entry["dtype"]))
        wanted[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(cast(Any, wanted), storage_data=storage)


def _boxes_of(tensor: Tensor) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Where this rank's parts of a tensor begin in it, and their shapes."""
    if not isinstance(tensor, DTensor):
        return [([0] * tensor.dim(), tensor.shape)]
    return [(chunk.offsets, chunk.sizes) for chunk in tensor.__create_chunk_list__()]


def _overlap(
    start: Sequence[int], shape: Sequence[int], start_2: Sequence[int], shape_2: Sequence[int]
) -> bool:
    """Whether two boxes have a number in common; both are the same where they have no dims."""
    dims = range(len(start))
    return all(
        start[d] < start_2[d] + shape_2[d] and start_2[d] < start[d] + shape[d] for d in dims
    )


def read_tensors(directory: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    """Overwrite tensors in place, from the saved pieces that overlap with this rank's shards."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # Every rank plans alone, as if it were the coordinator: `dcp.load` would gather all plans, and
    # reading needs no agreement.
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader = FileSystemReader(directory)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def flatten(tree: TensorTree) -> dict[str, Tensor]:
    """Join the keys of nested dicts with dots.

    >>> list(flatten({"model": {"embed.weight": torch.zeros(2)}, "rng": torch.zeros(1)}))
    ['model.embed.weight', 'rng']
    """
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        entries = {"": value} if isinstance(value, Tensor) else flatten(value)
        for name, tensor in entries.items():
            full_name = f"{key}.{name}" if name else key
            assert full_name not in flat, f"two tensors are called {full_name}"
            flat[full_name] = tensor
    return flat


def read_state(path: Path) -> dict[str, Any]:
    """Read the JSON of a verified checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def _mismatches(saved: dict[str, TensorSpec], wanted: dict[str, Tensor]) -> list[str]:
    needed = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in wanted.items()}
    # Generator states: a run on another kind of device has others.
    optional = {name for name in saved.keys() ^ needed.keys() if name.startswith("random.")}
    return [
        f"{name}: {saved.get(name, 'nothing')} in the checkpoint, "
        f"{needed.get(name, 'nothing')} in this run"
        for name in sorted((saved.keys() | needed.keys()) - optional)
        if saved.get(name) != needed.get(name)
    ]


def _mismatch_message(path: Path, mismatches: list[str]) -> str:
    lines = "".join(f"  {line}\n" for line in mismatches[:MISMATCHES_SHOWN])
    if (rest := len(mismatches) - MISMATCHES_SHOWN) > 0:
        lines += f"  and {rest} more\n"
    return (
        f"{path} is of another model; {len(mismatches)} of its tensors do not fit this run:\n"
        f"{lines}Choose another run.name or run.dir, give the settings that it was trained with, "
        "or start anew with run.resume=never."
    )
