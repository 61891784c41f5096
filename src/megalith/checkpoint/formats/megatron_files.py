"""Where a Megatron checkpoint's files lie: the tracker, iterations, a folder for each rank; or one file; or torch_dist.

    latest_checkpointed_iteration.txt ─▶ iter_0001000 or release ─▶ mp_rank_TT[_PPP]/model_optim_rng.pt

Knows names on the disk and the first bytes of a file. What is in the files is `megatron`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megalith.checkpoint.pickles.distributed import is_distributed
from megalith.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
"""The second: where the optimizer lies in files of its own."""
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
_ITERATION = re.compile(r"iter_\d{7,}|release")
_TORCH = re.compile(r".*\.(pt|pth|ckpt|bin)")


@dataclass(frozen=True)
class Grid:
    """`files[p][t]`: the file of tensor-parallel rank t in pipeline stage p."""

    files: tuple[tuple[Path, ...], ...]

    @property
    def sizes(self) -> tuple[int, int]:
        """(tensor-parallel ranks, pipeline stages)."""
        return len(self.files[0]), len(self.files)


def locate(path: Path) -> Path | None:
    """The iteration's folder, the torch_dist folder or the file that a path means; None where nothing of it is Megatron's.

    A rank's folder or file stands for all of its iteration. Errors: `CheckpointError` for a tracker that leads nowhere.
    """
    if path.is_file():
        return _locate_file(path)
    if not path.is_dir():
        return None
    real = path.resolve()
    if (real / TRACKER).is_file():
        return _tracked(real)
    if is_distributed(real) or ((real / "metadata.json").is_file() and (real / "common.pt").is_file()):
        return real
    if _RANK.fullmatch(real.name) and _rank_file(real) is not None:
        return real.parent
    if any(_rank_file(folder) for folder in _rank_folders(real)):
        return real
    iterations = sorted(entry.name for entry in real.iterdir() if _ITERATION.fullmatch(entry.name))
    if iterations:
        raise CheckpointError(
            f"there is no {TRACKER}, which says which iteration is complete",
            where=str(path),
            fix=f"give one of {', '.join(str(path / name) for name in iterations[-8:])}",
        )
    return None


def _locate_file(path: Path) -> Path | None:
    real = path.resolve()
    if real.name == TRACKER:
        return _tracked(real.parent)
    if real.name in RANK_FILES and _RANK.fullmatch(real.parent.name):
        return real.parent.parent
    if is_distributed(real.parent) and (real.suffix == ".distcp" or real.name in (".metadata", "common.pt")):
        return real.parent
    return real if _TORCH.fullmatch(real.name) else None


def _tracked(root: Path) -> Path:
    said = (root / TRACKER).read_bytes()[:200].decode(errors="replace").strip()
    where, here = str(root / TRACKER), _names(root)
    if said != "release" and not said.isdecimal():
        raise CheckpointError(f"it says {said!r}, not a number or release", where=where, fix=here)
    name = said if said == "release" else f"iter_{int(said):07d}"
    if not (root / name).is_dir():
        raise CheckpointError(f"it says {said}, but there is no {name}", where=where, fix=here)
    return root / name


def _names(root: Path) -> str:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    return f"give one of the folders in {root}: {', '.join(names[-8:])}" if names else "copy the folder again"


def _rank_folders(folder: Path) -> Iterable[Path]:
    return sorted(entry for entry in folder.iterdir() if _RANK.fullmatch(entry.name) and entry.is_dir())


def _rank_file(folder: Path) -> Path | None:
    return next((folder / name for name in RANK_FILES if (folder / name).is_file()), None)


def grid(folder: Path) -> Grid:
    """The files of all ranks of an iteration. Errors: `CheckpointError` naming those that are missing."""
    found: dict[tuple[int, int], Path] = {}
    for entry in _rank_folders(folder):
        match, file = _RANK.fullmatch(entry.name), _rank_file(entry)
        if match and file:
            found[int(match[2] or 0), int(match[1])] = file
    stages, ranks = (1 + max(place[i] for place in found) for i in (0, 1))
    missing = [f"mp_rank_{t:02d}_{p:03d}" for p in range(stages) for t in range(ranks) if (p, t) not in found]
    if missing:
        raise CheckpointError(
            f"files of ranks are missing: {', '.join(missing[:8])}",
            where=str(folder),
            fix="copy the whole iteration: every mp_rank folder holds a part of each tensor",
        )
    return Grid(tuple(tuple(found[p, t] for t in range(ranks)) for p in range(stages)))
