"""Tracebacks, told in a few lines.

When a rank dies, those that wait for it die as well, each with a page of frames. What a reader
needs first is the exception and where it was raised; the rest is in the rank's log.
"""

import re

PREFIX = re.compile(r"^\[rank\d+\]:\s?")  # with which torch marks the lines of a rank's traceback
TRACEBACK = re.compile(r"^(?:\[rank\d+\]:\s*)?Traceback \(most recent call last\):")
FATAL = re.compile(r"^(?:Fatal Python error: |terminate called |\S*: symbol lookup error)")
LOST = re.compile(
    r"Connection (?:closed|reset|refused)|closed by (?:remote )?peer|Broken pipe|Socket Timeout"
    r"|remote process exited|DistBackendError|DistNetworkError|ncclRemoteError",
    re.IGNORECASE,
)
WIDTH = 300  # characters of a line that are told
MOST = 3  # lines


def summary(text: str) -> list[str]:
    """The lines that tell most of why a process ended: three at most, empty if it said nothing.

    >>> summary('''Traceback (most recent call last):
    ...   File "a.py", line 9, in <module>
    ...     f()
    ...   File "b.py", line 1, in f
    ...     return 1 / 0
    ...            ~~^~~
    ... ZeroDivisionError: division by zero
    ... ''')
    ['File "b.py", line 1, in f', 'return 1 / 0', 'ZeroDivisionError: division by zero']

    Args:
        text: what the process wrote, or the end of it.
    """
    lines = [PREFIX.sub("", line.rstrip()) for line in text.splitlines()]
    for number in range(len(lines) - 1, -1, -1):
        if TRACEBACK.match(lines[number]):
            return _cut(_of_traceback(lines[number + 1 :]))
        if FATAL.match(lines[number]):
            return _cut(_of_fatal(lines[number:]))
    return _cut([line for line in lines if line.strip()][-MOST:])


def has_trace(text: str) -> bool:
    """Whether a text holds the traceback of an exception or of a fatal error."""
    return any(TRACEBACK.match(line) or FATAL.match(line) for line in text.splitlines())


def lost_another(lines: list[str]) -> bool:
    """Whether an exception says that another process is gone: the cause is there, not here."""
    return any(LOST.search(line) for line in lines)


def _of_traceback(lines: list[str]) -> list[str]:
    """The last frame and the exception of the traceback that these lines follow the title of."""
    # The exception is the first line that is not indented, and its message may go on below it.
    end = next((n for n, line in enumerate(lines) if line and not line[0].isspace()), len(lines))
    frames = [n for n, line in enumerate(lines[:end]) if line.startswith('  File "')]
    frame = [line for line in lines[frames[-1] : end][:2] if line.strip()] if frames else []
    message = [line for line in lines[end : end + MOST] if line.strip()]
    return [*frame, *message[: max(1, MOST - len(frame))]]


def _of_fatal(lines: list[str]) -> list[str]:
    """A fatal error, and the first frames of a stack whose most recent call comes first."""
    frames = [line for line in lines[1:] if line.startswith('  File "') or "what():" in line]
    return [lines[0], *frames[: MOST - 1]]


def _cut(lines: list[str]) -> list[str]:
    """The lines without their indentation, and long ones without their end."""
    told = [line.strip() for line in lines[:MOST]]
    return [line if len(line) <= WIDTH else f"{line[:WIDTH]} ..." for line in told]


class Condenser:
    """Passes on what a process writes, and holds back what follows a traceback.

    A traceback is either the end of the process, and the agent then tells it in five lines; or the
    process goes on, and `release` gives what was held, each traceback in a few lines.
    """

    def __init__(self, log: str) -> None:
        self._log = log
        self._unfinished = ""  # line
        self._held: list[str] = []

    @property
    def holds(self) -> bool:
        """Whether something is held back."""
        return bool(self._held)

    def feed(self, text: str) -> str:
        """What of a text, and of those before it, can be shown now."""
        *lines, self._unfinished = re.split(r"(?<=[\n\r])", self._unfinished + text)
        shown = []
        for line in lines:
            if self._held or TRACEBACK.match(line) or FATAL.match(line):
                self._held.append(line)
            else:
                shown.append(line)
        return "".join(shown)

    def release(self) -> str:
        """What was held back, with each traceback in a few lines."""
        shown: list[str] = []
        while self._held:
            line = self._held.pop(0)
            if not TRACEBACK.match(line):
                shown.append(line)
                continue
            block = [line]
            while self._held and self._held[0][:1].isspace():
                block.append(self._held.pop(0))
            if self._held:
                block.append(self._held.pop(0))  # the exception
            shown.append(f"Traceback, whole in {self._log}:\n")
            shown += [f"  {part}\n" for part in summary("".join(block))]
        return "".join(shown)

    def drop(self) -> None:
        """Forgets what was held back."""
        self._held.clear()

    def end(self) -> str:
        """The line that the process has begun and not ended."""
        unfinished, self._unfinished = self._unfinished, ""
        return "" if self._held else unfinished
