"""Sides of a benchmark as processes that make their steps in turns, so that a shared machine is alike to all of them."""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch


class Side:
    """A process that makes steps when told to."""

    def __init__(self, script: str, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, "worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask("warm")

    def _ask(self, what: str) -> float:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def seconds(self) -> float:
        return self._ask("go")

    def stop(self) -> float:
        """→ the peak of its memory in GiB."""
        peak = self._ask("peak")
        self.process.communicate()
        return peak


def answer(step: Callable[[], object], steps: int) -> None:
    """In such a process: answers each line that comes in with a number, the best of `steps` or the peak."""
    for line in sys.stdin:
        if line.strip() == "peak":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, flush=True)
            continue
        times = [timed(step) for _ in range(3 if line.strip() == "warm" else steps)]
        print(min(times), flush=True)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(side.seconds())
    return times


def row(times: dict[str, list[float]], name: str, ours: str, peaks: dict[str, float]) -> dict[str, float]:
    """A side's times, and over those of `ours` in the same round."""
    ratios = [a / b for a, b in zip(times[name], times[ours], strict=True)]
    return {
        "median_seconds": round(statistics.median(times[name]), 4),
        "best_seconds": round(min(times[name]), 4),
        "paired_ratio": round(statistics.median(ratios), 4),
        "ratio_of_bests": round(min(times[name]) / min(times[ours]), 4),
        "peak_gib": round(peaks[name], 3),
    }


def machine() -> dict[str, object]:
    return {
        "cpus": torch.get_num_threads(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
