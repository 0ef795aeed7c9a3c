"""A web server on this machine that fails as often as it is told to, always in the same way."""

import os
import socket
import struct
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from xxhash import xxh3_64_intdigest

FAULTS = ("busy", "missing", "reset", "truncated", "short", "shifted", "stall")

STATUS = {"busy": 503, "missing": 404, "forbidden": 403}


class Served(NamedTuple):
    """One request for a path: the first byte asked for, the bytes sent, what went wrong, if so."""

    path: str
    start: int
    sent: int
    fault: str | None


@dataclass
class Behaviour:
    """How a server answers; it may be changed while it runs.

    Attributes:
        rate: of requests that fail.
        faults: how: `busy` 503, `missing` 404, `reset` the connection after half of the body,
            `truncated` half of the body that was promised, `short` half of the range, promised
            so, `shifted` a range that begins a byte early, `stall` half of the body and then
            nothing for `stall_s` seconds; not in `FAULTS`, for no try mends it: `forbidden` 403.
        seed: decides which of a path's requests fail and how.
        ranges: whether ranges are understood; if not, a file is always sent as a whole.
        tags: whether files have an ETag.
        password: `user:password` that each request needs; None: none.
        elsewhere: the address of another server to which every request is redirected.
    """

    rate: float = 0.0
    faults: tuple[str, ...] = FAULTS
    seed: int = 0
    stall_s: float = 10.0
    ranges: bool = True
    tags: bool = True
    password: str | None = None
    elsewhere: str | None = None

    def fault(self, path: str, count: int) -> str | None:
        """What goes wrong with a path's `count`th request."""
        drawn = xxh3_64_intdigest(f"{path} {count}".encode(), self.seed)
        if drawn >= self.rate * 2**64:
            return None
        return self.faults[xxh3_64_intdigest(str(drawn).encode()) % len(self.faults)]


@dataclass
class FaultServer:
    """Serves a folder while it is entered.

    Attributes:
        served: every request, in the order in which the answers began.
        authorizations: the header of every request; None where there was none.
    """

    folder: Path
    behaviour: Behaviour
    url: str = ""
    served: list[Served] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)

    def sent(self, path: str) -> int:
        """Bytes of a path's body, such as `/a.txt`, that went out."""
        return sum(s.sent for s in self.served if s.path == path)

    def requests(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(s.path == path for s in self.served)

    @property
    def faults(self) -> Counter[str]:
        """How often each fault happened."""
        return Counter(s.fault for s in self.served if s.fault)


@dataclass(frozen=True)
class Answer:
    """What is sent: the body, and how much of it was promised if that is not its length."""

    status: int
    body: bytes = b""
    start: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    promised: int | None = None
    fault: str | None = None


@contextmanager
def serving(folder: Path, **behaviour: object) -> Iterator[FaultServer]:
    """Serves a folder with a `Behaviour` as long as it is entered."""
    state = FaultServer(folder, Behaviour(**behaviour))  # type: ignore[arg-type]
    over = threading.Event()
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    class Bound(_Handler):
        server_state, server_over, server_counts, server_lock = state, over, counts, lock

    with ThreadingHTTPServer(("127.0.0.1", 0), Bound) as server:
        server.daemon_threads = False
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield state
        finally:
            over.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FaultServer
    server_over: threading.Event
    server_counts: Counter[str]
    server_lock: threading.Lock

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self.close_connection = True
        path = unquote(self.path.partition("?")[0])
        with self.server_lock:
            count = self.server_counts[path]
            self.server_counts[path] += 1
        answer = self._refusal() or self._answer(
            path, self.server_state.behaviour.fault(path, count)
        )
        # Noted first, so that a client that has it all can rely on the notes.
        self.server_state.served.append(Served(path, answer.start, len(answer.body), answer.fault))
        with suppress(BrokenPipeError, ConnectionResetError):  # the client left
            self._send(answer)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _refusal(self) -> Answer | None:
        behaviour = self.server_state.behaviour
        given = self.headers.get("Authorization")
        self.server_state.authorizations.append(given)
        if behaviour.password is not None:
            basic = b64encode(behaviour.password.encode()).decode()
            if given != f"Basic {basic}":
                return Answer(401)
        if behaviour.elsewhere is not None:
            return Answer(302, headers={"Location": behaviour.elsewhere + self.path})
        return None

    def _answer(self, path: str, fault: str | None) -> Answer:
        target = self.server_state.folder / path.lstrip("/")
        if fault in STATUS:
            return Answer(STATUS[fault], fault=fault)
        if target.is_dir() and not path.endswith("/"):
            return Answer(301, headers={"Location": quote(path) + "/"})
        if target.is_dir():
            return _broken(Answer(200, _page(target), headers={"Content-Type": "text/html"}), fault)
        if not target.is_file():
            return Answer(404)
        return _broken(self._file(target, fault), fault)

    def _file(self, target: Path, fault: str | None) -> Answer:
        size = target.stat().st_size
        behaviour = self.server_state.behaviour
        tag = f'"{target.stat().st_mtime_ns}-{size}"'
        headers = {"ETag": tag} if behaviour.tags else {}
        wanted = self.headers.get("Range")
        if wanted is None or not behaviour.ranges:
            return Answer(200, target.read_bytes(), headers=headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or size) + 1, size)
        if start >= size:
            return Answer(416, headers={"Content-Range": f"bytes */{size}"})
        if fault == "short":
            stop = start + (stop - start + 1) // 2
        if fault == "shifted":
            start = max(0, start - 1)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with target.open("rb") as file:
            file.seek(start)
            return Answer(206, file.read(stop - start), start, headers)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        length = str(len(answer.body) if answer.promised is None else answer.promised)
        own = {"Content-Length": length, "Connection": "close"}
        for name, value in (own | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.body)
        if answer.fault == "stall":
            self.server_over.wait(self.server_state.behaviour.stall_s)
        if answer.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())


def _broken(answer: Answer, fault: str | None) -> Answer:
    """An answer of which half of the body comes, if the fault is one that breaks it off."""
    if fault not in ("reset", "truncated", "stall"):
        return replace(answer, fault=fault)
    half = answer.body[: len(answer.body) // 2]
    return replace(answer, body=half, promised=len(answer.body), fault=fault)


def _page(folder: Path) -> bytes:
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return "".join(f'<a href="{quote(name)}">{escape(name)}</a>\n' for name in names).encode()
