"""How a part of `make gpu` tells its rows: one line of JSON for each, as soon as it is known."""

import json
from typing import Any

Row = dict[str, Any]

PASS, FAIL, NOT_INSTALLED = "pass", "FAIL", "not installed"


def tell(row: Row) -> None:
    """Print a row."""
    print(json.dumps(row), flush=True)


def told(text: str) -> list[Row]:
    """The rows in what a part has printed, between its other lines.

    >>> told('a warning\\n{"what": "copy", "TB/s": 4.2}\\n{"cut')
    [{'what': 'copy', 'TB/s': 4.2}]
    """
    return [json.loads(line) for line in text.splitlines() if line[:1] + line[-1:] == "{}"]
