"""What commands print: warnings, and progress bars."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from conf.redaction import redacted


def warn(console: Console, text: str) -> None:
    """Print a warning, whatever is in it: errors may hold what looks like markup, or a secret."""
    console.print(redacted(text), style="yellow", markup=False)


def progress_bar(console: Console, status: str, *, eta: bool = False) -> Progress:
    """A progress bar that is shown in a terminal only, and is gone at the end.

    Args:
        status: text behind the bar, with the task's fields in it: `{task.fields[tokens]:,} tokens`.
        eta: also show the time that is left.
    """
    remaining = [TextColumn("eta"), TimeRemainingColumn()] if eta else []
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *remaining,
        TextColumn(status),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
