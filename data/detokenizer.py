"""Sampled tokens to text, as they come."""

from collections.abc import Sequence
from typing import Literal

from data.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a character of several tokens is decoded to until its last token is there."""


class IncrementalDetokenizer:
    """The text of the tokens after a prompt, until the document ends or a stop text comes.

        tokens    the   _c  at   .        stop = (".",)
        text      "the" " c" "at"         the stop text is not part of it

    Text is held back while the next tokens may still change it: the end of a text that may become a
    stop text, and a character whose last bytes are not there yet.

    Args:
        tokenizer: of the model.
        prompt: the text that is continued.
        stop: texts that end it.

    Attributes:
        ids: the tokens so far, from the separator in front of the document on.
        text: what is certain so far, without the prompt.
        ending: why no more tokens are taken: the separator came, a stop text came, or `finish` was
            called; None while tokens are taken.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids = [tokenizer.eos_id, *tokenizer.encode(prompt).tolist()]
        self.text = ""
        self.ending: Literal["document", "stop", "length"] | None = None
        self._prompt_characters = len(tokenizer.decode(self.ids))

    def add(self, token: int) -> str:
        """Take one more token; returns the text that has become certain by it."""
        assert self.ending is None
        if token == self.tokenizer.eos_id:
            self.ending = "document"
            return self._extend_to(self._decoded())
        self.ids.append(token)
        text = self._decoded()
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if ends:
            self.ending = "stop"
            return self._extend_to(text[: min(ends)])
        if text.endswith(INCOMPLETE):
            return ""
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        return self._extend_to(text[: len(text) - held])

    def finish(self) -> str:
        """Take no more tokens; returns the text that was held back."""
        if self.ending is None:
            self.ending = "length"
            return self._extend_to(self._decoded())
        return ""

    def _decoded(self) -> str:
        # All of it, since SentencePiece decodes a token by what comes before it.
        return self.tokenizer.decode(self.ids)[self._prompt_characters :]

    def _extend_to(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`.

    >>> _overlap("one two", "two three"), _overlap("one", "two")
    (3, 0)
    """
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
