"""Standard streams that fail alone, and that print no secrets.

When a stream fails, this costs its own output, and never what prints to it.

The reader of a pipe ends (`| head`), a disk is full, an ssh session drops, a terminal's encoding
lacks a character. Python raises in each case where the text is printed, which would end a training
in the middle; rich ends the process by itself, and at the exit Python makes the exit code 120.
"""

import os
import select
import sys
from contextlib import suppress
from errno import EBADF, EPIPE
from io import BufferedWriter, RawIOBase, TextIOWrapper, UnsupportedOperation
from typing import Any, TextIO

from conf.redaction import hide_given, masked, redacted

READ_AGAIN_S = 1.0
"""Seconds to wait for the reader of a pipe that is full and does not block."""

GONE = (EBADF, EPIPE)
"""Errors after which nothing can be written any more; a disk may have room again."""


class LossyWriter(RawIOBase):
    """Writes all bytes to a file descriptor, or loses what it does not take.

    The first failure is told on the other stream, whose descriptor is `told_on`.

    Attributes:
        reader_is_gone: nobody will ever read what is written.
    """

    def __init__(self, descriptor: int, name: str, told_on: int) -> None:
        self.name = name
        self.reader_is_gone = False
        self._descriptor = descriptor
        self._told_on = told_on
        self._told = False

    def write(self, data: Any) -> int:
        """Write or lose all bytes of a buffer; returns how many they are."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and not self.reader_is_gone:
                left = left[self._write_some(left) :]
        except OSError as error:
            self._fail(error)
        return size

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            # Another program that shares the terminal can have made it so.
            if not select.select([], [self._descriptor], [], READ_AGAIN_S)[1]:
                raise
            return 0

    def _fail(self, error: OSError) -> None:
        if error.errno in GONE:
            self.reader_is_gone = True
            # Otherwise the next file that is opened could get a closed descriptor's number, and
            # what native code prints would go into it.
            _plug(self._descriptor)
        if not self._told and not sys.is_finalizing():
            self._told = True
            lost = "what it does not take is lost, and the command goes on"
            try:
                os.write(self._told_on, f"{self.name}: {error.strerror}; {lost}\n".encode())
            except OSError:
                return  # there is nobody left to tell

    def writable(self) -> bool:
        """It is for writing."""
        return True

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)


class LossyStream(TextIOWrapper):
    """Text to a `LossyWriter`; secrets, and characters that its encoding lacks, are replaced.

    Attributes:
        replaced: the stream in whose place it is; it may own the descriptor, and would close it.
        by_form: also hide what only has the form of a secret.
    """

    replaced: TextIO
    by_form = False

    def write(self, text: str) -> int:
        """Write a text without the secrets in it; returns the number of its characters."""
        safe = masked(text)
        super().write(redacted(safe) if self.by_form else safe)
        return len(text)

    @property
    def reader_is_gone(self) -> bool:
        """Whether nobody will ever read what is printed."""
        return self._raw.reader_is_gone

    @property
    def _raw(self) -> LossyWriter:
        raw: Any = self.buffer
        return raw if isinstance(raw, LossyWriter) else raw.raw

    def close(self) -> None:
        """Lose what is printed from here on; printing to a closed stream would raise."""
        self.flush()
        self._raw.reader_is_gone = True


def guard_standard_streams() -> None:
    """Replace this process's standard output and error; each command's entry point calls it.

    The secrets in the command line and the environment are noted before anything is printed.

    A stream that is closed from the start becomes the null device, and so does the standard input.
    Streams without a file descriptor, such as those that a test has put there, stay as they are.
    """
    hide_given(sys.argv[1:], os.environ)
    for number in (0, 1, 2):
        _plug(number)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = _lossy(sys.stdout, "stdout", told_on=2)
    sys.stderr = _lossy(sys.stderr, "stderr", told_on=1)


def reader_is_gone(stream: TextIO) -> bool:
    """Whether nobody will ever read what is printed, so that printing on has no use."""
    return isinstance(stream, LossyStream) and stream.reader_is_gone


def _lossy(stream: TextIO | None, name: str, told_on: int) -> TextIO:
    if isinstance(stream, LossyStream):
        return stream
    if stream is None:  # its descriptor may be another file's by now
        return open(os.devnull, "w", encoding="utf-8")
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, UnsupportedOperation):
        return stream
    with suppress(OSError, ValueError):
        stream.flush()
    raw: Any = LossyWriter(descriptor, name, told_on)
    # `python -u` writes without a buffer.
    unbuffered = getattr(stream, "write_through", False)
    lossy = LossyStream(
        raw if unbuffered else BufferedWriter(raw),
        encoding=stream.encoding,
        errors="replace" if name == "stdout" else "backslashreplace",
        line_buffering=getattr(stream, "line_buffering", True),
        write_through=unbuffered,
    )
    lossy.replaced = stream
    # Errors are told on stderr, with texts of libraries. What is on stdout may be text of a model.
    lossy.by_form = name == "stderr"
    return lossy


def _plug(number: int) -> None:
    """Give a closed descriptor to the null device, before a file is opened under its number."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)
