"""Durations in a configuration: seconds, or a number with a unit."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _in_seconds(value: Any) -> Any:
    """Turns `90s`, `30m`, `2h` and `1.5d` into seconds; the type check judges everything else.

    >>> _in_seconds("30m")
    1800.0
    """
    time = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value) if isinstance(value, str) else None
    return float(time[1]) * SECONDS[time[2]] if time else value


Seconds = Annotated[float, BeforeValidator(_in_seconds), "a number of seconds, 30m, 2h"]
