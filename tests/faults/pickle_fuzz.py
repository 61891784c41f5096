"""Mutations of pickle files, one after another in this process, the same for the same seed.

Each is opened and scanned. What may come of it: its content, every tensor of which can be read, or a `CheckpointError`.
Never another exception, an execution, a long wait, or much memory.
"""

from __future__ import annotations

import random
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.checkpoint.pickles.distributed import open_distributed
from megalith.checkpoint.pickles.reader import open_pickle
from megalith.checkpoint.pickles.scan import scan
from megalith.checkpoint.pickles.stub import Stub
from megalith.errors import CheckpointError

from .pickle_corpus import HOSTILE, kinds, program_of, zipped

OPCODES = b"(.0123FGIJKLMNPQRSTUVXabcdeghijlopqrstu}])\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96"


@dataclass
class Outcome:
    """How many mutations were read and how many refused; the slowest, in seconds of the processor; how much more memory was ever taken, in bytes."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    grown: int = 0


def fuzz(folder: Path, count: int, seed: int = 0) -> Outcome:
    """Opens and scans `count` mutations of the corpus. Raises whatever an opening raises beside `CheckpointError`."""
    draw = random.Random(seed)
    seeds = _seeds(folder)
    hostile = sorted(name for name in seeds if name.startswith("hostile"))
    harmless = sorted(seeds.keys() - set(hostile))
    outcome = Outcome()
    before = _peak()
    for number in range(count):
        name = draw.choice(hostile if draw.random() < 0.2 else harmless)
        raw = _mutated(seeds[name], draw, seeds)
        started = time.process_time()
        try:
            path = _place(folder, name, raw)
            _try(path, outcome)
        except Exception as error:
            (folder / "failed").write_bytes(raw)
            raise AssertionError(
                f"mutation {number} of {name} (kept in {folder}/failed): {error!r}"
            ) from error
        outcome.slowest = max(outcome.slowest, time.process_time() - started)
    outcome.grown = _peak() - before
    return outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seeds(folder: Path) -> dict[str, bytes]:
    """Bytes to mutate: whole files, pickles that are put into a torch file afterwards, and those of a distributed folder."""
    found = kinds(folder)
    program, _ = program_of(found["new.pt"])
    hostile = {f"hostile {name}": raw for name, raw, _ in HOSTILE}
    files = {name: found[name].read_bytes() for name in ("new.pt", "old.pt", "plain.pkl", "tarred.nemo")}
    sharded = {
        f"sharded/{name}": (found["sharded"] / name).read_bytes() for name in (".metadata", "__0_0.distcp")
    }
    return {**files, **sharded, "program a": program, "program b": program, "program c": program, **hostile}


def _place(folder: Path, name: str, raw: bytes) -> Path:
    """Writes a mutation where it belongs."""
    if name.startswith("sharded/"):
        found = folder / "broken"
        found.mkdir(exist_ok=True)
        for each in (folder / "sharded").iterdir():
            (found / each.name).write_bytes(raw if f"sharded/{each.name}" == name else each.read_bytes())
        return found
    if name.startswith("program"):
        raw = zipped(raw, **program_of(folder / "new.pt")[1])
    path = folder / ("broken.nemo" if name.endswith(".nemo") else "broken.pt")
    path.write_bytes(raw)
    return path


def _mutated(raw: bytes, draw: random.Random, seeds: dict[str, bytes]) -> bytes:
    broken = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at = draw.randrange(len(broken) + 1)
        kind = draw.randrange(9)
        length = draw.choice((1, 2, 4, 8, 64))
        if kind == 0 and at < len(broken):
            broken[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(broken):
            broken[at] = draw.choice(OPCODES)
        elif kind == 2:
            broken[at : at + length] = draw.randbytes(length)
        elif kind == 3:
            del broken[at : at + length]
        elif kind == 4:
            broken[at:at] = broken[at : at + length] * draw.choice((1, 2, 100))
        elif kind == 5:
            broken[at : at + 4] = draw.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80")
            )
        elif kind == 6:
            other = seeds[draw.choice(sorted(seeds))]
            start = draw.randrange(len(other) + 1)
            broken[at:at] = other[start : start + length]
        elif kind == 7:
            broken[at:at] = bytes(draw.choices(OPCODES, k=length))
        elif draw.random() < 0.3:
            del broken[at:]
    return bytes(broken)


def _try(path: Path, outcome: Outcome) -> None:
    scan(path)
    try:
        for tensor in tensors_in(_open(path)):
            tensor.read()
    except CheckpointError as error:
        outcome.refused += 1
        message = str(error)
        if not message.startswith(str(path)) or "\n  fix: " not in message:
            raise ValueError(f"a message without a place or a way out: {message}") from error
    else:
        outcome.read += 1


def _open(path: Path) -> Any:
    if path.is_dir():
        found = open_distributed(path)
        return [list(found.tensors.values()), *found.objects.values()]
    return open_pickle(path).content


def tensors_in(content: Any) -> list[Any]:
    """The tensors of some content."""
    if isinstance(content, dict):
        return [each for value in (*content, *content.values()) for each in tensors_in(value)]
    if isinstance(content, (list, tuple, set, frozenset)):
        return [each for value in content for each in tensors_in(value)]
    if isinstance(content, Stub):
        return tensors_in(content.children())
    return [content] if hasattr(content, "read") else []
