"""What every process of a run must find alike, whichever host it runs on: configuration, data, and the run's folder.

Without these checks a run on two hosts waits for ever, or trains on two different things and says nothing. Each raises the
same error on all processes. Knows hosts by their names; changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from difflib import unified_diff
from pathlib import Path
from typing import Any

from megalith.errors import ConfigError, DataError, Problem
from megalith.topology.topology import gathered

SETTLING = 5.0
"""Seconds in which a network file system may show what another host has just written."""
SHOWN = 6
"""Lines of a difference that an error tells."""


def same_configuration(yaml: str) -> None:
    """Errors: `ConfigError` with the keys that differ between hosts, before anything is built on them."""
    if other := _other(yaml):
        first, host, theirs = other
        lines = unified_diff(first.splitlines(), theirs.splitlines(), n=0, lineterm="")
        what = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        shown = "\n    ".join(
            [f"{host} was started with another configuration (-: rank 0, +: {host})", *what[:SHOWN]]
        )
        raise ConfigError(
            [Problem("configuration", shown, "start every host with the same command and files")]
        )


def same_data(plan: dict[str, Any], tokenizer: str) -> None:
    """Errors: `DataError` where a host has other token files, or another tokenizer, under the same names."""
    if other := _other(json.dumps({"tokenizer": tokenizer, **plan}, sort_keys=True)):
        first, host, theirs = other
        mine, their = json.loads(first), json.loads(theirs)
        parts = ", ".join(key for key in mine if mine[key] != their.get(key))
        raise DataError(
            f"{host} reads something else than rank 0 under the same names: {parts}",
            where="model.data, model.tokenizer",
            fix="a folder that all hosts share, or the same files on each",
        )


def seen_by_all(path: Path, where: str, *, content: str | None = None) -> None:
    """Errors: `ConfigError` naming the hosts that do not find `path` (with this content), which rank 0 has there."""
    blind = [host for host, sees in gathered((socket.gethostname(), _sees(path, content))) if not sees]
    if blind:
        names = ", ".join(dict.fromkeys(blind))
        what = f"{names} do{'' if len(set(blind)) > 1 else 'es'} not see {path} of rank 0's host"
        raise ConfigError(
            [Problem(where, what, "a folder on a file system that all hosts share (NFS, Lustre, …)")]
        )


def _other(text: str) -> tuple[str, str, str] | None:
    """Rank 0's text, and a host whose processes have another one, with it; None where all have the same."""
    digests = gathered(hashlib.sha256(text.encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not different:
        return None
    texts: Sequence[tuple[str, str]] = gathered((socket.gethostname(), text))
    host, theirs = texts[different[0]]
    return texts[0][1], f"{host} (rank {different[0]})", theirs


def _sees(path: Path, content: str | None) -> bool:
    end = time.monotonic() + SETTLING
    while True:
        with suppress(OSError):
            os.listdir(path.parent)  # lets a network file system look again
            if path.exists() and (content is None or path.read_text(encoding="utf-8") == content):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
