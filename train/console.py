"""What commands print: warnings, lines of a log, and progress bars."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from math import isfinite
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from conf.redaction import redacted

LOG = "console.log"
"""What a run prints that runs side by side with others; in its directory."""

INDENT = "    "
"""Before the rest of a line that a terminal is too narrow for."""

KEPT_LOSSES = 512
"""Losses that a curve is drawn from; of a longer run every second one is kept, or fewer."""

CURVE = "▁▂▃▄▅▆▇█"
LONGEST_CURVE, LONGEST_BAR, SHORTEST = 20, 40, 6
"""Characters of the curve and of the bar; below `SHORTEST` they are left out."""


def warn(console: Console, text: str) -> None:
    """Print a warning, whatever is in it: errors may hold what looks like markup, or a secret."""
    # A terminal would break the line within a word; in a file, it stays one line.
    soft_wrap = not console.is_terminal
    console.print(redacted(text), style="yellow", markup=False, soft_wrap=soft_wrap)


def print_line(console: Console, text: str) -> None:
    """Print a line of a log; a terminal that is too narrow for it gets it in several."""
    if console.is_terminal and "\n" not in text:  # a text of many lines is as its author wrote it
        text = fold(text, console.width)
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def fold(text: str, width: int) -> str:
    """Break a line between its items, which two spaces separate, and a longer item between words.

    >>> print(fold("step 20/300  loss 3.210  5,123 tokens/s", 25))
    step 20/300  loss 3.210
        5,123 tokens/s
    """
    folded, column = "", 0
    for item in text.split("  "):
        words = [item] if len(item) <= width - len(INDENT) else item.split(" ")
        for number, word in enumerate(words):
            space = "" if not folded else " " if number else "  "
            if column and column + len(space) + len(word) > width:
                folded, column, space = f"{folded}\n{INDENT}", len(INDENT), ""
            folded += space + word
            column += len(space) + len(word)
    return folded


def progress_bar(console: Console, status: str) -> Progress:
    """A progress bar that is shown in a terminal only, and is gone at the end.

    Args:
        status: text behind the bar, with the task's fields in it: `{task.fields[tokens]:,} tokens`.
    """
    return _progress(
        console,
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn(status),
    )


def training_progress(console: Console) -> Progress:
    """The progress of a `TrainingBar`; like `progress_bar`, with a line of its own."""
    return _progress(console, _TrainingColumn())


def _progress(console: Console, *columns: ProgressColumn) -> Progress:
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class TrainingBar:
    """The line below a training's log: how far it is, how long it takes, how the loss falls.

    Args:
        progress: as `training_progress` makes it.
        step, total: steps that are done, and in all; None: the run's length is not in steps.
        max_time: seconds that the training may take; None: any number.
    """

    def __init__(
        self, progress: Progress, step: int, total: int | None, max_time: float | None = None
    ) -> None:
        self.progress = progress
        self.losses: list[float] = []
        self._reports, self._stride = 0, 1
        self._task = progress.add_task(
            "training", total=total, completed=step, max_time=max_time, shown=Shown()
        )

    def update(self, step: int, metrics: dict[str, float | str]) -> None:
        """Show a step that is done, and what was measured after it."""
        self.progress.update(self._task, completed=step)
        loss, speed = metrics.get("train/loss"), metrics.get("throughput/tokens_per_s")
        if isinstance(loss, float) and isinstance(speed, float):
            self._keep(loss)
            self.progress.update(self._task, shown=Shown(speed, loss, tuple(self.losses)))

    def _keep(self, loss: float) -> None:
        if isfinite(loss) and self._reports % self._stride == 0:
            self.losses.append(loss)
        self._reports += 1
        if len(self.losses) > KEPT_LOSSES:
            self.losses, self._stride = self.losses[::2], 2 * self._stride


@dataclass(frozen=True)
class Shown:
    """What the line of a training shows of the last report; None before the first one."""

    tokens_per_s: float | None = None
    loss: float | None = None
    losses: tuple[float, ...] = ()


class _TrainingColumn(ProgressColumn):
    """The whole line, so that what matters most is never cut."""

    def render(self, task: Task) -> "_TrainingLine":
        """The line of a task; it learns its width when it is drawn."""
        return _TrainingLine(task)


class _TrainingLine:
    """How far, how long, how fast; and where there is room the loss, its curve and a bar."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield training_line(self.task, options.max_width, ascii_only=options.ascii_only)


def training_line(task: Task, width: int, *, ascii_only: bool = False) -> Text:
    """The line of a task for a terminal of some width, in the characters that it has."""
    shown: Shown = task.fields["shown"]
    total = f"/{int(task.total)}" if task.total is not None else ""
    parts = [f"step {int(task.completed)}{total}", f"eta {duration(_time_left(task))}"]
    if shown.tokens_per_s is not None:
        parts.append(f"{shown.tokens_per_s:,.0f} tokens/s")
    if (
        shown.loss is not None
        and len("  ".join(loss := [*parts, f"loss {shown.loss:.3f}"])) <= width
    ):
        parts = loss
    text = "  ".join(parts)
    room = width - len(text)
    if not ascii_only and len(shown.losses) > 1 and room // 2 > SHORTEST:
        text += " " + curve(shown.losses, min(LONGEST_CURVE, room // 2 - 1))
        room = width - len(text)
    line = Text(no_wrap=True, overflow="crop")
    if task.total is not None and room > SHORTEST:
        bar = "#-" if ascii_only else "━─"  # told apart without colours, too
        length = min(LONGEST_BAR, room - 1)
        done = int(length * min(1.0, task.completed / max(1, task.total)))
        line.append(bar[0] * done, "bar.complete").append(bar[1] * (length - done), "bar.back")
        line.append(" ")
    return line.append(text)


def _time_left(task: Task) -> float | None:
    limit: float | None = task.fields["max_time"]
    known = [] if task.time_remaining is None else [task.time_remaining]
    if limit is not None and task.elapsed is not None:
        known.append(max(0.0, limit - task.elapsed))
    return min(known, default=None)


def duration(seconds: float | None) -> str:
    """Time as hours, minutes and seconds.

    >>> duration(3723.4), duration(90061), duration(None)
    ('1:02:03', '1 day, 1:01:01', '-:--:--')
    """
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))


def curve(values: Sequence[float], width: int) -> str:
    """Values from the first to the last, drawn in `width` characters or fewer.

    >>> curve([4, 3, 2, 1, 1, 1], 3), curve([1.0, 1.0], 9)
    ('█▂▁', '▁▁')
    """
    width = min(width, len(values))
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(CURVE) - 1) / (high - low) if high > low else 0
    return "".join(CURVE[round((mean - low) * scale)] for mean in means)


def script_command(script: str, *arguments: str, processes: int = 1) -> str:
    """The shell command that runs a script of train/ with this interpreter, on so many ranks."""
    # `python` where that is this interpreter; otherwise the path, as in a virtual environment that
    # is not activated.
    python = shutil.which("python")
    same = python is not None and os.path.samefile(python, sys.executable)
    interpreter = "python" if same else os.path.relpath(sys.executable)
    # torchrun's module, so that it is this interpreter's, wherever the command is typed.
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    path = os.path.relpath(Path(__file__).with_name(script))
    return shlex.join([interpreter, *(torchrun if processes > 1 else []), path, *arguments])
