"""One file over HTTP: what is resumed, what is tried again, what is refused, and in which words."""

from __future__ import annotations

import json
import shutil
import socket
from email.message import Message
from urllib.error import HTTPError
from urllib.request import Request

import pytest

from megalith.errors import DataError
from megalith.hub.fetch import GAINED, Patience, Source, _Redirects, fetch

CONTENT = bytes(range(256)) * 1024
QUICK = Patience(timeout=5, tries=3, pause=0.001)


class Download:
    """`part` in a folder of its own, and what was told of it."""

    def __init__(self, site, folder):
        site.files["/f"] = CONTENT
        self.part, self.source = folder / "f.part", Source(f"{site.url}/f", fix="by hand")
        self.told, self.notices = [], []

    def run(self, patience=QUICK, **changes):
        source = Source(
            **{"url": self.source.url, "fix": "by hand", "notice": self.notices.append, **changes}
        )
        fetch(source, self.part, lambda done, total: self.told.append((done, total)), patience)
        return self.part.read_bytes()


@pytest.fixture
def download(site, tmp_path):
    return Download(site, tmp_path)


def refusal(download, **changes):
    with pytest.raises(DataError) as caught:
        download.run(**changes)
    return caught.value.problem


def test_a_whole_file(site, download):
    assert download.run() == CONTENT
    assert site.spans == [""]
    assert download.told[0] == (0, len(CONTENT))
    assert download.told[-1] == (len(CONTENT), len(CONTENT))


def test_a_broken_connection_goes_on_where_it_stopped(site, download):
    site.cuts = [100_000, 50_000]
    assert download.run() == CONTENT
    assert site.spans == ["", "bytes=100000-", "bytes=150000-"]
    assert "trying again in" in download.notices[0]
    assert "after 100,000 of 262,144 bytes" in download.notices[0]


def test_a_server_that_does_not_say_how_long(site, download):
    site.length = False
    assert download.run() == CONTENT
    assert download.told[-1] == (len(CONTENT), None)


def test_an_earlier_process_is_continued(site, download):
    site.cuts = [100_000]
    with pytest.raises(DataError, match="100,000 bytes are kept for the next time"):
        download.run(Patience(timeout=5, tries=1))
    assert download.run() == CONTENT
    assert site.spans == ["", "bytes=100000-"]


def test_a_file_that_changed_meanwhile_comes_anew(site, download):
    site.cuts = [100_000]
    with pytest.raises(DataError):
        download.run(Patience(timeout=5, tries=1))
    site.tag, site.files["/f"] = '"v2"', CONTENT[::-1]
    assert download.run() == CONTENT[::-1]


@pytest.mark.parametrize("change", [{"ranges": False}, {"tag": ""}, {"tag": 'W/"weak"'}])
def test_where_a_rest_cannot_be_asked_for_all_comes_again(site, download, change):
    for name, value in change.items():
        setattr(site, name, value)
    site.cuts = [100_000]
    assert download.run() == CONTENT
    assert len(site.asked) == 2
    assert site.spans[1] == ("bytes=100000-" if "ranges" in change else "")


def test_a_server_that_never_gets_far_is_given_up(site, download):
    site.cuts = [GAINED - 1] * 9
    problem = refusal(download)
    assert len(site.asked) == 3
    assert "cannot be fetched: the connection ended after" in problem.what
    assert (problem.where, problem.fix) == (download.source.url, "by hand")


def test_one_that_gets_on_is_not(site, download):
    site.cuts = [GAINED] * 3
    assert download.run(Patience(timeout=5, tries=2, pause=0.001)) == CONTENT


def test_a_file_that_was_whole_already(site, download):
    download.part.write_bytes(CONTENT)
    (download.part.parent / "f.part.from").write_text(json.dumps({"version": site.tag}))
    assert download.run() == CONTENT
    assert site.spans == [f"bytes={len(CONTENT)}-"]


def test_one_that_is_longer_than_the_server_s_comes_anew(site, download):
    download.part.write_bytes(CONTENT + b"more")
    (download.part.parent / "f.part.from").write_text(json.dumps({"version": site.tag}))
    assert download.run() == CONTENT


@pytest.mark.parametrize("notes", ["", "[]", "{", '{"version": 3}'])
def test_a_rest_of_nobody_knows_what_is_not_used(site, download, notes):
    download.part.write_bytes(b"something else")
    (download.part.parent / "f.part.from").write_text(notes)
    assert download.run() == CONTENT
    assert site.spans == [""]


def test_a_busy_server_is_asked_again(site, download):
    site.answers = [503, 429]
    assert download.run() == CONTENT
    assert "the server says 503" in download.notices[0]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, "404 Not Found: there is no such file any more"),
        (401, "asks to log in"),
        (403, "it refuses"),
        (407, "the proxy asks to log in"),
        (418, "it cannot say why"),
    ],
)
def test_a_server_that_says_no_is_asked_once(site, download, status, words):
    site.answers = [status]
    problem = refusal(download)
    assert words in problem.what
    assert problem.fix == "by hand"
    assert len(site.asked) == 1


def test_redirections_are_followed_and_keep_the_range(site, download):
    site.files["/else"] = CONTENT
    site.redirects, site.cuts = {"/f": "/else"}, [100_000]
    assert download.run() == CONTENT
    assert site.asked == [("/f", ""), ("/else", ""), ("/f", "bytes=100000-"), ("/else", "bytes=100000-")]


def test_no_redirection_leaves_https():
    ask = Request("https://a.example/f")
    with pytest.raises(HTTPError, match="or from https"):
        _Redirects().redirect_request(ask, None, 302, "Found", Message(), "http://a.example/f")
    assert _Redirects().redirect_request(ask, None, 302, "Found", Message(), "https://b.example/f").full_url


def test_a_web_page_is_not_the_file(site, download):
    site.kind = "text/html; charset=utf-8"
    assert "a web page came instead" in refusal(download).what
    assert not download.part.exists()


def test_no_server(download, site):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/f"
    problem = refusal(download, url=url)
    assert "no connection (Connection refused)" in problem.what
    assert len(download.notices) == 2


def test_a_silent_server(download, site):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/f"
        problem = refusal(download, url=url, patience=Patience(timeout=0.05, tries=2, pause=0.001))
    assert "timed out" in problem.what


@pytest.mark.parametrize("url", ["/nowhere", "nonsense", "http://[::1", "file:///etc/hostname", "ftp:/x"])
def test_what_is_no_address(download, url):
    assert refusal(download, url=url).where == url
    assert not download.part.exists()


def test_a_disk_without_room_is_told_before_anything_comes(site, download, monkeypatch):
    usage = shutil.disk_usage(download.part.parent)._replace(free=400_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert download.run() == CONTENT
    download.part.unlink()
    problem = refusal(download, room=2)
    assert "1 MB are needed" in problem.what
    assert "MEGALITH_HOME" in problem.fix


def test_a_disk_that_fills_up(site, download, monkeypatch):
    monkeypatch.setattr("megalith.hub.fetch.forget", lambda part: None)
    download.part.symlink_to("/dev/full")
    problem = refusal(download)
    assert "cannot be written: No space left on device" in problem.what
    assert "make room" in problem.fix
