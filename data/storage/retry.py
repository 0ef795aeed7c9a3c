"""Trying again what failed now and may work the next time."""

import time
from collections.abc import Callable
from random import SystemRandom
from typing import TypeVar

FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 30.0

MISSING_TRIES = 3
"""Tries after which a file counts as missing. One is too few: a listing of an object store can lag
behind, and a web server that is restarted answers 404 for a moment."""

TEMPORARY_STATUS = (408, 425, 429)
"""HTTP answers of the 4xx kind that may be another one later: timeout, too early, too many
requests. 404 is treated as a missing file."""

T = TypeVar("T")


class PermanentError(Exception):
    """A store's answer that asking again would not change, such as 403 Forbidden."""


NOT_RETRIED = (PermanentError, PermissionError)


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of `requests`, `httpx` or the like is about, if it is."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_temporary(status: int) -> bool:
    """Whether the same request may have another answer later.

    >>> is_temporary(503), is_temporary(429), is_temporary(403)
    (True, True, False)
    """
    return status >= 500 or status in TEMPORARY_STATUS


class Backoff:
    """Pauses between tries: a random time of up to 0.2 s, then of up to twice as long, up to 30 s.

    The pauses are random over their whole length ("full jitter", Brooker, AWS Architecture Blog,
    2015), so that the ranks of a run that failed together do not come back together.

    Args:
        limit_s: seconds without progress after which there are no more tries.

    Attributes:
        failures: failed tries since there was progress.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.reset()

    def reset(self) -> None:
        """Start counting tries and time anew, because there was progress."""
        self.failures = 0
        self._since = time.monotonic()

    @property
    def waited_s(self) -> float:
        """Seconds since there was progress."""
        return time.monotonic() - self._since

    def pause(self) -> bool:
        """Sleep before the next try; returns False at once if the time is up."""
        self.failures += 1
        left_s = self.limit_s - self.waited_s
        if left_s <= 0:
            return False
        longest_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self.failures - 1))
        # Never beyond the limit: the last try comes when the time is just up. The drawn time is cut
        # and not the range, or the tries would come ever more densely towards the end.
        time.sleep(min(left_s, SystemRandom().uniform(0, longest_s)))
        return True


def retry(action: Callable[[], T], limit_s: float) -> T:
    """What `action` returns; an OSError is tried again for `limit_s` seconds.

    A file that is not found three times in a row is taken to be missing. The user waits for this
    answer, and a misspelt name is the most likely cause.

    Raises:
        OSError: the last one, when the time is up.
        PermanentError, PermissionError: at once.
    """
    backoff = Backoff(limit_s)
    while True:
        try:
            return action()
        except NOT_RETRIED:
            raise
        except FileNotFoundError:
            # This failure is the one after those that are counted.
            if backoff.failures + 1 >= MISSING_TRIES or not backoff.pause():
                raise
        except OSError:
            if not backoff.pause():
                raise
