"""The text that goes on from a prompt, as its tokens come."""

from collections.abc import Sequence
from typing import Literal

from data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # of a character of several tokens until its last is there


class IncrementalDetokenizer:
    """What follows a prompt, until the document ends or one of some texts comes.

    Attributes:
        ids: the tokens so far, from the separator in front of the document on.
        text: what is certain so far, without the prompt.
        ending: why nothing more is taken; None while something is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = [tokenizer.eos_id, *tokenizer.encode(prompt).tolist()]
        self.text = ""
        self.ending: Literal["document", "stop", "length"] | None = None
        self._before = len(tokenizer.decode(self.ids))

    def add(self, token: int) -> str:
        """Take one more token; returns the text that has become certain by it."""
        assert self.ending is None
        if token == self.tokenizer.eos_id:
            self.ending = "document"
            return self._show(self._all())
        self.ids.append(token)
        text = self._all()
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.ending = "stop"
            return self._show(text[: min(ends)])
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        if text.endswith(UNFINISHED):
            return ""
        return self._show(text[: len(text) - held])

    def finish(self) -> str:
        """Nothing more comes; returns the text that was held back."""
        if self.ending is None:
            self.ending = "length"
            return self._show(self._all())
        return ""

    def _all(self) -> str:
        return self.tokenizer.decode(self.ids)[self._before :]

    def _show(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` may be the beginning of `stop`.

    >>> _overlap("one two", "two three"), _overlap("one", "two")
    (3, 0)
    """
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
