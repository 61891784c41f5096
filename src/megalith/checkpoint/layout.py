"""What a checkpoints folder holds, by name, and which of it is whole, abandoned, or someone else's.

    checkpoints/
      step_0001000/            complete: its manifest is its proof         step_0001000.partial/   being written
      step_0000500.old/        being replaced by a save of the same step   step_0000100.deleted/   being removed
      latest                   the name of the folder published last       .step_0001000.owner     who writes the partial one
      NAME--val_loss=3.21-…    links that people read; nothing here follows them

Knows names, owners and the order of publication. Knows nothing of tensors, and never imports torch.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from megalith.checkpoint.files import remove_tree, replace_file, sync_folder
from megalith.checkpoint.manifest import Manifest, ManifestError, quick_problems, read_manifest, verify

LATEST = "latest"
_STEP = re.compile(r"step_(\d{7,})")
_UNFINISHED = re.compile(r"(step_\d{7,})\.(partial|old|deleted)")
_TEMPORARY = re.compile(r"\.(step_\d{7,})\.(manifest|link)|\.latest")
_OWNER = re.compile(r"\.(step_\d{7,})\.owner")
ABANDONED_AFTER = 3600.0
"""Seconds without a change after which an unfinished folder of a process on another machine counts as abandoned."""


def step_name(step: int) -> str:
    """`1000` → `step_0001000`."""
    return f"step_{step:07d}"


def step_of(name: str) -> int | None:
    """`step_0001000` → 1000; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> list[Path]:
    """The published folders of `root`, by step. Those whose replacement was cut short (`.old` alone) count too."""
    if not root.is_dir():
        return []
    names = {entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)}
    current = {name for name in names if step_of(name) is not None}
    stranded = {
        name
        for name in names
        if name.endswith(".old") and step_of(name[:-4]) is not None and name[:-4] not in names
    }
    return [
        root / name for name in sorted(current | stranded, key=lambda n: (len(n.removesuffix(".old")), n))
    ]


def read_latest(root: Path) -> Path | None:
    """The folder that `latest` names, or None where there is no such file or it names nothing that could be one."""
    try:
        name = (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return root / name if step_of(name) is not None else None


def write_latest(root: Path, folder: Path) -> None:
    """Lets `latest` name `folder`, at once and durably."""
    replace_file(root / LATEST, f"{folder.name}\n".encode(), temporary=root / ".latest")


def by_publication(root: Path) -> list[tuple[Path, Manifest | None]]:
    """The step folders of `root` with their manifests, the one published last first; unreadable manifests at their step."""
    read: list[tuple[Path, Manifest | None]] = []
    for folder in step_folders(root):
        try:
            read.append((folder, read_manifest(folder)))
        except ManifestError:
            read.append((folder, None))
    sequence = 0
    keyed: list[tuple[int, int, Path, Manifest | None]] = []
    for number, (folder, manifest) in enumerate(read):
        sequence = manifest.sequence if manifest else sequence
        keyed.append((sequence, number, folder, manifest))
    return [(folder, manifest) for _, _, folder, manifest in sorted(keyed, key=lambda k: k[:2], reverse=True)]


def next_sequence(root: Path) -> int:
    """One more than any save of `root` has had."""
    return 1 + max((m.sequence for _, m in by_publication(root) if m), default=0)


def newest_complete(root: Path) -> Path | None:
    """The folder published last whose set of files and sizes are right; content is not read."""
    for folder, _ in by_publication(root):
        if not quick_problems(folder)[1]:
            return folder
    return None


def newest_verified(root: Path) -> tuple[Path | None, list[str]]:
    """The folder published last that is whole to the last bit, and what was passed over to reach it (one line each).

    `(None, notices)` where none is; a `root` that does not exist has none. Changes nothing on the disk.
    """
    notices: list[str] = []
    for folder, _ in by_publication(Path(root)):
        problems = verify(folder)
        if not problems:
            if notices:
                notices.append(f"going on from {folder.name}, the newest checkpoint that is whole")
            return folder, notices
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        notices.append(f"{folder} is damaged: {'; '.join(problems[:3])}{more}")
    return None, notices


# Owners -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """A process: machine, number, and when it started (numbers are used again)."""

    host: str
    pid: int
    started: str

    @staticmethod
    def me() -> Owner:
        """This process."""
        return Owner(socket.gethostname(), os.getpid(), _start_time(os.getpid()))

    @property
    def here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether it still runs; only asked of a process of this machine."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return self.started == _start_time(self.pid)


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where the system does not tell or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def owner_file(root: Path, name: str) -> Path:
    """Where the owner of the unfinished folder of `name` (`step_0001000`) is written down."""
    return root / f".{name}.owner"


def claim(root: Path, name: str) -> None:
    """Writes down that this process is about to write `name`."""
    me = Owner.me()
    content = json.dumps({"host": me.host, "pid": me.pid, "started": me.started}).encode()
    path = owner_file(root, name)
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def release(root: Path, name: str) -> None:
    """Takes the claim back."""
    owner_file(root, name).unlink(missing_ok=True)


def writer_of(root: Path, name: str) -> Owner | None:
    """The process that may still be writing `name`: None when there is none, or it has ended."""
    try:
        content = json.loads(owner_file(root, name).read_bytes())
        owner = Owner(str(content["host"]), int(content["pid"]), str(content["started"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if owner.here:
        return owner if owner.alive else None
    return owner if time.time() - _last_change(root, name) < ABANDONED_AFTER else None


def _last_change(root: Path, name: str) -> float:
    partial = root / f"{name}.partial"
    times = [0.0]
    for path in (owner_file(root, name), partial, *partial.glob("*")):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times)


def clean_leftovers(root: Path) -> list[str]:
    """Removes what processes that died had begun to write or to remove, and says what of it were saves (one line each).

    Only names that we write are touched, and nothing that a process may still be writing. A folder whose replacement was
    cut short is whole and keeps its `.old` name, by which a run may be about to load it, until `restore_replaced`.
    """
    if not root.is_dir():
        return []
    entries = sorted(os.scandir(root), key=lambda e: e.name)
    claims = [match[1] for entry in entries if (match := _OWNER.fullmatch(entry.name))]
    busy = any(writer_of(root, name) for name in claims)
    notices: list[str] = []
    for entry in entries:
        unfinished = _UNFINISHED.fullmatch(entry.name)
        if unfinished and entry.is_dir(follow_symlinks=False):
            if unfinished[2] == "partial":
                notices.append(_end_partial(root, unfinished[1]))
            elif not busy and (unfinished[2] == "deleted" or (root / unfinished[1]).exists()):
                remove_tree(Path(entry.path))
        elif _TEMPORARY.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False) and not busy:
            Path(entry.path).unlink(missing_ok=True)
    for name in claims:
        if writer_of(root, name) is None:
            release(root, name)
    return notices


def _end_partial(root: Path, name: str) -> str:
    folder, owner = root / f"{name}.partial", writer_of(root, name)
    if owner is not None:
        return f"{folder} is left alone: process {owner.pid} on {owner.host} may be writing it"
    remove_tree(folder)
    return f"removed {folder}, an unfinished save of a process that ended"


def restore_replaced(root: Path) -> list[str]:
    """Gives folders whose replacement was cut short their names back, and says so (one line each)."""
    notices = []
    for folder in step_folders(root):
        name = folder.name.removesuffix(".old")
        if name != folder.name and writer_of(root, name) in (None, Owner.me()):
            os.rename(folder, root / name)
            sync_folder(root)
            notices.append(f"{folder} is {name} again: the save that should have replaced it did not finish")
    return notices
