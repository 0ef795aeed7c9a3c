"""Files on web servers, read by ranges.

fsspec's own reader is not used, for three reasons. It drops the bytes that came before an answer
broke off, it takes a whole file for the range that it asked for, and it does not look at ETags.
"""

import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from conf.errors import ConfigError, Problem, reason_of
from data.storage.retry import PermanentError, is_temporary
from data.storage.stores import Entry, Shard, Store, changed, check_same

READ_BYTES = 1 << 20
"""Most bytes of an answer that are handed on at a time."""


class PastEndError(PermanentError):
    """The file has no such byte."""


class WebStore(Store):
    """Web servers. Each request has its own connection, so that threads share nothing.

    Args:
        timeout_s: seconds to connect, or without a byte, after which a request fails.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def info(self, url: str) -> Entry:
        try:
            # Not HEAD: a URL that is signed for GET refuses it.
            with self._answer(url, "bytes=0-0") as answer:
                # A web server redirects a folder's URL to the same one with a slash at its end.
                if urlsplit(answer.url).path.endswith("/") or not urlsplit(answer.url).path:
                    folder = _with_user_info(answer.url, url)
                    return Entry(folder, _name(folder), is_folder=True)
                size = _size(answer)
                if size is None:
                    raise PermanentError(f"{url}: its server does not tell its size")
                return Entry(url, _name(url), False, size, _tag(answer))
        except PastEndError:
            # An empty file has no byte 0, which is what was asked for.
            return Entry(url, _name(url), False, 0)

    def ls(self, url: str) -> list[Entry]:
        with self._answer(url) as answer:
            page = _Links()
            page.feed(answer.read().decode("utf-8", "replace"))
            # The password that opened the page opens its files.
            folder = _with_user_info(answer.url.rstrip("/") + "/", url)
        found = sorted({urljoin(folder, link) for link in page.links})
        return [
            Entry(link, _name(link), link.endswith("/"))
            for link in found
            # Pages of folders also link upwards, and to themselves in another order.
            if link.startswith(folder) and re.fullmatch("[^/?#]+/?", link.removeprefix(folder))
        ]

    def read(self, shard: Shard, start: int, stop: int, *, skip: bool) -> Iterator[bytes]:
        try:
            with self._answer(shard.url, f"bytes={start}-{stop - 1}") as answer:
                check_same(shard, _size(answer), _tag(answer))
                if answer.status == 206:
                    # A cache on the way may answer with another range than the one asked for.
                    if (first := _first(answer)) != start:
                        raise OSError(f"byte {first} came where {start} was asked for")
                elif stop < shard.size or (start and not skip):
                    raise _whole_files_only(shard)
                else:
                    _drop(answer, start)
                if not (piece := answer.read1(min(READ_BYTES, stop - start))):
                    raise OSError(f"nothing came at byte {start} of {shard.size}")
                while piece:
                    yield piece
                    start += len(piece)
                    piece = answer.read1(min(READ_BYTES, stop - start))
        except PastEndError:
            raise changed(shard, "it is shorter now") from None

    @contextmanager
    def _answer(self, url: str, byte_range: str | None = None) -> Iterator[HTTPResponse]:
        """The answer to a GET; failures are the errors of a `Store`."""
        plain, authorization = _authorization(url)
        headers = {"User-Agent": "phd-transformer"}
        headers |= {"Range": byte_range} if byte_range else {}
        try:
            request = Request(plain, headers=headers)
            if authorization:
                request.add_unredirected_header("Authorization", authorization)
            with build_opener(_Redirect).open(request, timeout=self.timeout_s) as answer:
                yield answer
        except HTTPError as error:
            error.close()
            raise _store_error(error) from None
        except InvalidURL as error:
            raise PermanentError(reason_of(error)) from error
        except HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


class _Redirect(HTTPRedirectHandler):
    """Follows redirects; the password goes to the server that it was given for, and to no other."""

    def redirect_request(self, req: Request, *answer: Any) -> Request | None:
        following = super().redirect_request(req, *answer)
        authorization = req.get_header("Authorization")
        same = following is not None and (following.type, following.host) == (req.type, req.host)
        if following and same and authorization:
            following.add_unredirected_header("Authorization", authorization)
        return following


def _authorization(url: str) -> tuple[str, str | None]:
    """The URL without `user:password@`, and the header that says the same (RFC 7617).

    >>> _authorization("https://ann:p%40ss@host/a.jsonl")
    ('https://host/a.jsonl', 'Basic YW5uOnBAc3M=')
    """
    parts = urlsplit(url)
    user_info, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, None
    user, _, password = user_info.partition(":")
    pair = f"{unquote(user)}:{unquote(password)}".encode()
    return urlunsplit(parts._replace(netloc=host)), f"Basic {b64encode(pair).decode()}"


def _with_user_info(url: str, given: str) -> str:
    """The URL with the `user:password@` of another one, if it is of the same server."""
    user_info, at, host = urlsplit(given).netloc.rpartition("@")
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=user_info + at + host)) if parts.netloc == host else url


def _whole_files_only(shard: Shard) -> ConfigError:
    """The error for a server that does not understand ranges."""
    expected = f"true, because the server of {shard.url} sends whole files only"
    return ConfigError(
        [Problem("data.cache.remote", False, expected, "the file is then copied once")]
    )


class _Links(HTMLParser):
    """Collects what a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for key, value in attrs if key == "href" and value]


def _store_error(error: HTTPError) -> Exception:
    """The error of a `Store` that an HTTP status stands for."""
    said = f"HTTP {error.code} {error.reason}"
    # 404 is tried again a few times; see MISSING_TRIES.
    if error.code == 404:
        return FileNotFoundError(said)
    if error.code == 416:
        return PastEndError(said)
    if is_temporary(error.code):
        return OSError(said)
    return PermanentError(f"{said}; make sure that it may be read from here")


def _name(url: str) -> str:
    """The last part of a URL's path, decoded.

    >>> _name("https://host/a/part%201.jsonl?key=3")
    'part 1.jsonl'
    """
    return unquote(urlsplit(url).path.rstrip("/").rpartition("/")[2])


def _size(answer: HTTPResponse) -> int | None:
    """The size of the whole file, if the server tells it."""
    if answer.status == 206:
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        size = answer.headers.get("Content-Length", "")
    return int(size) if size.isdecimal() else None


def _first(answer: HTTPResponse) -> int | None:
    """The number in the file of the first byte of an answer to a range."""
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _tag(answer: HTTPResponse) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _drop(answer: HTTPResponse, count: int) -> None:
    """Read bytes that are not wanted."""
    while count:
        dropped = len(answer.read1(min(READ_BYTES, count)))
        if not dropped:
            raise OSError(f"the answer broke off {count} bytes before the ones that are wanted")
        count -= dropped
