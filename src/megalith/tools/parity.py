"""`megalith parity`: a configuration's layout against one process, both in small, tensor by tensor in float64 on the CPU.

    miniature ─┬─ one process: record ─▶ reference ─┐
               └─ N processes over gloo: record ────┴─ compare ─▶ Report: table, first difference, likely cause

Knows how to run the comparison and what it found. What is compared is `testing.parity`'s, the words on the screen are the
command's.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megalith.errors import MegalithError, UnsupportedError
from megalith.testing.diagnosis import Cause, diagnose, wrong
from megalith.testing.parity import TOLERANCE, Difference, compare, write_reference
from megalith.testing.pool import RankFailure, RankPool
from megalith.tools.miniature import Miniature

TIMEOUT = 900.0
"""Seconds for all ranks: compiling takes minutes on a slow machine."""
KINDS = {
    "count": "targets counted",
    "initial": "initial weights",
    "loss": "loss",
    "gradient": "gradients",
    "norm": "gradient norm",
    "weight": "weights after 3 steps",
    "evaluation": "evaluation",
    "tokens": "greedy tokens",
}


@dataclass(frozen=True)
class Row:
    """One kind of number: how many tensors, the worst difference of one, and which that is."""

    kind: str
    tensors: int
    worst: float
    tensor: str
    agrees: bool


@dataclass(frozen=True)
class Report:
    """What a comparison found. `first` is the differing tensor nearest to the cause."""

    miniature: Miniature
    rows: tuple[Row, ...]
    first: Difference | None
    cause: Cause | None
    differing: int
    seconds: float

    @property
    def agrees(self) -> bool:
        """Do all tensors agree to rounding?"""
        return self.first is None

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "agrees": self.agrees,
            "layout": self.miniature.sizes.describe(),
            "layout_asked_for": self.miniature.asked.describe(),
            "processes": self.miniature.sizes.world,
            "tolerance": TOLERANCE,
            "kinds": [{**asdict(row), "worst": _finite(row.worst)} for row in self.rows],
            "differing": self.differing,
            "first": {"name": self.first.name, "relative": _finite(self.first.relative)}
            if self.first
            else None,
            "cause": asdict(self.cause) if self.cause else None,
            "changes": [asdict(change) for change in self.miniature.changes],
            "seconds": self.seconds,
        }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def check(small: Miniature, pool: RankPool, say: Callable[[str], None] = lambda text: None) -> Report:
    """Run both and compare; `say` is told what runs.

    Errors: `UnsupportedError` for what the ranks refuse; `RankFailure` when they fail otherwise.
    """
    begun = time.monotonic()
    world = small.sizes.world
    pool.start(world)
    with tempfile.TemporaryDirectory(prefix="megalith-parity-") as folder:
        reference = Path(folder) / "one_process.safetensors"
        say("one process")
        write_reference(replace(small.case, compile=False), reference)  # what compiled blocks must equal, too
        say(f"{world} processes: {small.sizes.describe()}")
        try:
            found = compare(pool, small.case, small.sizes, reference, timeout=TIMEOUT)
        except RankFailure as failure:
            if (refusal := _refusal(failure)) is not None:
                raise refusal from failure
            raise
    return report(small, found, time.monotonic() - begun)


def report(small: Miniature, differences: Sequence[Difference], seconds: float) -> Report:
    """The differences by kind, the first, and its likely cause."""
    differing = wrong(differences)
    return Report(
        small,
        tuple(_row(kind, [d for d in differences if d.kind == kind]) for kind in KINDS),
        differing[0] if differing else None,
        diagnose(differences, small.sizes),
        len(differing),
        seconds,
    )


def _row(kind: str, differences: Sequence[Difference]) -> Row:
    worst = max(differences, key=lambda d: d.relative)
    name = worst.name.partition(" ")[2]
    return Row(kind, len(differences), worst.relative, name, worst.relative <= TOLERANCE)


def _refusal(failure: RankFailure) -> MegalithError | None:
    """What a rank refused by name, from its traceback."""
    for text in failure.errors.values():
        if found := re.search(r"^megalith\.errors\.\w+: (.*)", text, re.MULTILINE | re.DOTALL):
            what, _, fix = found[1].strip().partition("\n  fix: ")
            return UnsupportedError(what, fix=fix)
    return None


def first_words(failure: RankFailure) -> str:
    """The last line of the traceback of a rank that did not merely lose its peers."""
    lost = re.compile(r"closed|reset by peer|no answer|timed out", re.IGNORECASE)
    lines = {rank: text.strip().splitlines()[-1] for rank, text in sorted(failure.errors.items())}
    rank, line = next(((r, t) for r, t in lines.items() if not lost.search(t)), next(iter(lines.items())))
    return f"rank {rank}: {line}"
