"""A proxy for an S3 server that can fail as servers and networks do."""

import threading
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HANDLED = {"expect", "connection"}
_NOT_FORWARDED = {"content-length", "connection", "transfer-encoding"}


class Proxy(ThreadingHTTPServer):
    """A proxy for the S3 server that can fail as servers and networks do.

    Attributes:
        fault: given a request, the failure to simulate, or ``None``.
        requests: (method, path, range) of all requests.
    """

    daemon_threads = True

    def __init__(self, server: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.server = server
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.fault: Callable[[Request], Any] = lambda request: None
        self.requests: list[tuple[str, str, str | None]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def parts(self, suffix: str) -> list[str]:
        """Ranges that were requested of files of a kind."""
        return [part for method, path, part in self.requests if method == "GET" and path.endswith(suffix)]


class Request(BaseHTTPRequestHandler):
    """One request; `Proxy.fault` may look at its ``command``, ``path`` and ``headers``."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        body = self._body()  # also of a request that fails, or the next one would begin in it
        fault = self.server.fault(self)
        if isinstance(fault, int):
            code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[fault]
            self._answer(fault, [], f"<Error><Code>{code}</Code></Error>".encode())
            return
        if fault == "stall":
            self.server.released.wait(10)
            self.close_connection = True
            return
        upstream = HTTPConnection(*self.server.server)
        upstream.request(
            self.command,
            self.path,
            body,
            {name: value for name, value in self.headers.items() if name.lower() not in _HANDLED},
        )
        answer = upstream.getresponse()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _NOT_FORWARDED]
        self._answer(answer.status, kept, answer.read(), answer.getheader("Content-Length"), cut=fault == "cut")
        upstream.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length")
        return self.rfile.read(int(length)) if length else None

    def _answer(self, status: int, headers: list, body: bytes, length: str | None = None, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in [*headers, ("Content-Length", length or str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *_: Any) -> None:
        pass
