"""What a conversion costs: Megatron of 8 tensor-parallel ranks to one and back, against a copy of the same bytes, fsync and SHA-256.

    python benchmarks/convert.py [--size 7B|0.5B] [--folder DIR] [--output benchmarks/results/convert.json]

A source of random weights in bf16 is written first (7B: 13.5 GB; room for three times that is needed). Then in turns, each in
a process of its own:

    plain   read and write in blocks of 8 MB, fsync, then SHA-256 of the copy: what must be done at least
    merge   megalith checkpoint convert TP8 → TP1, certificate included (`writing`: until the output is on disk)
    split   the same, TP1 → TP8

Reported: seconds, the speed as a share of plain's, and the memory that a conversion took beyond its imports. Every file is removed
at the end. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

TARGET_SHARE, TARGET_MEMORY = 0.6, 4 << 30
BLOCK = 8 << 20


def make_source(folder: Path, size: str) -> None:
    """A Megatron root of 8 ranks: random numbers, one block of them again and again."""
    import torch
    from tests.checkpoint.convert import sparse

    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def read(hole: sparse.Hole) -> torch.Tensor:
        count = torch.Size(hole.shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].view(hole.shape)

    sparse.Hole.read = read
    sparse.write_sparse(folder, sparse.config_of(size), 8, torch.bfloat16)


def plain(source: Path, target: Path) -> dict[str, float]:
    """Copies every file, forces it to disk, reads it again for its hash."""
    begun = time.perf_counter()
    for path in sorted(source.rglob("*.pt")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True)
        block = memoryview(bytearray(BLOCK))
        with path.open("rb", buffering=0) as old, copy.open("wb", buffering=0) as new:
            while count := old.readinto(block):
                new.write(block[:count])
            os.fsync(new.fileno())
        with copy.open("rb") as new:
            hashlib.file_digest(new, "sha256").hexdigest()
    return {"seconds": time.perf_counter() - begun}


def conversion(source: Path, target: Path, ranks: int) -> dict[str, float]:
    """As the command does it."""
    from megalith.checkpoint.convert.convert import Plan, convert
    from megalith.checkpoint.convert.to_megatron import Sizes
    from megalith.topology.memory_allocator import tune_allocator

    tune_allocator()
    before, begun, compared = memory("VmRSS"), time.perf_counter(), []

    def report(what: str, done: int, total: int) -> None:
        if what == "comparing" and not compared:
            compared.append(time.perf_counter() - begun)

    done = convert(source, target, Plan("megatron", Sizes(ranks)), report=report)
    return {
        "seconds": time.perf_counter() - begun,
        "writing": compared[0],
        "memory": memory("VmHWM") - before,
        "max_abs_logit_error": done.certificate["max_abs_logit_error"],
    }


def memory(key: str) -> int:
    found = re.search(key + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def in_own_process(*arguments: str) -> dict[str, float]:
    os.sync()
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def measure(folder: Path, size: str) -> dict[str, object]:
    one, two, eight = folder / "tp1", folder / "copy", folder / "tp8"
    make_source(eight, size)
    count = sum(path.stat().st_size for path in eight.rglob("*.pt"))
    rows: dict[str, dict[str, float]] = {}
    for name, source, target in (("merge", eight, one), ("split", one, folder / "back")):
        rows[f"plain before {name}"] = in_own_process("plain", str(source), str(two))
        shutil.rmtree(two)
        rows[name] = in_own_process("1" if name == "merge" else "8", str(source), str(target))
        shutil.rmtree(source)
        rows[name]["load before"] = os.getloadavg()[0]
        print(name, rows[name], rows[f"plain before {name}"], flush=True)
    shares = {}
    for name in ("merge", "split"):
        seconds = rows[f"plain before {name}"]["seconds"]
        shares[f"{name}, writing / plain"] = round(seconds / rows[name]["writing"], 3)
        shares[f"{name}, certificate included / plain"] = round(seconds / rows[name]["seconds"], 3)
    most = max(rows[name]["memory"] for name in ("merge", "split"))
    return {
        "size": size,
        "bytes": count,
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "measured": {name: {k: round(v, 3) for k, v in row.items()} for name, row in rows.items()},
        "speed as a share of copy + fsync + SHA-256": shares,
        "targets": {
            f"writing >= {TARGET_SHARE}": all(v >= TARGET_SHARE for k, v in shares.items() if "writing" in k),
            f"certificate included >= {TARGET_SHARE}": all(
                v >= TARGET_SHARE for k, v in shares.items() if "certificate" in k
            ),
            "memory <= 4 GiB": most <= TARGET_MEMORY,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("7B", "0.5B"), default="7B")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="the disk to measure"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "convert.json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, source, target = arguments.one[0], Path(arguments.one[1]), Path(arguments.one[2])
        found = plain(source, target) if way == "plain" else conversion(source, target, int(way))
        print(json.dumps(found))
        return 0
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="megalith-benchmark-"))
    try:
        result = measure(folder, arguments.size)
    finally:
        shutil.rmtree(folder)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if all(result["targets"].values()) else 1  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
