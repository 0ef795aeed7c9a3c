"""Checkpoints: one directory per step, whole or not there, the same from every engine.

checkpoints/
    step_00000100/
        __0_0.distcp, __1_0.distcp, ...  tensors by canonical name, a file for each rank that wrote
        tensors.json, .metadata          where they are; see `tensor_files`
        state.json                       everything else: step, cursors, config, ...
        manifest.json, COMPLETE          sizes and hashes of the above; see `manifest`
    .step_00000200.*.partial/            being written, or left by a crash; see `partial`
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from conf.errors import DataError
from train.checkpoint import manifest
from train.checkpoint.format import STATE
from train.checkpoint.manifest import Entries
from train.checkpoint.reader import Checkpoint, RejectedCheckpoint, TensorTree, flatten, read_state
from train.checkpoint.staging import HostMemory, StagedPlanner
from train.checkpoint.writer import TensorWriter
from train.distributed.process_groups import ProcessGroups, on_all_ranks, on_rank_zero

T = TypeVar("T")
LIVE_S = 3600.0
"""Seconds after its last file for which an unfinished directory may belong to a live process."""


class CheckpointError(RuntimeError):
    """The disk refused a checkpoint; earlier ones are untouched, and training can go on.

    Attributes:
        saved: the step that is saved nevertheless, where only older ones were not deleted.
    """

    saved: int | None = None


class Saved(NamedTuple):
    """A save that is complete.

    Attributes:
        step: the step that was saved.
        path: the checkpoint's directory.
        save_s: seconds from the call of `save` until it could be relied on.
    """

    step: int
    path: Path
    save_s: float


class CheckpointStore:
    """The checkpoints of one run, in the directory `root` that all its ranks share.

    The newest `keep` stay, and for ever those of steps that are multiples of `keep_every`; while
    one is being written the disk holds one more. Methods are called by all ranks alike.

        training   --| copy |---------- trains on ----------| copy |--
        behind it           | write, fsync, read back, publish, delete old |
    """

    def __init__(
        self, root: Path, *, keep: int, keep_every: int = 0, groups: ProcessGroups | None = None
    ) -> None:
        assert keep >= 1, keep
        self.root = root
        self.keep = keep
        self.keep_every = keep_every
        self.groups = groups or ProcessGroups()
        self._memory = HostMemory()
        self._under_way: Future[Saved] | None = None
        self._thread: Thread | None = None

    def save(self, step: int, tensors: TensorTree, state: Mapping[str, Any]) -> Saved | None:
        """Begin to save `tensors` and the JSON `state` as the checkpoint of `step`.

        It waits for an earlier save that is still under way, copies this rank's tensors to the
        host, and returns; they may change from then on. The rest happens in a thread.

        A checkpoint appears whole, in one rename, after its files have been read back; only then
        are older ones deleted. A whole checkpoint of the same step is kept as it is (a run reaches
        a step in one state only); a damaged one is replaced.

        Args:
            step: optimizer steps taken.
            tensors: what this rank writes: whole tensors, and its DTensors.
            state: the same on all ranks; the first one's is written.

        Returns:
            The save before this one, unless `wait` has told of it.

        Raises:
            CheckpointError: on all ranks, if that one failed; this one has begun nevertheless.
            RuntimeError: a rank has died, or something else that is not the disk's; none has begun.
        """
        start = perf_counter()
        self._finish()
        if self._under_way and not isinstance(self._under_way.exception(), CheckpointError | None):
            return self.wait()  # which raises: another save would wait for a dead rank
        planner = StagedPlanner(flatten(tensors), self._memory)
        text = json.dumps({**state, "step": step}, indent=1)
        earlier = self._under_way
        self._under_way, self._thread = _in_background(
            lambda: self._write(step, planner, text, start)
        )
        return earlier.result() if earlier else None

    def wait(self) -> Saved | None:
        """Wait for the save under way; None if all that were begun have been told of.

        Raises:
            CheckpointError: on all ranks, if it failed.
        """
        self._finish()
        ended, self._under_way = self._under_way, None
        return ended.result() if ended else None

    def close(self) -> None:
        """Wait until nothing is written any more; only `wait` and `save` tell how it ended."""
        self._finish()

    def newest(self) -> Checkpoint | None:
        """Find the newest whole checkpoint, the same on all ranks; None if there are none at all.

        Each rank reads its share of the files. Raises DataError if there are some but all are
        damaged.
        """
        self._finish()
        rejected: tuple[RejectedCheckpoint, ...] = ()
        for path in self.groups.broadcast([path for _, path in self._newest_first()]):
            flaws = self.groups.gather(self._damage(path))
            flaw = next((_seen_by(rank, flaw) for rank, flaw in enumerate(flaws) if flaw), None)
            if flaw is None:
                return Checkpoint(path, read_state(path), rejected)
            rejected += (RejectedCheckpoint(path, flaw),)
        if rejected:
            lines = "".join(f"  {path.name}: {reason}\n" for path, reason in rejected)
            raise DataError(
                f"every checkpoint in {self.root} is damaged:\n{lines}"
                "Restore one of them from a copy, or start anew with run.resume=never."
            )
        return None

    def _finish(self) -> None:
        """Wait for the save under way, whatever becomes of it.

        And for its thread, which lets go of tensors at its end: Python would stop it amid that if
        the process ended then, and C++ would abort the process.
        """
        if self._thread:
            self._thread.join()
            self._thread = None

    def _damage(self, path: Path) -> str | None:
        """What is wrong with this rank's share of a checkpoint."""
        return manifest.damage(path, share=(self.groups.rank, self.groups.world_size))

    def _path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def _newest_first(self) -> list[tuple[int, Path]]:
        """All checkpoints, whole or not, and their steps."""
        names = ((re.fullmatch(r"step_(\d{8,})", path.name), path) for path in self.root.glob("*"))
        return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)

    # Below: in the background, on all ranks together

    def _write(self, step: int, planner: StagedPlanner, state: str, start: float) -> Saved:
        """What becomes of a checkpoint once its tensors are on the host."""
        path, groups = self._path(step), self.groups
        with _told(f"the checkpoint of step {step} could not be written to {self.root}"):
            flaws = on_all_ranks(
                groups, lambda: self._damage(path), lambda flaws: [flaws] * groups.world_size
            )
            if any(flaws):
                self._publish(path, planner, state)
        kept = f"step {step} is saved, but older checkpoints in {self.root} were not deleted"
        with _told(kept, saved=step):
            on_rank_zero(groups, lambda: self._prune(step))
        return Saved(step, path, perf_counter() - start)

    def _publish(self, path: Path, planner: StagedPlanner, state: str) -> None:
        """Write beside, read back, and rename; what fails on a rank leaves nothing behind."""
        partial = on_rank_zero(self.groups, lambda: new_partial(path))
        try:
            self._write_files(partial, planner, state)
            self._read_back(partial)
            on_rank_zero(self.groups, lambda: self._make_visible(partial, path))
        except BaseException:
            if self.groups.is_rank_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write_files(self, partial: Path, planner: StagedPlanner, state: str) -> None:
        writer = TensorWriter(partial)

        def divide(plans: list[SavePlan]) -> list[SavePlan]:
            return writer.prepare_global_plan(planner.create_global_plan(plans)[0])

        plan = on_all_ranks(self.groups, lambda: planner.local_plan, divide)

        def seal(shares: list[tuple[list[WriteResult], Entries]]) -> list[None]:
            writer.write_index(planner.metadata, [results for results, _ in shares])
            writer.write_text(STATE, state)
            for _, entries in shares:
                writer.entries.update(entries)
            manifest.seal(partial, writer.entries)
            return [None] * len(shares)

        on_all_ranks(
            self.groups, lambda: (writer.write_pieces(plan, planner), writer.entries), seal
        )

    def _read_back(self, partial: Path) -> None:
        """Make sure that the disk gives back what it was given, each rank a share of it."""

        def check() -> None:
            if flaw := self._damage(partial):
                raise OSError(f"the disk does not give back what was written: {flaw}")

        on_all_ranks(self.groups, check, lambda done: done)

    def _make_visible(self, partial: Path, path: Path) -> None:
        if path.exists():
            manifest.remove(path)
        partial.rename(path)
        manifest.flush_directory(self.root)

    def _prune(self, step: int) -> None:
        """Of the checkpoints up to `step` leave the whole ones that are to be kept.

        Later ones are damaged, or the run would have gone on from them; training replaces them
        when it reaches them. Hashes are not compared here: that would read everything each time,
        and the newest has just been verified.
        """
        kept = 0
        for its_step, path in self._newest_first():
            if its_step > step:
                continue
            whole = manifest.damage(path, contents=False) is None
            for_ever = self.keep_every and its_step % self.keep_every == 0
            if not whole or (kept >= self.keep and not for_ever):
                manifest.remove(path)
            kept += whole


@contextmanager
def _told(problem: str, saved: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = CheckpointError(f"{problem}: {error}")
        told.saved = saved
        raise told from error


def _seen_by(rank: int, flaw: str) -> str:
    return f"{flaw} (for rank {rank})" if rank else flaw


def _in_background(work: Callable[[], T]) -> tuple[Future[T], Thread]:
    """Do `work` in a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = Thread(target=run, name="checkpoint", daemon=True)
    thread.start()
    return future, thread


# Directories that are being written: .step_00000200.<host>.<process>.<token>.partial. A name is
# used once, so that a rank of a job that is thought dead cannot write into a later job's files.


def new_partial(path: Path) -> Path:
    """Make the directory that will become `path`, after deleting what crashes have left there."""
    owner = f"{gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    partial = path.with_name(f".{path.name}.{owner}.partial")
    partial.mkdir(parents=True)
    now = partial.stat().st_mtime  # by the file system's clock
    for other in path.parent.glob(".step_*.partial"):
        if other != partial and not _may_live(other, now):
            shutil.rmtree(other)
    return partial


def _may_live(partial: Path, now: float) -> bool:
    """Whether the process that writes a directory may still be alive."""
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
        pass  # it is another user's
    return True
