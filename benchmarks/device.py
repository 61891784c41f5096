"""Training on a GPU: tokens/s, MFU and memory of GPT-2 124M and GPT-3 1.3B, megalith beside its peers, in one command.

    python benchmarks/device.py [--sizes 124m 1.3b] [--rounds 2] [--steps 5] [--sides megalith "torch tuned" …]
                                [--output benchmarks/results/device-<machine>.json] [--profile]

Sequences of 1024, vocabulary 50304, dropout off; bf16 products, fp32 weights, gradients and moments, flash attention
(flex for "megalith documents"), clipping and fused AdamW on every side (`peers.py`). A step is a whole optimizer step of the
size's global batch, cut into micro-batches that fill a GPU of 80 GB or more. A side that runs out of memory starts again
with half of its micro-batch, and the result says so. Each turn of a side is a process of its own; sides take turns, `--rounds`
times, and the results are written after every turn. A side whose library is missing is left out by name.

Ratios are megalith's tokens/s over the side's, inside a round. MFU is megalith's own (`engine/metrics.py`): PaLM's formula,
causal halving not credited, over the device's dense bf16 peak. Exit code 1 when an H200-class GPU misses a goal: 500k
tokens/s at 124M, 55 % MFU at 1.3B, or on any GPU a ratio under 0.95 to a peer.

`--device cpu --sizes nano --no-compile` goes the same way in seconds, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peers import SIDES, WITH_DOCUMENTS, Shape, Step, make_step

from megalith.engine.flops import FORMULA, flops_per_token
from megalith.engine.metrics import Peak, device_name, peak, speed
from megalith.models import presets
from megalith.tools.machine import processor

ALL_SIDES = (*SIDES, WITH_DOCUMENTS)
RATIO_FLOOR, GOAL_PEAK = 0.95, 900.0
"""Least tokens/s of megalith over a peer's; goals hold where the device's peak is at least this many TFLOP/s."""
WARM_UP = 2
Result = dict[str, Any]
Run = Callable[[str, Shape], Result]


@dataclass(frozen=True)
class Size:
    """A preset, its global batch and first micro-batch in samples, and what is aimed at on an H200-class GPU."""

    preset: str
    batch: int
    micro_batch: int
    length: int = 1024
    tokens_per_second: float = 0.0
    mfu: float = 0.0

    def shape(self, device: str, *, compiled: bool, recompute: bool) -> Shape:
        """The preset's layers, width and heads; the vocabulary is the one that all sides multiply fast."""
        config = presets.get(self.preset)
        return Shape(
            layers=config.num_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            length=self.length,
            batch=self.batch,
            micro_batch=self.micro_batch,
            device=device,
            compile=compiled,
            recompute=recompute,
        )


SIZES = {
    "nano": Size("gpt-nano", batch=4, micro_batch=2, length=32),
    "124m": Size("gpt2-124m", batch=512, micro_batch=64, tokens_per_second=500_000),
    "345m": Size("gpt2-345m", batch=256, micro_batch=32),
    "1.3b": Size("gpt3-1.3b", batch=128, micro_batch=16, mfu=0.55),
}


def model_flops(shape: Shape) -> float:
    """FLOPs a token by megalith's formula; the same model on every side, so the same number."""
    matrices = 12 * shape.layers * shape.width**2 + shape.vocabulary * shape.width
    return flops_per_token(
        matrix_parameters=matrices, layers=shape.layers, attention_width=shape.width, length=shape.length
    )


# -- one turn of one side, in a process of its own --------------------------------------------------------------------


def worker(side: str, shape: Shape, steps: int, profile: bool) -> Result:
    """Warm up, time `steps` steps, → seconds of each, peak memory and losses; or why there are none."""
    try:
        step = make_step(side, shape)
        began = time.perf_counter()
        first = [step() for _ in range(WARM_UP)]
        ready = time.perf_counter() - began
        forget_peak(shape.device)
        timed = [timed_step(step, shape.device) for _ in range(steps)]
        memory = peak_memory(shape.device)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except ImportError as error:
        return {"failed": str(error)}
    if profile:
        print(profiled(step, shape.device), file=sys.stderr)
    return {
        "seconds": [seconds for seconds, _ in timed],
        "warm_up_seconds": ready,
        "first_loss": first[0],
        "last_loss": timed[-1][1],
        **memory,
    }


