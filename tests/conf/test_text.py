"""Text of users: byte order marks are no part of it, and other encodings are named."""

from pathlib import Path

import pytest

from conf.text import NotUtf8Error, decoded, read_text

TEXTS = [
    "Plain Latin letters, in one line",
    "two\nlines\nand a third one with é and ü",
    '{"text": "some of it is 中文字符"}\n' * 3,
    "a",
]


@pytest.mark.parametrize("text", [*TEXTS, "", "中文字符", "with a \0 zero in it", "\0" * 60])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf_8_is_read_with_and_without_its_mark(text: str, encoding: str) -> None:
    assert decoded(text.encode(encoding)) == text


def test_a_mark_within_a_text_stays() -> None:
    assert decoded("a\ufeffb".encode()) == "a\ufeffb"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_utf_16_and_utf_32_are_named(text: str, encoding: str) -> None:
    with pytest.raises(
        NotUtf8Error, match=f"^{encoding[:6].upper()}, not UTF-8: convert it, .*iconv"
    ):
        decoded(text.encode(encoding))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_each_line_of_a_file_in_utf_16_is_named(encoding: str) -> None:
    content = ('{"text": "some words, 中文字符 and é"}\n' * 3).encode(encoding)
    for line in filter(None, content.split(b"\n")):
        if line != b"\0":
            with pytest.raises(NotUtf8Error, match=r"^UTF-16, not UTF-8"):
                decoded(line)


def test_another_encoding_is_told_by_the_first_byte_that_is_wrong() -> None:
    with pytest.raises(NotUtf8Error, match=r"^not UTF-8: .* at byte 3$"):
        decoded("café!".encode("latin-1"))


def test_what_is_no_text_at_all_is_not_called_utf_16() -> None:
    with pytest.raises(NotUtf8Error, match=r"^not UTF-8: .* at byte"):
        decoded(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4)


def test_a_file_is_read_with_one_kind_of_line_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\nthree\r")
    assert read_text(tmp_path / "a.txt") == "one\ntwo\nthree\n"


def test_what_is_wrong_is_one_phrase_wherever_it_stands() -> None:
    # What stands before the colon is how bad records are counted.
    reasons = set()
    for content in (b"\xff", b"a\xff", b"abc\x80d", b"ab\xc3"):
        with pytest.raises(NotUtf8Error) as error:
            decoded(content)
        reasons.add(str(error.value).partition(":")[0])
    assert reasons == {"not UTF-8"}
