"""Zips that would leave their folder, or hold more than they should: refused whole, nothing written."""

from __future__ import annotations

import io
import stat
import zipfile

import pytest

from megalith.errors import DataError
from megalith.hub.unpack import unpack


def zipped(path, members, method=zipfile.ZIP_DEFLATED):
    """`members`: names (or ZipInfo) and contents."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def of_mode(name, mode):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def test_files_and_folders(tmp_path):
    path = zipped(
        tmp_path / "a.zip", [("release/", ""), ("release/x/y.pt", b"1" * 9), ("tracker.txt", "release")]
    )
    said = []
    found = unpack(path, tmp_path / "out", lambda *told: said.append(told))
    assert [str(file.relative_to(tmp_path / "out")) for file in found] == ["release/x/y.pt", "tracker.txt"]
    assert said == [(9, 16), (16, 16)]
    assert (tmp_path / "out/release/x/y.pt").read_bytes() == b"1" * 9


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../up", "outside"),
        ("a/../../up", "outside"),
        ("/etc/absolute", "outside"),
        ("c:/windows", "outside"),
        ("a\\..\\..\\up", "outside"),
        (of_mode("link", stat.S_IFLNK | 0o777), "link or a device"),
        (of_mode("fifo", stat.S_IFIFO | 0o644), "link or a device"),
        ("GOOD", "is there twice"),
    ],
    ids=str,
)
def test_members_that_are_refused(tmp_path, name, words):
    path = zipped(tmp_path / "a.zip", [("good", b"1"), (name, b"/etc/passwd")])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=words):
        unpack(path, tmp_path / "out", print)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bomb(tmp_path):
    path = zipped(tmp_path / "a.zip", [("zeros", bytes(1 << 25))])
    with pytest.raises(DataError, match="33,554,432 bytes would come out of"):
        unpack(path, tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr("megalith.hub.unpack.MEMBERS", 5)
    path = zipped(tmp_path / "a.zip", [(str(i), b"") for i in range(6)])
    with pytest.raises(DataError, match="6 members"):
        unpack(path, tmp_path / "out", print)


def damaged():
    buffer = io.BytesIO()
    zipped(buffer, [("a", bytes(range(256)) * 9)], zipfile.ZIP_STORED)
    whole = buffer.getvalue()
    encrypted = bytearray(whole)
    encrypted[whole.rindex(b"PK\x01\x02") + 8] |= 1
    return {
        "no zip": b"<html>",
        "cut": whole[:-30],
        "flipped": whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
        "encrypted": bytes(encrypted),
    }


@pytest.mark.parametrize("kind", ["no zip", "cut", "flipped", "encrypted"])
def test_damage(tmp_path, kind):
    (tmp_path / "a.zip").write_bytes(damaged()[kind])
    with pytest.raises(DataError, match="encrypted" if kind == "encrypted" else "no zip that can be read"):
        unpack(tmp_path / "a.zip", tmp_path / "out", print)
