"""Profiles a window of steps: `train.profile`, `profile_start` and `profile_steps`.

Before the window and after it the loop pays for two comparisons of integers in a step, and nothing
waits for the device.
"""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from datetime import date
from pathlib import Path
from time import perf_counter
from types import TracebackType

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from conf.errors import reason_of
from train.console import print_line, warn
from train.engines.engine import Engine
from train.profiling.breakdown import breakdown, table
from train.settings.train import TrainConfig
from train.torch_private import record_memory_history, stop_memory_history, write_memory_snapshot

TRACE, MEMORY, TABLE = "trace.json.gz", "memory.pickle", "step.md"


class ProfileWindow:
    """Writes the profile of the steps from `train.profile_start` on into a folder, on rank 0.

        trace.json.gz   every operator and kernel, for https://ui.perfetto.dev
        memory.pickle   every allocation on CUDA, for https://docs.pytorch.org/memory_viz
        step.md         where the time of a step goes

    The loop enters it as a context, and tells it when a step begins and ends. A window that is cut
    short, by a signal or an error, is written with the steps that it has.

    Args:
        step: steps that are done; a window that is past by then is told.
    """

    def __init__(
        self, config: TrainConfig, engine: Engine, folder: Path, console: Console, step: int
    ) -> None:
        self.steps = config.profiled_steps if engine.groups.is_rank_zero else range(0)
        self.engine, self.folder, self.console, self.step = engine, folder, console, step
        self.profiler: profile | None = None
        self.done: list[int] = []
        self.started = self.seconds = 0.0
        self.text: str | None = None

    def __enter__(self) -> "ProfileWindow":
        if self.steps and self.step >= self.steps[-1]:
            past = f"train.profile: the run goes on after {_named(self.steps)}"
            warn(self.console, f"{past}; to profile later ones, raise train.profile_start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write a window that is still open, and print the table."""
        if self.profiler is not None:
            # A device that has failed fails again; the first error is the one to tell.
            with suppress(RuntimeError) if error else nullcontext():
                self._stop()
        if self.text is not None:
            print_line(self.console, self.text)

    def begin(self, step: int) -> None:
        """A step is about to begin."""
        if step in self.steps and self.profiler is None and self.text is None:
            self._start()

    def end(self, step: int) -> None:
        """A step has been queued whole."""
        if self.profiler is None:
            return
        self.done.append(step)
        if step == self.steps[-1]:
            self._stop()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.engine.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            record_memory_history()
        self.profiler = profile(activities=activities)
        self.engine.synchronize()  # what was queued before does not count
        self.profiler.start()
        self.started = perf_counter()

    def _stop(self) -> None:
        """Wait for the last step, and write all files. A full disk costs the profile alone."""
        profiler, self.profiler = self.profiler, None
        assert profiler is not None
        self.engine.synchronize()
        self.seconds = perf_counter() - self.started
        profiler.stop()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(profiler)
        except OSError as error:
            warn(self.console, f"no profile in {self.folder}: {reason_of(error)}")
        finally:
            if self.engine.device.type == "cuda":
                stop_memory_history()

    def _write(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.folder / TRACE))
        if self.engine.device.type == "cuda":
            write_memory_snapshot(self.folder / MEMORY)
        if not self.done:  # a signal came within the first step
            return
        steps = _named(self.done)
        found = breakdown(profiler.events() or (), len(self.done), self.seconds)
        self.text = (
            f"Where the time of a step goes: {steps}, {self._conditions()}\n\n{table(found)}"
        )
        (self.folder / TABLE).write_text(self.text + "\n", encoding="utf-8")
        self.console.print(f"profile of {steps}: {self.folder}", markup=False)

    def _conditions(self) -> str:
        """Device, version and date, without which no time means anything."""
        device = self.engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return f"{name}, torch {torch.__version__}, {date.today()}"


def _named(steps: Sequence[int]) -> str:
    """Steps in words.

    >>> _named([11, 12, 13]), _named([7])
    ('steps 11 to 13', 'step 7')
    """
    return f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
