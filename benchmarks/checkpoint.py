"""What a save costs: against a plain write of the same bytes, and as the time that training stands still.

    python benchmarks/checkpoint.py [--megabytes 500] [--rounds 7] [--folder DIR] [--output benchmarks/results/checkpoint.json]

Each round runs each way once, in turns, each in a process of its own that has done it once before the clock starts:

    plain   os.write of all tensors into one file, fsync
    hand    safetensors' save_file, fsync, then SHA-256 of the file: the same promise, written down in four lines
    save    Checkpointer.save: two safetensors files, SHA-256, manifest, fsync of files and folders, rename, latest
    stall   Checkpointer.save, asynchronous, from the second on: until it returns (`first stall` takes the memory, too);
            beside it `copy`: the same bytes from memory to memory by one thread, the least that a stall can be
    load    load: SHA-256 of everything, then into the live tensors

Reported are medians over the rounds; ratios are medians of the ratios inside a round. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TARGET_RATIO = 2.5
"""save ÷ plain, at most."""
TARGET_STALL = 0.1
"""Seconds of stall for each 500 MB, at most."""
WAYS = ("plain", "hand", "save", "stall", "load")


def make_tensors(megabytes: float):
    """Weights and both moments of a stack of blocks, `megabytes` × 10⁶ bytes in all."""
    import torch

    width = 768
    rows = int(megabytes * 1e6 / 3 / 4 / width)
    shapes = [4 * width] * (rows // (4 * width)) + [rows % (4 * width)]
    draw = torch.Generator().manual_seed(0)
    out = {}
    for number, count in enumerate(shapes):
        weight = torch.randn(count, width, generator=draw)
        out[f"model.blocks.{number}.weight"] = weight
        out[f"optim.blocks.{number}.weight.exp_avg"] = weight * 1e-3
        out[f"optim.blocks.{number}.weight.exp_avg_sq"] = weight**2
    return out


def timed(work: Callable[[], object]) -> float:
    """Seconds of `work`, with nothing of what came before still on its way to the disk."""
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain(tensors, folder: Path) -> None:
    descriptor = os.open(folder / "plain", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for tensor in tensors.values():
        rest = memoryview(tensor.numpy()).cast("B")
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)
    os.close(descriptor)


def by_hand(tensors, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "hand")
    with open(folder / "hand", "rb") as file:
        os.fsync(file.fileno())
        hashlib.file_digest(file, "sha256").hexdigest()


def measure(way: str, megabytes: float, folder: Path) -> dict[str, float]:
    """One way, in this process: once to warm up, once by the clock."""
    import numpy as np
    import torch

    from megalith.checkpoint.native import Checkpointer, load
    from megalith.topology.topology import Topology

    tensors = make_tensors(megabytes)
    if way in ("plain", "hand"):
        write = {"plain": plain, "hand": by_hand}[way]
        write(tensors, folder)
        clear(folder)
        return {way: timed(lambda: write(tensors, folder))}
    root = folder / "checkpoints"
    saver = Checkpointer(root, Topology.single(), asynchronous=way == "stall")

    def save(step: int) -> None:
        saver.save(step, tensors, {"consumed_samples": step}, config_yaml="a: 1\n")

    first = timed(lambda: save(1))
    saver.wait()
    if way == "load":
        live = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        load(root / "step_0000001", live)
        return {"load": timed(lambda: load(root / "step_0000001", live))}
    clear(root)
    if way == "save":
        return {"save": timed(lambda: save(2))}
    stalls, published, copies = [], [], []
    kept = [tensor.numpy().copy() for tensor in tensors.values()]
    for step in (2, 3, 4):
        copies.append(
            timed(lambda: [np.copyto(a, t.numpy()) for a, t in zip(kept, tensors.values(), strict=True)])
        )
        start = time.perf_counter()
        stalls.append(timed(lambda step=step: save(step)))
        saver.wait()
        published.append(time.perf_counter() - start)
        clear(root)
    return {
        "stall": statistics.median(stalls),
        "copy": statistics.median(copies),
        "first stall": first,
        "published after": statistics.median(published),
    }


def clear(folder: Path) -> None:
    """Empties a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def in_own_process(way: str, megabytes: float, parent: Path) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(dir=parent, prefix="megalith-benchmark-"))
    command = [sys.executable, __file__, "--one", way, "--megabytes", str(megabytes), "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(folder)
    return json.loads(done.stdout)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def report(rounds: list[dict[str, float]], megabytes: float) -> dict[str, object]:
    """Medians, paired ratios, and whether the targets are met."""
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0] if key != "load before"}
    ratios = {
        f"{key} / plain": statistics.median(r[key] / r["plain"] for r in rounds) for key in ("hand", "save")
    }
    ratios["stall / copy"] = statistics.median(r["stall"] / r["copy"] for r in rounds)
    stall = medians["stall"] * 500 / megabytes
    return {
        "megabytes": megabytes,
        "rounds": len(rounds),
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "seconds": {key: round(value, 4) for key, value in medians.items()},
        "ratios": {key: round(value, 3) for key, value in ratios.items()},
        "stall per 500 MB": round(stall, 4),
        "targets": {
            f"save / plain <= {TARGET_RATIO}": ratios["save / plain"] <= TARGET_RATIO,
            f"stall per 500 MB <= {TARGET_STALL} s": stall <= TARGET_STALL,
        },
        "every round": [{key: round(value, 4) for key, value in r.items()} for r in rounds],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="the disk to measure"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json", help="JSON"
    )
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.megabytes, arguments.folder)))
        return 0
    rounds = []
    for number in range(arguments.rounds):
        order = WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]
        row = {
            k: v
            for way in order
            for k, v in in_own_process(way, arguments.megabytes, arguments.folder).items()
        }
        rounds.append(row | {"load before": os.getloadavg()[0]})
        print(f"round {number + 1}: " + "  ".join(f"{k} {v:.3f}" for k, v in sorted(row.items())), flush=True)
    result = report(rounds, arguments.megabytes)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "every round"}, indent=1))
    return 0 if all(result["targets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
