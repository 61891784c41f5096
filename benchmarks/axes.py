"""What each parallel axis costs on this machine: a training step of every layout beside one process, and weak scaling.

    python benchmarks/axes.py [--rounds 7] [--steps 3] [--threads 1] [--sides tp2 pp2 …] [--output benchmarks/results/axes.json]
    python benchmarks/axes.py --quick        the same way in a minute with a tiny model, to see that the script works

A GPT of 6 layers of 256, sequences of 256, vocabulary 8192, fp32, dropout off; 8 samples a step in micro-batches of 2, whatever
the layout, and `--threads` threads in every process. Three parts:

    axes    each layout and one process take turns; `ratio` is its time over that of one process in the same round (median),
            `overhead` is ratio × processes: 1 is perfect sharing, where there is a core for each process
    single  the engine on one process beside the same model in a loop by hand, in one process: aimed at 1.01 at most
    weak    1, 2, 4 ranks with 8 samples each: samples a second of a rank over those of one alone

`messages` is the part of a step in which rank 0 has a message under way, waiting for others included (PyTorch's profiler).
Numbers of more processes × threads than cores say how well processes take turns, not how well the layout scales; the result
names both. Exit code 1 when `single` misses its aim.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megalith.engine.engine import Engine
from megalith.models.config import ModelConfig
from megalith.testing.parity import Case, layouts, make_engine, share
from megalith.tools.machine import cores, processor
from megalith.topology import launch
from megalith.topology.sizes import Sizes
from megalith.topology.spawn import free_port, variables
from megalith.topology.topology import Topology

AXES = (
    "tp2", "tp2+sp", "pp2", "pp2-interleaved", "cp2", "replicate2", "shard_optimizer2", "shard_grads2", "shard_all2",
    "tp2×pp2", "tp2×replicate2", "pp2×replicate2", "tp2×shard_all2", "replicate2×shard_all2",
)  # fmt: skip
WEAK = {1: Sizes(), 2: Sizes(replicate=2), 4: Sizes(replicate=4)}
AIM = 1.01
WARM_UP = 2
Result = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """The model and its global batch."""

    layers: int = 6
    width: int = 256
    heads: int = 8
    length: int = 256
    vocabulary: int = 8192
    micro_batch: int = 2
    micro_batches: int = 4

    def case(self, copies: int = 1) -> Case:
        """For `make_engine`; `copies` times the batch."""
        model = ModelConfig(
            vocab_size=self.vocabulary, num_layers=self.layers, hidden_size=self.width,
            num_attention_heads=self.heads, max_position_embeddings=self.length, hidden_dropout=0.0,
        )  # fmt: skip
        return Case(
            model, precision="32", micro_batch=self.micro_batch, micro_batches=copies * self.micro_batches,
            length=self.length,
        )  # fmt: skip


QUICK = Shape(layers=4, width=32, heads=4, length=32, vocabulary=128)


def make_batch(case: Case) -> dict[str, torch.Tensor]:
    """Random text, the same on every process."""
    shape = (case.samples, case.length + 1)
    text = torch.randint(case.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "sample": torch.arange(case.samples)}


# -- the processes of one layout ---------------------------------------------------------------------------------------


def worker(job: Result) -> None:
    """One process of a layout. Rank 0 takes orders on its standard input and answers with a number."""
    torch.set_num_threads(job["threads"])
    with launch.start("cpu", timeout=7200) as member:
        case, topology = (
            Shape(**job["shape"]).case(job["copies"]),
            Topology.of(Sizes(**job["sizes"]), member.device),
        )
        engine, batch = make_engine(case, topology), share(make_batch(case), topology)
        while order := topology.agree(sys.stdin.readline().strip() if topology.is_main else ""):
            done = obey(order, engine, batch, job["steps"])
            if topology.is_main:
                print(done, flush=True)


def obey(order: str, engine: Engine, batch: dict[str, torch.Tensor], steps: int) -> float:
    """ "warm": nothing; "go": seconds of the best step; "messages": share of a step with a message under way."""
    if order == "messages":
        return messages(lambda: engine.train_step(batch))
    times = [timed(lambda: engine.train_step(batch)) for _ in range(WARM_UP if order == "warm" else steps)]
    return min(times)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def messages(step: Callable[[], object]) -> float:
    """Of the step's duration, the part covered by events of gloo and NCCL."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        seconds = timed(step)
    spans = [
        (e.time_range.start, e.time_range.end)
        for e in found.events() or ()
        if e.name.startswith(("gloo:", "nccl:"))
    ]
    return min(covered(spans) / 1e6 / seconds, 1.0)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


