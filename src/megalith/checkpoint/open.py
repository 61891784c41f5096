"""From what a user typed to a step folder.

Accepts a run folder, its `checkpoints` folder, a step folder or a file in it, the file `latest`, and the links of the retention.
Knows names on the disk only; a path that leads nowhere is answered with what there is instead.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from megalith.checkpoint.layout import LATEST, newest_complete, read_latest, step_folders, step_of
from megalith.checkpoint.manifest import MANIFEST, quick_problems
from megalith.errors import CheckpointError
from megalith.hub.catalogue import near as published

CHECKPOINTS = "checkpoints"
KINDS = (
    "what is looked for: checkpoints or manifest.json (a run or step folder), config.json (Hugging Face), "
    "latest_checkpointed_iteration.txt, mp_rank_… or .metadata (Megatron)"
)
"""How a folder shows what it is."""
SHOWN = 8
"""Names listed at most in an error."""


def resolve(path: str | Path) -> Path:
    """The step folder that `path` means, without links in its path. Raises `CheckpointError` with near names where there is none.

    For a run or a checkpoints folder this is what `latest` names, or where that is not complete, the complete one published
    last. Completeness here is the manifest, the set of files and their sizes; hashes are checked by the load.
    """
    given, found = Path(path).expanduser(), locate(path)
    if _is_step(found):
        return _complete(found)
    newest = _newest(found)
    if newest is None:
        raise _nothing_in(given, found)
    return newest


def resolve_all(path: str | Path) -> list[Path]:
    """Every step folder below a run or a checkpoints folder, or the one that `path` means; whole or damaged, by step."""
    given, found = Path(path).expanduser(), locate(path)
    folders = [found] if _is_step(found) else step_folders(found)
    if not folders:
        raise _nothing_in(given, found)
    return folders


def locate(path: str | Path) -> Path:
    """The step folder or checkpoints folder that `path` leads to, whether or not there is anything whole in it."""
    given = Path(path).expanduser()
    try:
        real = given.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise _not_there(given) from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot be followed ({getattr(error, 'strerror', None) or error})",
            where=str(given),
            fix="where it is a link that leads to itself, give the run folder instead",
        ) from error
    if not real.is_dir():
        return _from_file(given, real)
    inner = real / CHECKPOINTS
    return inner if not _is_step(real) and inner.is_dir() else real


def _is_step(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or step_of(folder.name) is not None


def _from_file(given: Path, real: Path) -> Path:
    if real.name == LATEST:
        named = read_latest(real.parent)
        if named is not None and named.is_dir():
            return named
        what = f"it names {named.name if named else 'no step folder'}, which is not here"
        raise CheckpointError(
            what, where=str(given), fix=f"give the folder it lies in; {_listing(real.parent)}"
        )
    for folder in (real.parent, real.parent.parent):
        if _is_step(folder):
            return folder
    raise CheckpointError(
        "is a file, not a checkpoint",
        where=str(given),
        fix=f"give a run folder or a step folder; {_listing(real.parent)}",
    )


def _complete(folder: Path) -> Path:
    problems = quick_problems(folder)[1]
    if problems:
        raise CheckpointError(
            "the checkpoint is damaged\n  " + "\n  ".join(problems[:SHOWN]),
            where=str(folder),
            fix="give the run folder, and the newest complete checkpoint is taken",
        )
    return folder


def _newest(root: Path) -> Path | None:
    named = read_latest(root)
    if named is not None and named.is_dir() and not quick_problems(named)[1]:
        return named
    return newest_complete(root)


def _nothing_in(given: Path, root: Path) -> CheckpointError:
    damaged = step_folders(root)
    if damaged:
        lines = [f"{folder.name}: {'; '.join(quick_problems(folder)[1][:2])}" for folder in damaged[-SHOWN:]]
        what = "\n    ".join(["none of its checkpoints is complete", *lines])
        return CheckpointError(what, where=str(given), fix="load another run, or start anew")
    runs = sorted(
        {p.parent.parent for depth in ("*", "*/*") for p in root.glob(f"{depth}/{CHECKPOINTS}/{LATEST}")}
    )
    if runs:
        some = ", ".join(str(given / run.relative_to(root)) for run in runs[:SHOWN])
        return CheckpointError("it holds runs, not a checkpoint", where=str(given), fix=f"give one of {some}")
    return CheckpointError(
        "there is no checkpoint in it",
        where=str(given),
        fix=f"give a run folder or a step folder; {_listing(root)}; {KINDS}",
    )


def _not_there(given: Path) -> CheckpointError:
    if given.is_symlink():
        return CheckpointError(
            f"is a link to {os.readlink(given)}, which is gone", where=str(given), fix=_listing(given.parent)
        )
    existing = given
    missing = given.name
    while not existing.is_dir():
        if existing.parent == existing:
            break
        missing, existing = existing.name, existing.parent
    here = sorted(entry.name for entry in os.scandir(existing)) if existing.is_dir() else []
    near = difflib.get_close_matches(missing, here, n=3, cutoff=0.6)
    meant = [*(str(existing / name) for name in near), *published(str(given), "model")]
    fix = f"did you mean {' or '.join(meant)}?" if meant else _listing(existing)
    return CheckpointError("there is no such file or folder", where=str(given), fix=fix)


def _listing(folder: Path) -> str:
    """What a folder holds, in words."""
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError:
        return f"{folder} cannot be read"
    if not entries:
        return f"{folder} is empty"
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return f"{folder} holds {', '.join(entries[:SHOWN])}{more}"
