"""SIGTERM, SIGHUP and Ctrl-C: noted at once, answered after the step at hand."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Thread
from types import FrameType

from conf.exit_codes import ExitCode

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def handled_signals() -> tuple[signal.Signals, ...]:
    """Of `SIGNALS` those that are answered here: not SIGHUP where `nohup` has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in SIGNALS if not (ignored and number == signal.SIGHUP))


class StopSignal:
    """Within this context signals are only noted; the training loop reads `received` and ends.

        first of `SIGNALS`       noted; the `on_first` callbacks are called
        SIGINT after that        KeyboardInterrupt at once: a person insists
        any other after that     ignored

    SIGHUP comes when a terminal is closed, or an ssh session drops. Under `nohup` it stays ignored.

    Schedulers and launchers repeat SIGTERM, and a repetition must not break the save that the
    first one asked for; whoever will not wait has SIGKILL.

    The context may be entered again within itself, which changes nothing.

    Attributes:
        received: the first signal that came, or None.
    """

    received: signal.Signals | None = None

    def __init__(self) -> None:
        self._depth = 0
        self._callbacks: list[Callable[[], object]] = []
        self._lock = Lock()

    def __enter__(self) -> "StopSignal":
        self._depth += 1
        if self._depth > 1:
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = Thread(target=self._listen, name="stop-signal", daemon=True)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._handlers = {n: signal.signal(n, self._note) for n in handled_signals()}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see launch/parent_death.py
        return self

    def is_set(self) -> bool:
        """Whether a signal came."""
        return self.received is not None

    @contextmanager
    def on_first(self, callback: Callable[[], object]) -> Iterator[None]:
        """Within this context, have `callback` called when the first signal comes.

        Python runs no signal handler while the main thread is in C, where it may wait for a rank
        that has died. So the callback is called from a thread of its own, which the interpreter
        wakes up from within the signal itself: the place to set a deadline. If a signal has come
        already, it is called here. It may be called twice.
        """
        with self._lock:
            self._callbacks.append(callback)
        try:
            if self.is_set():
                callback()
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.received is None:
            self.received = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """Read the numbers of signals, also those with other handlers, up to the first of ours."""
        while number := os.read(self._read_end, 1):
            if number[0] in SIGNALS:
                with self._lock:
                    for callback in self._callbacks:
                        callback()
                return

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)


@contextmanager
def exit_immediately() -> Iterator[None]:
    """All of `SIGNALS` but SIGINT end a lone process at once, with `ExitCode.REQUEUE`.

    For times in which there is nothing to save. The same command goes on where the last checkpoint
    is. SIGINT is a KeyboardInterrupt, as ever.
    """

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise SystemExit(ExitCode.REQUEUE)

    ours = [number for number in handled_signals() if number != signal.SIGINT]
    handlers = {number: signal.signal(number, leave) for number in ours}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
