"""A polite end on a signal: finish the step, save, leave."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

from train.exit_codes import ExitCode

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def nothing() -> None:
    """What is to be done where nothing is."""


class StopSignal:
    """While it is entered, signals are only noted: who reads `received` ends in peace.

        first of SIGINT, SIGTERM, SIGUSR1, SIGUSR2    noted, and `on_first_signal` is called
        SIGINT after that                             KeyboardInterrupt at once: a person insists
        any other after that                          ignored

    Schedulers and launchers repeat SIGTERM, and a repetition must not break the save that the
    first one asked for; whoever will not wait has SIGKILL.

    Python runs no handler while the main thread is in C, where it may wait for a rank that has
    died. So `on_first_signal` is called from a thread of its own, which the interpreter wakes up
    from within the signal itself, and is the place to set a deadline.

    It may be entered again within itself, which changes nothing.

    Attributes:
        on_first_signal: called once, from another thread, as soon as the first signal is there.
        received: the first one that came, or None.
    """

    received: signal.Signals | None = None

    def __init__(self, on_first_signal: Callable[[], object] = nothing) -> None:
        self.on_first_signal = on_first_signal
        self._depth = 0

    def __enter__(self) -> "StopSignal":
        self._depth += 1
        if self._depth > 1:
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = Thread(target=self._listen, name="interruption", daemon=True)
        self._thread.start()
        self._woken = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see launch/parent_death.py
        return self

    def is_set(self) -> bool:
        """Whether one came."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.received is None:
            self.received = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """Read the numbers of signals, those of others' handlers among them, up to the first."""
        while number := os.read(self._read_end, 1):
            if number[0] in SIGNALS:
                self.on_first_signal()
                return

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)


@contextmanager
def exit_immediately() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGUSR2 end a lone process at once, with `ExitCode.REQUEUE`.

    For times in which there is nothing to save. The same command goes on where the last checkpoint
    is. SIGINT is a KeyboardInterrupt, as ever.
    """

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise SystemExit(ExitCode.REQUEUE)

    before = {number: signal.signal(number, leave) for number in SIGNALS[1:]}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
