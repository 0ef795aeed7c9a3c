"""Trying again what failed and may not fail the next time."""

import time
from collections.abc import Callable
from random import SystemRandom
from typing import TypeVar

FIRST_S = 0.2
LONGEST_S = 30.0
MISSING = 3

T = TypeVar("T")


class PermanentError(Exception):
    """An answer that asking again would not change."""


FINAL = (PermanentError, PermissionError)


class Backoff:
    """Waits between tries: at random up to 0.2 s, then up to twice as long, up to 30 s.

    The pauses are random over their whole length ("full jitter"), so that the ranks of a run that
    failed together do not come back together.

    Args:
        limit_s: seconds without progress after which it is at an end.

    Attributes:
        failures: tries that failed since there was progress.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.progress()

    def progress(self) -> None:
        """Notes that something was got: from here on, tries and time count anew."""
        self.failures = 0
        self._since = time.monotonic()

    @property
    def waited_s(self) -> float:
        """Seconds since there was progress."""
        return time.monotonic() - self._since

    def wait(self) -> bool:
        """Pauses before the next try; False, at once, if the time is up."""
        self.failures += 1
        left_s = self.limit_s - self.waited_s
        if left_s <= 0:
            return False
        longest_s = min(LONGEST_S, left_s, FIRST_S * 2.0 ** (self.failures - 1))
        time.sleep(SystemRandom().uniform(0, longest_s))
        return True


def retry(action: Callable[[], T], limit_s: float) -> T:
    """What `action` returns, tried again for `limit_s` seconds if it raises an OSError.

    A file that is not there three times in a row is believed to be missing: whoever waits for the
    answer has most likely misspelt its name.

    Raises:
        OSError: the last one, when the time is up; at once, that a permission is missing.
    """
    backoff = Backoff(limit_s)
    while True:
        try:
            return action()
        except FINAL:
            raise
        except FileNotFoundError:
            if backoff.failures + 1 >= MISSING or not backoff.wait():
                raise
        except OSError:
            if not backoff.wait():
                raise
