"""The text of tokens as they come is the text of all of them, up to a stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.detokenizer import INCOMPLETE, IncrementalDetokenizer
from data.tokenizer import Tokenizer

TEXT = st.text("abc é漢😀\n ", max_size=30)


def written(text: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    """What each token makes certain, until one ends the text, and what the end makes certain."""
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.ending:
            break
    return [*pieces, text.finish()]


def cut(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> str:
    """The slow twin: the text of the fewest tokens that have a stop in it, up to the first stop."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if ends := [text.find(s) for s in stop if s in text]:
            return text[: min(ends)]
    return tokenizer.decode(ids)


@given(prompt=TEXT, text=TEXT, stop=st.lists(st.text("abc ", min_size=1, max_size=4), max_size=2))
def test_the_pieces_are_the_text_up_to_the_first_stop(
    tokenizer: Tokenizer, prompt: str, text: str, stop: list[str]
) -> None:
    ids = tokenizer.encode(text).tolist()
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, tuple(stop))
    pieces = written(detokenizer, [*ids, tokenizer.eos_id])
    assert "".join(pieces) == detokenizer.text == cut(tokenizer, ids, stop)
    assert detokenizer.ending == ("stop" if any(s in text for s in stop) else "document")
    assert pieces[-1] == ""


@given(prompt=TEXT, text=TEXT)
def test_what_is_shown_is_never_taken_back(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, ("ab",))
    shown = ""
    for token in tokenizer.encode(text).tolist():
        shown += detokenizer.add(token)
        assert shown == detokenizer.text
        assert text.startswith(shown)
        assert INCOMPLETE not in shown
        if detokenizer.ending:
            break


def test_the_prompt_is_read_after_the_separator_of_a_document(tokenizer: Tokenizer) -> None:
    text = IncrementalDetokenizer(tokenizer, "the original")
    assert text.ids == [tokenizer.eos_id, *tokenizer.encode("the original").tolist()]
    assert text.text == ""


def test_a_character_of_several_tokens_is_shown_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("漢").tolist()
    assert len(ids) == 3
    assert written(IncrementalDetokenizer(tokenizer, "a"), ids) == ["", "", "漢", ""]


def test_a_character_that_is_not_finished_is_shown_as_such_at_the_end(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("漢").tolist()
    text = IncrementalDetokenizer(tokenizer, "a")
    assert text.add(first) == ""
    assert text.finish() == INCOMPLETE
    assert text.ending == "length"
    assert text.finish() == ""


@pytest.mark.parametrize(("after", "shown"), [("c", "abc"), ("b", "abb")])
def test_what_may_become_a_stop_is_held_until_it_does_not(
    tokenizer: Tokenizer, after: str, shown: str
) -> None:
    text = IncrementalDetokenizer(tokenizer, "", ("abd",))
    held = [text.add(token) for letter in "ab" for token in tokenizer.encode(letter).tolist()]
    assert held == ["", ""]
    assert "".join(map(text.add, tokenizer.encode(after).tolist())) == shown