def timed_step(step: Step, device: str) -> tuple[float, float]:
    """→ seconds, loss. Waits for the device before and behind, so that a step is a step."""
    synchronize(device)
    began = time.perf_counter()
    loss = step()
    synchronize(device)
    return time.perf_counter() - began, loss


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def forget_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> dict[str, float]:
    """GiB: of live tensors and of what the allocator took; on a CPU, of the process."""
    if device == "cpu":
        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
    }


def profiled(step: Step, device: str) -> str:
    """Where a step's time goes, kernel by kernel."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        step()
    order = "self_cpu_time_total" if device == "cpu" else "self_cuda_time_total"
    return found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=80)


def run_process(steps: int, profile: bool) -> Run:
    """A `Run` that starts this file again; its last line of output is the result."""

    def run(side: str, shape: Shape) -> Result:
        job = json.dumps({"side": side, "shape": asdict(shape), "steps": steps, "profile": profile})
        settings = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        done = subprocess.run(
            [sys.executable, __file__, "--worker", job], stdout=subprocess.PIPE, text=True, env=settings
        )
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            return {"failed": f"the process ended with code {done.returncode}"}
        return json.loads(lines[-1])

    return run


def turn(run: Run, side: str, shape: Shape) -> tuple[Result, Shape]:
    """One turn, with half of the micro-batch as long as memory runs out. → the result and the shape that it was made with."""
    while True:
        found = run(side, shape)
        if not found.get("out_of_memory"):
            return found, shape
        if shape.micro_batch == 1:
            return {"failed": "out of memory with one sample"}, shape
        say(
            f"    {side}: out of memory with micro-batches of {shape.micro_batch}, trying {shape.micro_batch // 2}"
        )
        shape = replace(shape, micro_batch=shape.micro_batch // 2)


# -- all sides of one size --------------------------------------------------------------------------------------------


class Comparison:
    """Turns of every side, and the table that they make."""

    def __init__(self, size: Size, shape: Shape, top: Peak | None) -> None:
        self.size, self.shape, self.top = size, shape, top
        self.turns: dict[str, list[Result]] = {}
        self.micro: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def take(self, run: Run, side: str) -> None:
        """One more turn of a side; one that failed has no more."""
        if side in self.failed:
            return
        found, used = turn(
            run, side, replace(self.shape, micro_batch=self.micro.get(side, self.shape.micro_batch))
        )
        self.micro[side] = used.micro_batch
        if "failed" in found:
            self.failed[side] = found["failed"]
            say(f"    {side}: left out, {found['failed']}")
            return
        self.turns.setdefault(side, []).append(found)
        row = self.row(side)
        say(f"    {side:20s} " + "  ".join(f"{key} {value}" for key, value in row.items()))

    def rate(self, found: Result) -> float:
        """Tokens a second of one turn, by its median step."""
        return self.shape.batch * self.shape.length / statistics.median(found["seconds"])

    def row(self, side: str) -> Result:
        """Medians over a side's turns; the ratio is of the rounds that megalith has run too."""
        turns = self.turns[side]
        rate = statistics.median(map(self.rate, turns))
        fast = speed(1, 1 / rate, per_token=model_flops(self.shape), peak=self.top)
        # "megalith" may not be among the sides: then there is nothing to compare with
        own = self.turns.get("megalith", [])
        ratios = [self.rate(ours) / self.rate(theirs) for ours, theirs in zip(own, turns, strict=False)]
        memory = {
            key: round(max(t[key] for t in turns), 2)
            for key in ("peak_gib", "reserved_gib")
            if key in turns[0]
        }
        return {
            "tokens_per_second": round(rate, 1),
            "tflops": round(fast.tflops_per_second, 4),
            "mfu": None if fast.mfu is None else round(fast.mfu, 4),
            "step_seconds": round(self.shape.batch * self.shape.length / rate, 4),
            **memory,
            "ratio": round(statistics.median(ratios), 4) if ratios else None,
            "micro_batch": self.micro[side],
            "warm_up_seconds": round(turns[0]["warm_up_seconds"], 1),
            "last_loss": round(turns[-1]["last_loss"], 4),
        }

    def summary(self) -> Result:
        """What is written down."""
        return {
            "preset": self.size.preset,
            "shape": asdict(self.shape),
            "flops_per_token": model_flops(self.shape),
            "sides": {side: self.row(side) for side in self.turns},
            "left_out": self.failed,
        }

    def missed(self) -> list[str]:
        """Goals and floors that a GPU did not reach; a CPU has none."""
        if self.shape.device == "cpu":
            return []
        if "megalith" not in self.turns:
            return [f"no turn of megalith: {self.failed.get('megalith', 'it was not asked for')}"]
        own, wrong = self.row("megalith"), []
        if self.top is not None and self.top.tflops >= GOAL_PEAK:
            for key in ("tokens_per_second", "mfu"):
                if own[key] < getattr(self.size, key):
                    wrong.append(f"{key} {own[key]:g} < {getattr(self.size, key):g}")
        for side in self.turns:
            ratio = self.row(side)["ratio"]
            if side not in ("megalith", WITH_DOCUMENTS) and ratio < RATIO_FLOOR:
                wrong.append(f"{ratio:g} of {side} < {RATIO_FLOOR}")
        return wrong


