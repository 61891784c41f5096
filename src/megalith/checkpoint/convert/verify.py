"""Whether a converted folder, or an archive, is still what its certificate says. Never imports torch.

Our own step folders list their certificate in the manifest: `checkpoint.manifest.verify` is theirs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from megalith.checkpoint.files import CHUNK, Progress, file_digests, regular_size
from megalith.checkpoint.formats.nemo_archive import SUFFIX, Member, open_archive
from megalith.checkpoint.manifest import MANIFEST, THREADS
from megalith.errors import CheckpointError

CERTIFICATE = "conversion.json"


def is_converted(folder: Path) -> bool:
    """Does a folder (or an archive) of another program's format hold the certificate of a conversion?"""
    if folder.is_file():
        return folder.suffix == SUFFIX and CERTIFICATE in open_archive(folder).members
    return (folder / CERTIFICATE).is_file() and not (folder / MANIFEST).exists()


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """File → bytes and sha256, by the certificate. Errors: `CheckpointError` where it is damaged."""
    path = folder / CERTIFICATE
    try:
        content = open_archive(folder).read(CERTIFICATE) if folder.is_file() else path.read_bytes()
        files = json.loads(content)["target"]["files"]
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
    if folder.is_file():
        return _problems_of_archive(folder, progress)
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
            problems.append(_changed(name, digest, files[name]))
    return problems


def _problems_of_archive(path: Path, progress: Progress | None) -> list[str]:
    """The same of members, which are read where they lie."""
    archive, problems = open_archive(path), []
    for name, record in recorded(path).items():
        member = archive.members.get(name)
        if member is None:
            problems.append(f"{name}: missing")
        elif member.length != record["bytes"]:
            problems.append(f"{name}: {member.length} bytes, the certificate says {record['bytes']}")
        elif (digest := _digest(member, progress)) != record["sha256"]:
            problems.append(_changed(name, digest, record))
    return problems


def _digest(member: Member, progress: Progress | None) -> str:
    digest, left = hashlib.sha256(), member.length
    with open(member.path, "rb") as file:
        file.seek(member.offset)
        while left and (block := file.read(min(CHUNK, left))):
            digest.update(block)
            left -= len(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def _changed(name: str, digest: str, record: dict[str, Any]) -> str:
    return f"{name}: its content changed (SHA-256 {digest[:12]}…, written as {record['sha256'][:12]}…)"
