"""The checkpoints of a run: one directory per step, complete or absent.

checkpoints/
    step_00000100/
        __0_0.distcp, __1_0.distcp, ...  tensors by canonical name, one file per rank
        tensors.json, .metadata          the index of the tensors; see writer.py
        state.json                       everything else: step, cursors, config, ...
        tokenizer.model                  the run's own; absent in checkpoints of earlier versions
        manifest.json, COMPLETE          sizes and hashes of the files above; see manifest.py
    .step_00000200.*.partial/            is being written, or was left by a crash
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from threading import Thread
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from conf.errors import DataError, reason_of
from data.storage.atomic import flush_names
from train.checkpoint import manifest
from train.checkpoint.format import STATE
from train.checkpoint.manifest import Entries
from train.checkpoint.reader import Checkpoint, RejectedCheckpoint, TensorTree, flatten, read_state
from train.checkpoint.staging import HostMemory, StagedPlanner
from train.checkpoint.writer import TensorWriter
from train.distributed.process_groups import (
    ProcessGroups,
    deal_to_ranks,
    on_all_ranks,
    on_rank_zero,
    raise_on_all_ranks,
)

T = TypeVar("T")
ANEW = "Restore one of them from a copy, or start anew with run.resume=never."
LIVE_S = 3600.0
"""Seconds after its last change from which an unfinished directory is deleted in any case."""


class CheckpointError(RuntimeError):
    """The disk refused a checkpoint. Earlier ones are intact, and training can go on.

    Attributes:
        saved: the step of the save if it is complete, and only deleting older ones failed.
    """

    saved: int | None = None


class Saved(NamedTuple):
    """A complete save.

    Attributes:
        step: the step that was saved.
        path: the checkpoint's directory.
        save_s: seconds from the call of `save` until the checkpoint was complete on the disk.
    """

    step: int
    path: Path
    save_s: float


class CheckpointStore:
    """The checkpoints of one run, in a directory `root` that all its ranks share.

    It keeps the newest `keep` checkpoints, those of all steps that are multiples of `keep_every`,
    and those of `keep_steps`. While one is written, the disk holds one more. Every method is
    collective: all ranks call it in the same order.

        training   --| copy |---------- trains on ----------| copy |--
        thread              | write, fsync, read back, rename, delete old |
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        keep_every: int = 0,
        keep_steps: Collection[int] = (),
        groups: ProcessGroups | None = None,
    ) -> None:
        assert keep >= 1, keep
        self.root = root
        self.keep = keep
        self.keep_every = keep_every
        self.keep_steps = frozenset(keep_steps)
        self.groups = groups or ProcessGroups()
        self._memory = HostMemory()
        self._pending: Future[Saved] | None = None
        self._thread: Thread | None = None

    def save(
        self,
        step: int,
        tensors: TensorTree,
        state: Mapping[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Saved | None:
        """Begin to save `tensors` and the JSON `state` as the checkpoint of `step`.

        This waits until the save before it is complete, copies this rank's tensors to the host,
        and returns. The tensors may change then. A thread does the rest.

        The files are written to a hidden directory and read back; one rename makes the checkpoint
        visible; only then are older ones deleted. If a complete checkpoint of this step exists, it
        stays, because a run reaches a step in one state only. A damaged one is replaced.

        Args:
            step: optimizer steps taken.
            tensors: whole tensors of this rank, and its shards as DTensors.
            state: what rank 0 writes; that of other ranks does not matter.
            files: small ones to keep with it, by name; rank 0 writes them.

        Returns:
            The save before this one, unless `wait` has returned it already.

        Raises:
            CheckpointError: on all ranks, if the save before failed. This one has begun.
            RuntimeError: a rank has died, or the save before failed for a reason other than the
                disk. This one has not begun.
        """
        start = perf_counter()
        self._finish()
        if self._pending and not isinstance(self._pending.exception(), CheckpointError | None):
            return self.wait()  # raises; a new save would wait for the dead rank
        planner = StagedPlanner(flatten(tensors), self._memory)
        texts = dict(files)
        if self.groups.is_rank_zero:
            texts[STATE] = json.dumps({**state, "step": step}, indent=1).encode()
        before = self._pending
        self._pending, self._thread = _in_background(
            lambda: self._write(step, planner, texts, start)
        )
        return before.result() if before else None

    def wait(self) -> Saved | None:
        """Wait for the pending save and return it; None if there is none.

        Raises:
            CheckpointError: on all ranks, if it failed.
        """
        self._finish()
        ended, self._pending = self._pending, None
        return ended.result() if ended else None

    def close(self) -> None:
        """Wait until nothing is being written. `wait` and `save` report how the save ended."""
        self._finish()

    def newest(self, otherwise: str = ANEW, *, up_to: int | None = None) -> Checkpoint | None:
        """Find the newest complete checkpoint, the same on all ranks; None without any.

        The files are divided among the ranks, so that each verifies an equal number of them.

        Args:
            otherwise: what to do if all are damaged.
            up_to: the latest step that is looked at; None: any.

        Raises:
            DataError: there are checkpoints, but all are damaged.
        """
        self._finish()
        rejected: tuple[RejectedCheckpoint, ...] = ()
        for path in self._found(up_to):
            flaws = self.groups.gather_on_rank_zero(self._damage(path)) or []
            flaw = next((_flaw_on(rank, flaw) for rank, flaw in enumerate(flaws) if flaw), None)
            flaw = self.groups.broadcast(flaw)
            if flaw is None:
                return Checkpoint(path, read_state(path), rejected)
            rejected += (RejectedCheckpoint(path, flaw),)
        if rejected:
            lines = "".join(f"  {path.name}: {reason}\n" for path, reason in rejected)
            raise DataError(f"every checkpoint in {self.root} is damaged:\n{lines}{otherwise}")
        return None

    def _finish(self) -> None:
        """Wait for the pending save, also if it fails."""
        # The thread is joined, because it frees tensors after its last result. If the process ended
        # in that moment, Python would stop the daemon thread and C++ would abort the process:
        # "terminate called without an active exception", seen twice in tests under load.
        if self._thread:
            self._thread.join()
            self._thread = None

    def _found(self, up_to: int | None) -> list[Path]:
        """All checkpoints, newest first, as rank 0 sees them: a shared disk is listed once."""

        def look() -> list[Path]:
            steps = self._newest_first() if self.groups.is_rank_zero else []
            return [path for step, path in steps if up_to is None or step <= up_to]

        return self.groups.broadcast(raise_on_all_ranks(self.groups, look))

    def _damage(self, path: Path) -> str | None:
        """Check this rank's part of the files; return what is wrong with them, or None."""
        return manifest.damage(path, shard=(self.groups.rank, self.groups.world_size))

    def _path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def _newest_first(self) -> list[tuple[int, Path]]:
        """The steps and directories of all checkpoints, complete or damaged."""
        names = ((re.fullmatch(r"step_(\d{8,})", path.name), path) for path in self.root.glob("*"))
        return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)

    # The methods below run in the background thread, on all ranks together.

    def _write(
        self, step: int, planner: StagedPlanner, files: Mapping[str, bytes], start: float
    ) -> Saved:
        """Publish a checkpoint whose tensors are on the host, and delete old ones."""
        path, groups = self._path(step), self.groups
        with _as_checkpoint_error(
            f"the checkpoint of step {step} could not be written to {self.root}"
        ):
            # A missing checkpoint is damaged, too: its marker is missing.
            if on_all_ranks(groups, lambda: self._damage(path), any):
                self._publish(path, planner, files)
        kept = f"step {step} is saved, but older checkpoints in {self.root} were not deleted"
        with _as_checkpoint_error(kept, saved=step):
            on_rank_zero(groups, lambda: self._prune(step))
        return Saved(step, path, perf_counter() - start)

    def _publish(self, path: Path, planner: StagedPlanner, files: Mapping[str, bytes]) -> None:
        """Write a hidden directory, read it back, and rename it; delete it if any rank fails."""
        partial = on_rank_zero(self.groups, lambda: new_partial(path))
        try:
            self._write_files(partial, planner, files)
            self._read_back(partial)
            on_rank_zero(self.groups, lambda: self._make_visible(partial, path))
        except BaseException:
            if self.groups.is_rank_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write_files(
        self, partial: Path, planner: StagedPlanner, files: Mapping[str, bytes]
    ) -> None:
        writer = TensorWriter(partial)

        def make_global_plan(plans: list[SavePlan]) -> list[SavePlan]:
            return writer.prepare_global_plan(planner.create_global_plan(plans)[0])

        plan = deal_to_ranks(self.groups, lambda: planner.local_plan, make_global_plan)

        def seal(written: list[tuple[list[WriteResult], Entries]]) -> None:
            writer.write_index(planner.metadata, [results for results, _ in written])
            for name, content in files.items():
                writer.write_file(name, content)
            for _, entries in written:
                writer.entries.update(entries)
            manifest.seal(partial, writer.entries)

        on_all_ranks(
            self.groups, lambda: (writer.write_pieces(plan, planner), writer.entries), seal
        )

    def _read_back(self, partial: Path) -> None:
        """Compare what is on the disk with the hashes; the files are divided among the ranks."""

        def check() -> None:
            if flaw := self._damage(partial):
                raise OSError(f"the disk does not give back what was written: {flaw}")

        on_all_ranks(self.groups, check, lambda _: None)

    def _make_visible(self, partial: Path, path: Path) -> None:
        if path.exists():
            manifest.remove(path)
        partial.rename(path)
        flush_names(self.root)
        flush_names(self.root.parent)  # the first checkpoint has made `root`

    def _prune(self, step: int) -> None:
        """Delete the checkpoints up to `step` that are damaged or need not be kept.

        Checkpoints of later steps are damaged; otherwise the run would have resumed from them.
        Training replaces them when it reaches their steps.
        """
        # Only sizes are compared: comparing hashes would read all checkpoints after every save, and
        # the newest has just been read back.
        kept = 0
        for saved, path in self._newest_first():
            if saved > step:
                continue
            complete = manifest.damage(path, contents=False) is None
            permanent = saved in self.keep_steps or (
                self.keep_every and saved % self.keep_every == 0
            )
            if not complete or (kept >= self.keep and not permanent):
                manifest.remove(path)
            kept += complete


@contextmanager
def _as_checkpoint_error(problem: str, saved: int | None = None) -> Iterator[None]:
    """Raise an OSError as a CheckpointError. Other errors pass: they are not the disk's."""
    try:
        yield
    except OSError as error:
        failure = CheckpointError(f"{problem}: {reason_of(error)}")
        failure.saved = saved
        raise failure from error


def _flaw_on(rank: int, flaw: str) -> str:
    """A flaw with the rank that found it; rank 0 is left out, as most runs have one rank."""
    return f"{flaw} (for rank {rank})" if rank else flaw


def _in_background(work: Callable[[], T]) -> tuple[Future[T], Thread]:
    """Run `work` in a daemon thread, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = Thread(target=run, name="checkpoint", daemon=True)
    thread.start()
    return future, thread


# Unfinished directories are called .step_00000200.<host>.<process>.<token>.partial. The token makes
# a name unique. So a rank of an earlier job that seems dead, but only hangs, cannot write into the
# files of a later job.


def new_partial(path: Path) -> Path:
    """Make the directory that will be renamed to `path`; delete those that crashes have left."""
    owner = f"{gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.name}.{owner}.partial")
    partial.mkdir(parents=True)
    now = partial.stat().st_mtime  # the file server's clock may differ from this machine's
    for other in path.parent.glob(".step_*.partial"):
        if other != partial and not _may_live(other, now):
            shutil.rmtree(other)
    return partial


def _may_live(partial: Path, now: float) -> bool:
    """Whether the process that wrote an unfinished directory may still be alive."""
    owner = re.fullmatch(r"\.step_\d+\.(.+)\.(\d+)\.\w+\.partial", partial.name)
    if owner is None or partial.stat().st_mtime < now - LIVE_S:
        return False
    host, process = owner[1], int(owner[2])
    return host != gethostname() or (process != os.getpid() and _runs(process))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # the process exists and belongs to another user
    return True
