"""A training step of a small GPT: against its peers, what the engine costs, what the allocator's tuning is worth.

    python benchmarks/training_step.py peers [--rounds 9] [--output benchmarks/results/training_step.json]
    python benchmarks/training_step.py overhead [--rounds 9]      engine step against forward, backward, AdamW by hand
    python benchmarks/training_step.py allocator [--rounds 9]     two processes, plain and tuned

Model: 6 layers of 512, sequences of 512, vocabulary 50304, bf16, SDPA, fused AdamW and clipping on every side. `peers`
gives every side a process of its own and runs them in turns: at 2 samples a step and at 8. Ratios are a peer's time over
megalith's in the same round. Exit code 1 when a floor is missed: at 2 samples 1.3 × plain transformers and 1.0 × a tuned
one (compiled block by block, same allocator); at 8 samples 1.2 × at 0.6 of its memory; never under 0.95 of plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peers import SIDES, Shape, make_step
from turns import Side, answer, machine, row, take_turns, timed

from megalith.engine.engine import Engine
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.nn.dropout import sample_keys
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.topology.memory_allocator import tune_allocator
from megalith.topology.topology import Topology

FLOORS = {
    2: {"transformers": 1.3, "transformers tuned": 1.0, "torch": 0.95, "torch tuned": 0.95},
    8: {"transformers": 1.2, "torch": 0.95, "torch tuned": 0.95},
}
MOST_MEMORY = {8: 0.6}
"""Of plain transformers' peak, by samples a step."""
STEPS = {2: 3, 8: 1}
"""Steps in a turn, whose best counts."""


def worker(name: str, batch: int) -> None:
    if name.startswith("engine "):
        step = allocator_step(name)
    else:
        step = make_step(name, Shape(batch=batch))
    answer(step, STEPS[batch])


def side(name: str, batch: int) -> Side:
    return Side(__file__, ["--side", name, "--batch", str(batch)])


def compare_peers(rounds: int, output: Path | None) -> int:
    results: dict[str, object] = {
        "shape": "6 layers of 512, sequence 512, vocabulary 50304, bf16",
        "rounds": rounds,
        "machine": machine(),
    }
    missed = []
    for batch in FLOORS:
        sides = {name: side(name, batch) for name in SIDES}
        times = take_turns(sides, rounds)
        peaks = {name: each.stop() for name, each in sides.items()}
        results[f"batch {batch}"] = found = {name: row(times, name, "megalith", peaks) for name in SIDES}
        print(f"\n{batch} samples a step")
        for name, each in found.items():
            print(f"  {name:20s}", *(f"{key} {value:.3f}" for key, value in each.items()), sep="  ")
        for name, floor in FLOORS[batch].items():
            if found[name]["paired_ratio"] < floor:
                missed.append(f"{batch} samples, {name}: {found[name]['paired_ratio']:.3f} < {floor}")
        share = peaks["megalith"] / peaks["transformers"]
        if share > MOST_MEMORY.get(batch, 1.0):
            missed.append(f"{batch} samples: {share:.2f} of transformers' memory")
    if output:
        output.write_text(json.dumps(results, indent=2) + "\n")
    print(*missed, sep="\n")
    return 1 if missed else 0


def make_engine(dropout: float = 0.0) -> Engine:
    shape = Shape()
    config = ModelConfig(
        vocab_size=shape.vocabulary,
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length,
        hidden_dropout=dropout,
    )
    topology = Topology.single("cpu")
    optim = OptimConfig(lr=1e-4)
    return Engine(
        build(GPT, config, topology, seed=1, precision="bf16-mixed"),
        topology,
        optim=optim,
        schedule=make_schedule(optim, max_steps=1000, global_batch=shape.batch, sequence_length=shape.length),
        seed=1,
        micro_batch_size=shape.batch,
        precision="bf16-mixed",
    )


def make_batch() -> dict[str, torch.Tensor]:
    shape = Shape()
    text = torch.randint(
        shape.vocabulary, (shape.batch, shape.length + 1), generator=torch.Generator().manual_seed(0)
    )
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "sample": torch.arange(shape.batch)}


def allocator_step(name: str) -> Callable[[], object]:
    if name.endswith("tuned"):
        print(tune_allocator(), file=sys.stderr)
    engine, batch = make_engine(), make_batch()
    return lambda: engine.train_step(batch)


def compare_allocators(rounds: int) -> None:
    sides = {name: side(name, 2) for name in ("engine plain", "engine tuned")}
    report(take_turns(sides, rounds), "engine plain", "engine tuned")
    for name, each in sides.items():
        print(f"{name}: peak memory {each.stop():.2f} GiB")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["peers", "overhead", "allocator", "worker"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", default="megalith", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.what == "worker":
        worker(chosen.side, chosen.batch)
    elif chosen.what == "peers":
        return compare_peers(chosen.rounds, chosen.output)
    else:
        {"allocator": compare_allocators, "overhead": compare_engine}[chosen.what](chosen.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
