"""Where a conversion goes: a folder that appears whole or not at all.

    DST.partial/ (and .DST.owner, which says who fills it) ─ fsync ─ rename ─▶ DST/

Knows names on the disk and who owns them. Knows nothing of what is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalith.checkpoint.files import free_bytes, readable_bytes, remove_tree, sync_folder
from megalith.checkpoint.layout import Owner, claim, owner_file, release, writer_of
from megalith.errors import CheckpointError

MARGIN = 8 << 20
"""Bytes for small files, names and blocks, when a conversion looks for room."""


@contextmanager
def publishing(target: Path, needed: int, *, part: str = "") -> Iterator[Path]:
    """An empty folder beside `target`, which gets that name when the block ends and is removed when the block fails. `part`: the
    file in it that gets the name instead.

    What a killed conversion to the same name left is removed first. Errors: `CheckpointError` for a `target` that exists, that
    another process writes, that does not fit on the disk (`needed` bytes), or that cannot be written.
    """
    parent, partial = target.parent, target.with_name(f"{target.name}.partial")
    _refuse_existing(target)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent, target.name, partial)
        free = free_bytes(parent)
        if free < needed + MARGIN:
            raise CheckpointError(
                f"the conversion needs {readable_bytes(needed + MARGIN)}, and {readable_bytes(free)} are free",
                where=str(target),
                fix="free disk space, or name a folder on another disk; nothing was written",
            )
        claim(parent, target.name)
        os.mkdir(partial)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield partial
        for folder, _, _ in os.walk(partial):
            sync_folder(Path(folder))
        _refuse_existing(target)
        os.rename(partial / part, target)
        sync_folder(parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        remove_tree(partial)
        release(parent, target.name)


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError(
            "it exists already", where=str(target), fix="name a new folder: nothing is overwritten"
        )


def _remove_leftovers(parent: Path, name: str, partial: Path) -> None:
    """Of a conversion that was killed. A folder of that name without word of who fills it is not ours."""
    owner = writer_of(parent, name)
    if owner is not None and owner != Owner.me():
        raise CheckpointError(
            f"process {owner.pid} on {owner.host} is writing it",
            where=str(parent / name),
            fix="wait for it, or name another folder",
        )
    if partial.exists() and not owner_file(parent, name).exists():
        raise CheckpointError(
            "it is in the way: a conversion would fill a folder of this name first",
            where=str(partial),
            fix="remove it, or name another folder",
        )
    remove_tree(partial)


def _unwritable(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the conversion failed ({error.strerror or error}); nothing of it is left",
        where=str(error.filename or target),
        fix="free disk space, or choose a folder that can be written; a file that became shorter was changed meanwhile",
    )
