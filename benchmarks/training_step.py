"""A training step of a small GPT: what the allocator's tuning is worth, and what the engine costs beyond the arithmetic.

    python benchmarks/training_step.py allocator [rounds]     two processes, plain and tuned, in turns
    python benchmarks/training_step.py overhead [rounds]      engine step against forward + backward + AdamW by hand

Model: 6 layers of 512, sequences of 512, vocabulary 50304, bf16-mixed, 2 samples a step, chunked loss. Both report medians
and the median of the paired ratios; turns are short, so that other load on the machine hits both alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from megalith.engine.engine import Engine
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.nn.dropout import sample_keys
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.topology.memory_allocator import tune_allocator
from megalith.topology.topology import Topology

BATCH, LENGTH, VOCABULARY = 2, 512, 50304


def make_engine(dropout: float = 0.0) -> Engine:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=6,
        hidden_size=512,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
        hidden_dropout=dropout,
    )
    topology = Topology.single("cpu")
    stages = build(GPT, config, topology, seed=1, precision="bf16-mixed")
    optim = OptimConfig(lr=1e-4)
    schedule = make_schedule(optim, max_steps=1000, global_batch=BATCH, sequence_length=LENGTH)
    return Engine(
        stages,
        topology,
        optim=optim,
        schedule=schedule,
        seed=1,
        micro_batch_size=BATCH,
        precision="bf16-mixed",
    )


def make_batch() -> dict[str, torch.Tensor]:
    text = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "sample": torch.arange(BATCH)}


def timed(call: Callable[[], object], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def worker(kind: str) -> None:
    """One of the two processes: a step time for each line that comes in."""
    if kind == "tuned":
        print(tune_allocator(), file=sys.stderr)
    engine, batch = make_engine(), make_batch()
    for _ in range(3):
        engine.train_step(batch)
    for _ in sys.stdin:
        print(timed(lambda: engine.train_step(batch)), flush=True)
    with open("/proc/self/status") as status:
        peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    print(f"{kind}: peak memory {int(peak) / 2**20:.2f} GiB", file=sys.stderr)


def compare_allocators(rounds: int) -> None:
    workers = {
        kind: subprocess.Popen(
            [sys.executable, __file__, "worker", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in ("plain", "tuned")
    }
    times: dict[str, list[float]] = {kind: [] for kind in workers}
    for _ in range(rounds):
        for kind, process in workers.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            times[kind].append(float(process.stdout.readline()))
    for process in workers.values():
        process.communicate()
    report(times, "plain", "tuned")


def compare_engine(rounds: int) -> None:
    engine, batch = make_engine(dropout=0.1), make_batch()
    model, count = engine.model, float((batch["targets"] >= 0).sum())

    def by_hand() -> None:
        engine.zero_gradients()
        keys = sample_keys(1, engine.step, batch["sample"])
        (model.loss(model(batch["tokens"], keys=keys), batch["targets"])["lm"].sum / count).backward()
        engine.optimizer.step()

    times: dict[str, list[float]] = {"engine": [], "engine without clipping": [], "by hand": []}
    for _ in range(2):
        by_hand()
        engine.train_step(batch)
    for _ in range(rounds):
        engine.clip = 1.0
        times["engine"].append(timed(lambda: engine.train_step(batch)))
        engine.clip = 0.0
        times["engine without clipping"].append(timed(lambda: engine.train_step(batch)))
        times["by hand"].append(timed(by_hand))
    report(times, "engine", "by hand")
    report(times, "engine without clipping", "by hand")


def report(times: dict[str, list[float]], first: str, second: str) -> None:
    ratios = [a / b for a, b in zip(times[first], times[second], strict=True)]
    for kind in (first, second):
        print(f"{kind:24s} median {statistics.median(times[kind]):.3f} s, best {min(times[kind]):.3f} s")
    best = min(times[first]) / min(times[second])
    print(f"{first} / {second}: median of pairs {statistics.median(ratios):.3f}, of the bests {best:.3f}")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "worker":
        worker(rest[0])
    else:
        rounds = int(rest[0]) if rest else 8
        {"allocator": compare_allocators, "overhead": compare_engine}[command](rounds)
