"""A server of this machine in place of the publishers, and an empty home."""

from __future__ import annotations

import pytest

from megalith.hub import catalogue
from megalith.hub.store import HOME, MIRROR, OFFLINE
from tests.hub import published
from tests.hub.server import Site, serving


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """MEGALITH_HOME; no proxy, no mirror, and the network not forbidden."""
    for name in (*OFFLINE, MIRROR, "http_proxy", "HTTP_PROXY", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def site():
    with serving(Site()) as running:
        yield running


@pytest.fixture
def mirror(site, monkeypatch):
    """The entries of `published` in place of the catalogue, and a mirror that has their files."""
    monkeypatch.setattr(catalogue, "ENTRIES", published.ENTRIES)
    monkeypatch.setenv(MIRROR, site.url + "/")
    site.files |= published.MIRRORED
    return site
