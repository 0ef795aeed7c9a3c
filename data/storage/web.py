"""Files on web servers, read by ranges.

fsspec's own reader loses what had come of an answer that broke off, takes a whole file for the
range that it asked for, and sees no tags; shards need all three.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import Request, urlopen

from data.storage.retry import PermanentError
from data.storage.stores import Entry, Shard, Store, changed, check_same

PIECE = 1 << 20  # bytes of an answer, at most, that are handed on at a time
PASSING = (408, 425, 429)  # of the answers 4xx, those that time may change; 404 is one of its own


class PastEndError(PermanentError):
    """A file without the byte that was asked for."""


class WebStore(Store):
    """Web servers; every request stands alone, so threads share nothing.

    Args:
        timeout_s: seconds to connect, or without a byte, after which a request is given up.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def info(self, url: str) -> Entry:
        try:
            # Not HEAD, which URLs that are signed for GET refuse.
            with self._answer(url, "bytes=0-0") as answer:
                if urlsplit(answer.url).path.endswith("/") or not urlsplit(answer.url).path:
                    return Entry(answer.url, _name(answer.url), is_folder=True)
                size = _size(answer)
                if size is None:
                    raise PermanentError(f"{url}: its server does not tell its size")
                return Entry(url, _name(url), False, size, _tag(answer))
        except PastEndError:
            return Entry(url, _name(url), False, 0)

    def ls(self, url: str) -> list[Entry]:
        with self._answer(url) as answer:
            page = _Links()
            page.feed(answer.read().decode("utf-8", "replace"))
            folder = answer.url.rstrip("/") + "/"
        found = sorted({urljoin(folder, link) for link in page.links})
        return [
            Entry(link, _name(link), link.endswith("/"))
            for link in found
            if link.startswith(folder) and re.fullmatch("[^/?#]+/?", link.removeprefix(folder))
        ]

    def read(self, shard: Shard, start: int, stop: int, *, skip: bool) -> Iterator[bytes]:
        with self._answer(shard.url, f"bytes={start}-{stop - 1}") as answer:
            check_same(shard, _size(answer), _tag(answer))
            if answer.status == 206:
                if (first := _first(answer)) != start:
                    raise OSError(f"byte {first} came where {start} was asked for")
            elif stop < shard.size or (start and not skip):
                raise PermanentError(
                    "its server sends whole files only; set data.cache.remote=true to have it "
                    "copied once"
                )
            else:
                _pass_over(answer, start)
            if not (piece := answer.read1(min(PIECE, stop - start))):
                raise OSError(f"nothing came at byte {start} of {shard.size}")
            while piece:
                yield piece
                start += len(piece)
                piece = answer.read1(min(PIECE, stop - start))

    @contextmanager
    def _answer(self, url: str, wanted: str | None = None) -> Iterator[HTTPResponse]:
        """The answer to a GET; whatever goes wrong with it is told as a `Store` tells it."""
        headers = {"User-Agent": "phd-transformer"} | ({"Range": wanted} if wanted else {})
        try:
            with urlopen(Request(url, headers=headers), timeout=self.timeout_s) as answer:
                yield answer
        except HTTPError as error:
            error.close()
            raise _meaning(error) from None
        except HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


class _Links(HTMLParser):
    """Collects what a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for key, value in attrs if key == "href" and value]


def _meaning(error: HTTPError) -> Exception:
    said = f"HTTP {error.code} {error.reason}"
    if error.code == 404:
        return FileNotFoundError(said)
    if error.code == 416:
        return PastEndError(str(changed("it is shorter now")))
    if error.code >= 500 or error.code in PASSING:
        return OSError(said)
    return PermanentError(f"{said}; see that it may be read from here")


def _name(url: str) -> str:
    """A URL's last part, as people write it.

    >>> _name("https://host/a/part%201.jsonl?key=3")
    'part 1.jsonl'
    """
    return unquote(urlsplit(url).path.rstrip("/").rpartition("/")[2])


def _size(answer: HTTPResponse) -> int | None:
    """The whole file's size, if the server tells it."""
    if answer.status == 206:
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        size = answer.headers.get("Content-Length", "")
    return int(size) if size.isdecimal() else None


def _first(answer: HTTPResponse) -> int | None:
    """The place in the file of the first byte of an answer with a range."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _tag(answer: HTTPResponse) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _pass_over(answer: HTTPResponse, count: int) -> None:
    while count:
        passed = len(answer.read1(min(PIECE, count)))
        if not passed:
            raise OSError(f"the answer broke off {count} bytes before the place to go on")
        count -= passed
