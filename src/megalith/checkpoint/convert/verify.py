"""Whether a converted folder is still what its certificate says. Never imports torch.

Our own step folders list their certificate in the manifest: `checkpoint.manifest.verify` is theirs.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from megalith.checkpoint.files import Progress, file_digests, regular_size
from megalith.checkpoint.manifest import MANIFEST, THREADS
from megalith.errors import CheckpointError

CERTIFICATE = "conversion.json"


def is_converted(folder: Path) -> bool:
    """Does a folder of another program's format hold the certificate of a conversion?"""
    return (folder / CERTIFICATE).is_file() and not (folder / MANIFEST).exists()


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """File → bytes and sha256, by the certificate. Errors: `CheckpointError` where it is damaged."""
    path = folder / CERTIFICATE
    try:
        files = json.loads(path.read_bytes())["target"]["files"]
        found = {
            str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in files.items()
        }
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in found):
            raise ValueError("it names a file outside its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"it is not the certificate of a conversion ({error})", where=str(path), fix="convert again"
        ) from None
    return found


def problems_of_conversion(folder: Path, progress: Progress | None = None) -> list[str]:
    """Everything in which a folder differs from its certificate, one line each."""
    files, problems, sizes = recorded(folder), [], {}
    for name, record in files.items():
        try:
            sizes[name] = regular_size(folder / name)
        except OSError as error:
            problems.append(f"{name}: {'missing' if isinstance(error, FileNotFoundError) else error}")
            continue
        if sizes[name] != record["bytes"]:
            problems.append(f"{name}: {sizes.pop(name)} bytes, the certificate says {record['bytes']}")
    digests = file_digests([folder / name for name in sizes], threads=THREADS, progress=progress)
    for name, digest in zip(sizes, digests, strict=True):
        if isinstance(digest, OSError):
            problems.append(f"{name}: cannot be read ({digest.strerror or digest})")
        elif digest != files[name]["sha256"]:
            problems.append(
                f"{name}: its content changed (SHA-256 {digest[:12]}…, written as {files[name]['sha256'][:12]}…)"
            )
    return problems
