"""Text that users give: UTF-8, with or without a byte order mark."""

from pathlib import Path

BOM = "\ufeff"
"""The byte order mark, which is no part of the text that follows it."""

MARKS = {
    b"\xff\xfe\0\0": "UTF-32",  # before that of UTF-16, which it begins with
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

LOOK_BYTES = 4096
"""Bytes from which an encoding is told."""


class NotUtf8Error(ValueError):
    """Bytes that are no text in UTF-8; says what they are, as far as that can be told."""


def decoded(content: bytes) -> str:
    r"""Bytes in UTF-8 as text, without the byte order mark at their beginning.

    >>> decoded(b"\xef\xbb\xbfcaf\xc3\xa9")
    'café'

    Raises:
        NotUtf8Error: they are in another encoding, which is named if it is UTF-16 or UTF-32.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        if other := _marked(content) or _with_zeros(content, of_all=0.02, of_pairs=0.0):
            raise _in(other) from None
        raise NotUtf8Error(f"not UTF-8: {error.reason} at byte {error.start}") from None
    # Latin letters in UTF-16 without a mark are UTF-8, too: a zero byte follows each.
    if "\0" in text and (other := _with_zeros(content, of_all=0.4, of_pairs=0.8)):
        raise _in(other)
    return text.removeprefix(BOM)


def read_text(path: Path) -> str:
    r"""A file of the user's as text, with `\n` for all kinds of line ends.

    Raises:
        NotUtf8Error: it is in another encoding.
        OSError: it cannot be read.
    """
    return decoded(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def _in(encoding: str) -> NotUtf8Error:
    return NotUtf8Error(
        f"{encoding}, not UTF-8: convert it, for example with iconv -f {encoding} -t UTF-8"
    )


def _marked(content: bytes) -> str | None:
    """The encoding whose byte order mark begins the bytes."""
    return next((name for mark, name in MARKS.items() if content.startswith(mark)), None)


def _with_zeros(content: bytes, *, of_all: float, of_pairs: float) -> str | None:
    """UTF-16 or UTF-32, if the bytes have zeros as these have for letters of Latin scripts.

    Args:
        content: a text, or a part of one from any byte on.
        of_all: the least fraction of the bytes that are zero.
        of_pairs: the least fraction of zeros among the even bytes or among the odd ones.
    """
    beginning = content[:LOOK_BYTES]
    zeros = beginning.count(0)
    # In UTF-32 three of four bytes are zero; where still more are, they fill up something.
    if not max(1, of_all * len(beginning)) <= zeros <= 0.78 * len(beginning):
        return None
    if any(0 < byte < 9 for byte in beginning):
        return None  # something else, such as a picture: these bytes are no characters
    if max(beginning[half::2].count(0) / len(beginning) * 2 for half in (0, 1)) < of_pairs:
        return None
    return "UTF-32" if zeros > 0.6 * len(beginning) else "UTF-16"