class Side:
    """The processes of a layout, which make steps when told to."""

    def __init__(self, sizes: Sizes, shape: Shape, *, steps: int, threads: int, copies: int = 1) -> None:
        given = {
            "sizes": asdict(sizes),
            "shape": asdict(shape),
            "steps": steps,
            "threads": threads,
            "copies": copies,
        }
        command, port = [sys.executable, __file__, "--worker", json.dumps(given)], free_port()
        self.processes = [
            subprocess.Popen(
                command, env=self._variables(rank, sizes.world, port, threads), text=True,
                stdin=subprocess.DEVNULL if rank else subprocess.PIPE,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            )
            for rank in range(sizes.world)
        ]  # fmt: skip
        self.ask("warm")

    @staticmethod
    def _variables(rank: int, world: int, port: int, threads: int) -> dict[str, str]:
        return {**variables(rank, world, port, os.environ), "OMP_NUM_THREADS": str(threads)}

    def ask(self, order: str) -> float:
        """Rank 0's answer. Errors: `RuntimeError` when there is none."""
        first = self.processes[0]
        assert first.stdin
        assert first.stdout
        first.stdin.write(order + "\n")
        first.stdin.flush()
        answer = first.stdout.readline()
        if not answer:
            raise RuntimeError("the processes ended; what they said stands above")
        return float(answer)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if error[0] is not None:
                process.kill()
            process.communicate()


# -- the three parts ---------------------------------------------------------------------------------------------------


def compare(names: Iterable[str], shape: Shape, rounds: int, how: dict[str, int]) -> dict[str, Result]:
    """Each layout beside one process, turn by turn; a layout that this version does not know is left out."""
    known, found = layouts(), {}
    with Side(Sizes(), shape, **how) as one:
        for name in (name for name in names if name in known):
            sizes = known[name]
            with Side(sizes, shape, **how) as side:
                turns = [(one.ask("go"), side.ask("go")) for _ in range(rounds)]
                share_of = side.ask("messages")
            ratio = statistics.median(theirs / alone for alone, theirs in turns)
            found[name] = {
                "processes": sizes.world,
                "median_seconds": round(statistics.median(theirs for _, theirs in turns), 5),
                "one_process_seconds": round(statistics.median(alone for alone, _ in turns), 5),
                "ratio": round(ratio, 3),
                "overhead": round(ratio * sizes.world, 3),
                "messages": round(share_of, 3),
            }
            print(
                f"{name:24s}", *(f"{key} {value}" for key, value in found[name].items()), sep="  ", flush=True
            )
    return found


def single(shape: Shape, rounds: int, steps: int, threads: int) -> Result:
    """The engine, and the same forward, backward, clipping and update by hand."""
    torch.set_num_threads(threads)
    case = shape.case()
    engine, batch = make_engine(case, Topology.single("cpu")), make_batch(case)
    parts = [
        {k: v[i : i + case.micro_batch] for k, v in batch.items()}
        for i in range(0, case.samples, case.micro_batch)
    ]
    count, parameters = float(batch["targets"].numel()), list(engine.model.parameters())

    def by_hand() -> None:
        engine.zero_gradients()
        for part in parts:
            loss = engine.model.loss(engine.model(part["tokens"]), part["targets"])["lm"].sum
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, case.clip)
        engine.optimizer.step()

    def by_engine() -> None:
        engine.train_step(batch)

    turns = []
    for _ in range(WARM_UP + rounds):
        turns.append([min(timed(each) for _ in range(steps)) for each in (by_engine, by_hand)])
    kept = turns[WARM_UP:]
    found = {
        "engine_seconds": round(statistics.median(a for a, _ in kept), 5),
        "by_hand_seconds": round(statistics.median(b for _, b in kept), 5),
        "ratio": round(statistics.median(a / b for a, b in kept), 4),
    }
    print(f"{'engine ÷ by hand':24s}", *(f"{key} {value}" for key, value in found.items()), sep="  ")
    return found


def weak(shape: Shape, rounds: int, how: dict[str, int]) -> dict[str, Result]:
    """More ranks, each with the same number of samples; all sides stay, and take turns."""
    sides = {ranks: Side(sizes, shape, copies=ranks, **how) for ranks, sizes in WEAK.items()}
    turns = [{ranks: side.ask("go") for ranks, side in sides.items()} for _ in range(rounds)]
    found = {}
    for ranks, side in sides.items():
        with side:
            found[str(ranks)] = {
                "median_seconds": round(statistics.median(turn[ranks] for turn in turns), 5),
                "efficiency": round(statistics.median(turn[1] / turn[ranks] for turn in turns), 3),
                "messages": round(side.ask("messages"), 3),
            }
        print(f"weak, {ranks} ranks{'':11s}", *(f"{k} {v}" for k, v in found[str(ranks)].items()), sep="  ")
    return found


def facts(threads: int) -> Result:
    return {
        "processor": processor(),
        "cores": cores(),
        "threads_a_process": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": "gloo",
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn, whose best counts")
    parser.add_argument("--threads", type=int, default=1, help="in every process")
    parser.add_argument("--sides", nargs="*", default=AXES, metavar="LAYOUT", help=", ".join(AXES))
    parser.add_argument("--no-weak", action="store_true", help="leave out weak scaling")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        worker(chosen.worker)
        return 0
    shape, rounds = (QUICK, 1) if chosen.quick else (Shape(), chosen.rounds)
    how = {"steps": chosen.steps, "threads": chosen.threads}
    results = {
        "shape": asdict(shape),
        "rounds": rounds,
        "machine": facts(chosen.threads),
        "single": single(shape, rounds, **how),
        "axes": compare(chosen.sides, shape, rounds, how),
        "weak": {} if chosen.no_weak else weak(shape, rounds, how),
    }
    if chosen.output:
        chosen.output.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    missed = not chosen.quick and results["single"]["ratio"] > AIM
    if missed:
        print(f"the engine on one process: {results['single']['ratio']} > {AIM}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
