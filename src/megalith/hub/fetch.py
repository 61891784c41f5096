"""One file over HTTP, whole or not at all: goes on where it stopped, waits for a server that is busy, and gives up in words.

    FILE.part       what has come
    FILE.part.from  of which version of the file it is: without that a rest could be of another one, and is not asked for

Knows no catalogue and no checksum.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from megalith import __version__
from megalith.errors import DataError

Report = Callable[[int, int | None], None]
"""Told the bytes that have come, and all bytes where the server says."""
CHUNK = 1 << 20
GAINED = 1 << 16
"""Bytes that make a try worth counting anew."""
SECURE, WEB = ("https://",), ("https://", "http://")
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
ROOM = "make room, or name another folder with MEGALITH_HOME or --to"


@dataclass(frozen=True)
class Patience:
    """`timeout` seconds of silence end a try; `tries` in a row that bring nothing end the download; pauses double."""

    timeout: float = 30.0
    tries: int = 4
    pause: float = 1.0
    longest: float = 60.0


def _nobody(text: str) -> None:
    """Is told."""


@dataclass(frozen=True)
class Source:
    """Where a file comes from, what to do by hand where it does not, how many times its size it needs on the disk, and who
    hears of another try."""

    url: str
    fix: str = ""
    room: int = 1
    notice: Callable[[str], None] = _nobody

    def refusal(self, what: str, fix: str = "") -> DataError:
        """An error about it."""
        return DataError(what, where=self.url, fix=fix or self.fix)


class _Interrupted(Exception):
    """A try that another may mend; after `wait` seconds, where the server says so."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class _Redirects(HTTPRedirectHandler):
    """Follows redirections, but from an encrypted connection to none that is not."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if not newurl.startswith(SECURE if req.full_url.startswith(SECURE) else WEB):
            raise HTTPError(newurl, 403, "a redirection away from the web, or from https", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(source: Source, part: Path, report: Report, patience: Patience | None = None) -> None:
    """Fills `part` with the whole file; what an earlier try left in it is kept where the server still has the same file.

    Errors: `DataError` where the server does not have it or cannot be reached, and where the disk has no room.
    """
    patience, failures = patience or Patience(), 0
    while True:
        before = _size(part)
        try:
            return _try(source, part, report, patience.timeout)
        except _Interrupted as stopped:
            failures = 1 if _size(part) >= before + GAINED else failures + 1
            if failures >= patience.tries:
                kept = f"; {_size(part):,} bytes are kept for the next time" if _resumable(part)[0] else ""
                raise source.refusal(f"cannot be fetched: {stopped}{kept}") from None
            pause = patience.pause * 2 ** (failures - 1) if stopped.wait is None else stopped.wait
            pause = min(pause, patience.longest)
            source.notice(f"{stopped}; trying again in {pause:g} s")
            time.sleep(pause)


def _try(source: Source, part: Path, report: Report, timeout: float) -> None:
    if not source.url.startswith(WEB):
        raise source.refusal("is no address of the web")
    start, version = _resumable(part)
    headers = {"User-Agent": f"megalith/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    try:
        opened = build_opener(_Redirects).open(Request(source.url, headers=headers), timeout=timeout)
    except HTTPError as error:
        with closing(error):
            return _refused(source, part, error)
    except ValueError as error:
        raise source.refusal(f"is no address ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(source, error) from None
    with opened as response:
        if response.headers.get_content_type() == "text/html":
            raise source.refusal(
                "a web page came instead of the file: a proxy's, or one that asks to log in?"
            )
        total = _total(response.status, response.headers, start)
        if response.status != 206:
            start = 0
            forget(part)
        _check_room(source, part, None if total is None else (total - start) + total * (source.room - 1))
        with _writing(source):
            _remember(part, response.headers)
        _read(response, source, part, lambda done: report(done, total), keep=start > 0, total=total)


def _total(status: int, headers: Message, start: int) -> int | None:
    """Bytes of the whole file. A rest that begins elsewhere than asked is not used."""
    if status != 206:
        length = headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None
    span, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if span.partition("-")[0] != str(start) or not total.isdecimal():
        raise _Interrupted("the server sent another part than was asked for")
    return int(total)


def _read(
    response: http.client.HTTPResponse,
    source: Source,
    part: Path,
    report: Callable[[int], None],
    *,
    keep: bool,
    total: int | None,
) -> None:
    with _writing(source), open(part, "ab" if keep else "wb") as file:
        done = file.tell()
        report(done)
        while chunk := _chunk(response):
            file.write(chunk)
            done += len(chunk)
            report(done)
        file.flush()
        with suppress(OSError):
            os.fsync(file.fileno())
    if total is not None and done != total:
        raise _Interrupted(f"the connection ended after {done:,} of {total:,} bytes")


def _chunk(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)  # what there is: a broken connection loses nothing that had come
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"the connection broke ({_words(error)})") from None


@contextmanager
def _writing(source: Source) -> Iterator[None]:
    """What the disk refuses, in words."""
    try:
        yield
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise source.refusal(what, f"{ROOM}; then the same again goes on") from None


def _refused(source: Source, part: Path, error: HTTPError) -> None:
    """What the server said instead of the file."""
    if error.code == 416:  # nothing behind what we have: it is whole, or of another file
        if error.headers.get("Content-Range", "") == f"bytes */{_size(part)}":
            return
        forget(part)
        raise _Interrupted("the file on the server has changed")
    if error.code in BUSY:
        wait = error.headers.get("Retry-After", "")
        raise _Interrupted(
            f"the server says {error.code} {error.reason}", float(wait) if wait.isdecimal() else None
        )
    said = {
        401: "it asks to log in",
        403: "it refuses",
        404: "there is no such file any more",
        407: "the proxy asks to log in",
        410: "there is no such file any more",
    }.get(error.code, "it cannot say why")
    raise source.refusal(f"the server says {error.code} {error.reason}: {said}") from None


def _unreachable(source: Source, error: Exception) -> Exception:
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return source.refusal(
            f"its certificate is not trusted ({reason.verify_message}): a proxy that looks into connections has its own",
            "name that certificate with SSL_CERT_FILE; or " + source.fix,
        )
    return _Interrupted(f"no connection ({_words(reason)})")


def _words(error: object) -> str:
    said = getattr(error, "strerror", None) or str(error)
    return str(said) or type(error).__name__


def _check_room(source: Source, part: Path, needed: int | None) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed is not None and needed > free:
        what = f"{needed / 1e6:,.0f} MB are needed in {part.parent}, {free / 1e6:,.0f} MB are free"
        raise source.refusal(what, ROOM)


# ---- what an earlier try left ----


def forget(part: Path) -> None:
    """Removes a partial file and what is known of it."""
    for path in (part, _notes(part)):
        path.unlink(missing_ok=True)


def _resumable(part: Path) -> tuple[int, str]:
    """(bytes that need not come again, the version of the file that they are of)."""
    try:
        version = json.loads(_notes(part).read_bytes())["version"]
    except (OSError, ValueError, LookupError, TypeError):
        return 0, ""
    return (_size(part), version) if isinstance(version, str) and version else (0, "")


def _remember(part: Path, headers: Message) -> None:
    """Keeps what names this version of the file: a strong ETag, else its date."""
    tag = headers.get("ETag", "")
    version = headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
    _notes(part).write_text(json.dumps({"version": version}), encoding="utf-8")


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".from")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
