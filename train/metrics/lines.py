"""The lines of a run's `metrics.jsonl`, as they are read back."""

import json
from collections.abc import Iterator
from typing import Any


def lines_of(text: str) -> Iterator[dict[str, Any]]:
    """The lines that no crash has damaged."""
    return filter(None, map(read_line, text.splitlines()))


def read_line(line: str) -> dict[str, Any] | None:
    """A line; None if a crash has damaged it."""
    try:
        read = json.loads(line)
    except ValueError:
        return None
    return read if isinstance(read, dict) and isinstance(read.get("step"), int) else None
