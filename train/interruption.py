"""A polite end on SIGINT and SIGTERM: finish the step, save, leave."""

import signal
from types import FrameType


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second one acts at once.

    Attributes:
        received: the one that came, or None.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> "Interruption":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def came(self) -> bool:
        """Whether one came."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        self._restore()
