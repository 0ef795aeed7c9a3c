"""Checkpoints: one directory per step, whole or not there, the same from every engine.

checkpoints/
    step_00000100/
        __0_0.distcp, .metadata   tensors by canonical name, by torch.distributed.checkpoint
        state.json                everything else: step, cursors, config, ...
        manifest.json, COMPLETE   sizes and hashes of the above; see `manifest`
    .step_00000200.partial/       being written, or left by a crash
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from train import manifest

TensorTree: TypeAlias = "Mapping[str, Tensor | TensorTree]"

STATE = "state.json"
MISMATCHES_SHOWN = 8


class CheckpointError(RuntimeError):
    """The disk refused a checkpoint; earlier ones are untouched, and training can go on."""


class PassedOver(NamedTuple):
    """A checkpoint that is not whole, and what is wrong with it."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, every byte of which has been verified.

    Attributes:
        path: its directory.
        state: the JSON that was saved with it, and its `step`.
        passed_over: newer checkpoints that are damaged, newest first.
    """

    path: Path
    state: dict[str, Any]
    passed_over: tuple[PassedOver, ...] = ()

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Verify the checkpoint at `path`; a ValueError says what is wrong with it."""
        if flaw := manifest.damage(path):
            raise ValueError(f"{path} is not a whole checkpoint: {flaw}. Choose another one.")
        return cls(path, _read_state(path))

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return self.state["step"]

    def load(self, tensors: TensorTree) -> None:
        """Fill `tensors` in place with the saved ones, bit for bit.

        Names, shapes and dtypes must all be the saved ones; a ValueError lists those that are not,
        and then nothing has been changed.
        """
        wanted = flatten(tensors)
        if mismatches := _mismatches(_specs(self.path), wanted):
            raise ValueError(_mismatch_message(self.path, mismatches))
        _read_tensors(self.path, wanted)

    def load_weights(self) -> dict[str, Tensor]:
        """Read what was saved under `model`, and nothing else, into new tensors on the CPU."""
        weights = {
            name: torch.empty(spec.shape, dtype=spec.dtype)
            for name, spec in _specs(self.path).items()
            if name.startswith("model.")
        }
        _read_tensors(self.path, weights)
        return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


class CheckpointStore:
    """The checkpoints of one run, in the directory `root`; the newest `keep` stay.

    While one is being written the disk holds `keep + 1`.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        assert keep >= 1, keep
        self.root = root
        self.keep = keep

    def save(self, step: int, tensors: TensorTree, state: Mapping[str, Any]) -> Path:
        """Write `tensors` and the JSON `state` as the checkpoint of `step`; return its directory.

        It appears whole, in one rename; only then are the oldest deleted. A whole checkpoint of
        the same step is kept as it is (a run reaches a step in one state only); a damaged one is
        replaced. Raises CheckpointError if the disk refuses.
        """
        path = self._path(step)
        text = json.dumps({**state, "step": step}, indent=1)
        if manifest.damage(path) is not None:
            with _told(f"the checkpoint of step {step} could not be written to {self.root}"):
                self._publish(path, flatten(tensors), text)
        with _told(f"step {step} is saved, but older checkpoints in {self.root} were not deleted"):
            self._prune(step)
        return path

    def newest(self) -> Checkpoint | None:
        """Find the newest whole checkpoint; None if there are none at all.

        Raises ValueError if there are some but all are damaged.
        """
        passed_over: tuple[PassedOver, ...] = ()
        for _, path in self._newest_first():
            flaw = manifest.damage(path)
            if flaw is None:
                return Checkpoint(path, _read_state(path), passed_over)
            passed_over += (PassedOver(path, flaw),)
        if passed_over:
            lines = "".join(f"  {path.name}: {reason}\n" for path, reason in passed_over)
            raise ValueError(
                f"every checkpoint in {self.root} is damaged:\n{lines}"
                "Restore one of them from a copy, or start anew with run.resume=never."
            )
        return None

    def _path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def _newest_first(self) -> list[tuple[int, Path]]:
        """All checkpoints, whole or not, and their steps."""
        names = ((re.fullmatch(r"step_(\d{8,})", path.name), path) for path in self.root.glob("*"))
        return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)

    def _publish(self, path: Path, tensors: dict[str, Tensor], state: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        partial = self.root / f".{path.name}.partial"
        try:
            _write_tensors(partial, tensors)
            manifest.write_durably(partial / STATE, state)
            manifest.seal(partial)
            if path.exists():
                manifest.remove(path)
            partial.rename(path)
            manifest.flush_directory(self.root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _prune(self, step: int) -> None:
        """Of the checkpoints up to `step` leave the newest `keep` whole ones.

        Later ones are damaged, or the run would have gone on from them; training replaces them
        when it reaches them. Hashes are not compared here: that would read everything each time.
        """
        whole = 0
        for path in (path for its_step, path in self._newest_first() if its_step <= step):
            if whole < self.keep and manifest.damage(path, contents=False) is None:
                whole += 1
            else:
                manifest.remove(path)


def flatten(tree: TensorTree) -> dict[str, Tensor]:
    """Join the keys of nested dicts with dots.

    >>> list(flatten({"model": {"embed.weight": torch.zeros(2)}, "rng": torch.zeros(1)}))
    ['model.embed.weight', 'rng']
    """
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        leaves = {"": value} if isinstance(value, Tensor) else flatten(value)
        for name, tensor in leaves.items():
            full_name = f"{key}.{name}" if name else key
            assert full_name not in flat, f"two tensors are called {full_name}"
            flat[full_name] = tensor
    return flat


class _Spec(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def _read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def _specs(path: Path) -> dict[str, _Spec]:
    """Read what a verified checkpoint holds; DCP keeps that as a pickle."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    saved = cast(dict[str, TensorStorageMetadata], metadata)  # `flatten` lets in tensors alone
    return {name: _Spec(entry.properties.dtype, entry.size) for name, entry in saved.items()}


def _mismatches(saved: dict[str, _Spec], wanted: dict[str, Tensor]) -> list[str]:
    needed = {name: _Spec(tensor.dtype, tensor.shape) for name, tensor in wanted.items()}
    return [
        f"{name}: {saved.get(name, 'nothing')} in the checkpoint, "
        f"{needed.get(name, 'nothing')} in this run"
        for name in sorted(saved.keys() | needed.keys())
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


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with _plain_dcp():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path, sync_files=False))


def _read_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with _plain_dcp():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path))


@contextmanager
def _plain_dcp() -> Iterator[None]:
    """Raise DCP's errors as what they are, and do without its warning that there is one process.

    DCP wraps every exception, KeyboardInterrupt too, in a BaseException of its own; and in it
    `torch.save` buries a disk's OSError under a RuntimeError about its position in the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as wrapped:
        first, _ = next(iter(wrapped.failures.values()))
        error: BaseException | None = first
        while error and not isinstance(error, OSError):
            error = error.__cause__ or error.__context__
        raise (error or first) from None


@contextmanager
def _told(problem: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{problem}: {error}") from error