def machine(device: str) -> Result:
    """Where this ran."""
    found: Result = {
        "device": name_of(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    if device != "cpu":
        found["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda or torch.version.hip
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def name_of(device: str) -> str:
    return processor() if device == "cpu" else device_name(torch.device(device))


def slug(name: str) -> str:
    """ "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def say(line: str) -> None:
    print(line, flush=True)


def compare(names: Iterable[str], chosen: argparse.Namespace, run: Run) -> int:
    """All sizes, round by round; the file is whole after every turn. → exit code."""
    top = peak(name_of(chosen.device), "bf16-mixed", given=chosen.peak_tflops)
    results: Result = {
        "machine": machine(chosen.device),
        "rounds": chosen.rounds,
        "steps": chosen.steps,
        "mfu_formula": FORMULA,
        "peak": None if top is None else asdict(top),
        "sizes": {},
    }
    output = (
        chosen.output or Path(__file__).parent / "results" / f"device-{slug(name_of(chosen.device))}.json"
    )
    say(
        f"{name_of(chosen.device)}, {'peak not known: no MFU' if top is None else f'{top.tflops:g} TFLOP/s ({top.source})'}"
    )
    missed = []
    for name in names:
        size = SIZES[name]
        shape = size.shape(chosen.device, compiled=not chosen.no_compile, recompute=chosen.recompute)
        shape = replace(shape, micro_batch=min(chosen.micro_batch or shape.micro_batch, shape.batch))
        comparison = Comparison(size, shape, top)
        say(
            f"{name}: {size.preset}, {shape.parameters / 1e6:.0f}M parameters, {shape.batch} × {shape.length} tokens a step"
        )
        for number in range(chosen.rounds):
            say(f"  round {number + 1}")
            for side in chosen.sides:
                comparison.take(run, side)
                results["sizes"][name] = comparison.summary()
                output.write_text(json.dumps(results, indent=2) + "\n")
        missed += [f"missed at {name}: {line}" for line in comparison.missed()]
    print(*missed, f"written to {output}", sep="\n")
    return 1 if missed else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["124m", "1.3b"])
    parser.add_argument("--sides", nargs="+", choices=ALL_SIDES, default=list(ALL_SIDES))
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps in a turn")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--micro-batch", type=int, help="samples; must divide the global batch")
    parser.add_argument("--recompute", action="store_true", help="recompute activations, on every side")
    parser.add_argument("--no-compile", action="store_true", help="compile nothing, on any side")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not in the table")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        job = json.loads(chosen.worker)
        shape = Shape(**job.pop("shape"))
        print(json.dumps(worker(job["side"], shape, job["steps"], job["profile"])), flush=True)
        return 0
    if chosen.device != "cpu" and not torch.cuda.is_available():
        say("no GPU is here; --device cpu --sizes nano shows that the script works")
        return 2
    return compare(chosen.sizes, chosen, run_process(chosen.steps, chosen.profile))


if __name__ == "__main__":
    sys.exit(main())
