"""What every configuration dataclass has in common; nothing but the standard library."""

from math import inf
from typing import Any


class Settings:
    """A configuration value that cannot be built with an impossible setting."""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """Every impossible setting or combination, one sentence each."""
        return []


def at_least(config: Any, section: str, least: float, *names: str) -> list[str]:
    """One sentence for each named setting below `least`; null always passes."""
    kind = "an integer" if isinstance(least, int) else "a number"
    return [
        f"{section}.{name}={value}: expected {kind} of at least {least}"
        for name in names
        if (value := getattr(config, name)) is not None and not least <= value < inf
    ]
