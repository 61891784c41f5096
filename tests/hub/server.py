"""A web server of this machine that misbehaves as it is told, and remembers what it was asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """`files`: path → content. `cuts`: how many bytes of the next answers are sent before the connection breaks.

    `answers`: status codes of the next answers instead of the file. `gate`: an answer waits for it after its first half.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    ranges: bool = True
    tag: str = '"v1"'
    length: bool = True
    kind: str = "application/octet-stream"
    redirects: dict[str, str] = field(default_factory=dict)
    gate: threading.Event | None = None
    halfway: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    @property
    def spans(self) -> list[str]:
        """The Range of each question, "" where the whole was asked for."""
        return [span for _, span in self.asked]


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""

    def do_GET(self) -> None:
        site, span = self.site, self.headers.get("Range", "")
        site.asked.append((self.path, span))
        if target := site.redirects.get(self.path):
            return self.say(302, {"Location": target})
        if site.answers:
            return self.say(site.answers.pop(0), {"Retry-After": "0"})
        content = site.files.get(self.path)
        if content is None:
            return self.say(404, {})
        start, total = 0, len(content)
        same = site.tag and self.headers.get("If-Range") == site.tag
        if span and site.ranges and same:
            start = int(span.removeprefix("bytes=").rstrip("-"))
            if start >= total:
                return self.say(416, {"Content-Range": f"bytes */{total}"})
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", site.kind)
        if site.length:
            self.send_header("Content-Length", str(total - start))
        if site.tag:
            self.send_header("ETag", site.tag)
        self.end_headers()
        with suppress(ConnectionError):
            self.send(content[start:])

    def say(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, content: bytes) -> None:
        site = self.site
        if site.cuts:
            self.wfile.write(content[: site.cuts.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        middle = len(content) // 2
        self.wfile.write(content[:middle])
        self.wfile.flush()
        site.halfway.set()
        if site.gate is not None:
            site.gate.wait(20)
        self.wfile.write(content[middle:])


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Within, `site` is at `site.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"site": site}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        if site.gate is not None:
            site.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
