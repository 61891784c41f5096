"""Where published files lie on this machine, and which of them are whole. Fetches nothing.

MEGALITH_HOME/hub/NAME/hub.json      written last: without it the folder is not whole
                       vocab.json …  the files
              .NAME.sha256           checksums of first downloads
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalith.errors import DataError
from megalith.hub.catalogue import Entry, File, entry_of, vocabulary_of

HOME = "MEGALITH_HOME"
MIRROR = "MEGALITH_HUB_URL"
OFFLINE = ("MEGALITH_OFFLINE", "HF_HUB_OFFLINE")
RECORD = "hub.json"
FORMAT_VERSION = 1


def hub_folder() -> Path:
    """`MEGALITH_HOME/hub`; the home is the user's cache, `~/.cache/megalith`, where the variable is not set."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get(HOME) or os.path.join(cache, "megalith")
    return Path(home).expanduser().absolute() / "hub"


def offline() -> str:
    """The variable that forbids the network, "" where none does."""
    no = ("", "0", "false", "no", "off")
    return next((name for name in OFFLINE if os.environ.get(name, "").lower() not in no), "")


def url_of(entry: Entry, file: File) -> str:
    """Where a file comes from: its publisher, or `MEGALITH_HUB_URL/NAME/FILE`."""
    mirror = os.environ.get(MIRROR, "").rstrip("/")
    return f"{mirror}/{entry.name}/{file.name}" if mirror else file.url


def installed(entry: Entry, root: Path) -> Path | None:
    """What a reader is given of a whole entry below `root`; None where it is not there, or a file of it is gone or cut."""
    folder = root / entry.name
    record = read_record(folder)
    if record.get("name") != entry.name:
        return None
    for name, size in record["files"].items():
        try:
            if (folder / name).stat().st_size != size:
                return None
        except OSError:
            return None
    return folder / entry.opens


def read_record(folder: Path) -> dict[str, Any]:
    """`hub.json` of a folder; {} where there is none of ours."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    ours = isinstance(record, dict) and record.get("format_version") == FORMAT_VERSION
    return record if ours and isinstance(record.get("files"), dict) else {}


def published_config(path: Path) -> Mapping[str, int] | None:
    """What the catalogue says of the model that a file or folder is of, as Megatron's arguments; None of others."""
    places = (path, path.parent, path.parent.parent)
    record = next(filter(None, map(read_record, places)), {})
    return record.get("config") or None


def by_hand(entry: Entry, root: Path) -> str:
    """What a person does who has no network here: every file, and where to put it."""
    parts = filter(None, (entry_of(entry.vocabulary), entry))
    lines = [
        f"fetch {url_of(part, file)} as {root / part.name / file.name}"
        for part in parts
        if installed(part, root) is None
        for file in part.files
    ]
    again = f"then, here: megalith hub download {entry.name}"
    return "\n      ".join(["by hand, where there is a network:", *lines, again])


def vocabulary_files(name: str) -> dict[str, str] | None:
    """`type`, `vocab_file` and `merge_file` of a published vocabulary; None where nothing is published by that name.

    Errors: `DataError` where it is not on this machine.
    """
    entry = vocabulary_of(name)
    if entry is None:
        return None
    folder = installed(entry, hub_folder())
    if folder is None:
        raise DataError(
            f"the vocabulary {entry.name} is not on this machine",
            where=f"tokenizer {name}",
            fix=f"megalith hub download {entry.name}, or give vocab_file (--vocab-file)",
        )
    files = {"type": entry.tokenizer, "vocab_file": str(folder / entry.files[0].name)}
    if len(entry.files) > 1:
        files["merge_file"] = str(folder / entry.files[1].name)
    return files
