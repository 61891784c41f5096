"""What sharing a model between two processes costs, and gains, in generation: one process, two tensor ranks, two stages.

    python benchmarks/generate_processes.py [--rounds 9] [--batch 1 8] [--tokens 64]

The GPT-2 of `generate.py` (6 layers of 512, vocabulary 50304, bf16), greedy, prompts of 64 tokens, one thread a process. The
layouts take turns in one pair of processes, so that other load on the machine hits all alike; first all make the same tokens
in fp32, or the benchmark fails. Reported are medians of a round's time over that of one process in the same round: two tensor
ranks halve the work, two stages do the same work in turns and send messages besides. Ends with exit code 1 when the stages take
more than `CEILING` of one process's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from generate import LAYERS, PROMPT, VOCABULARY, WIDTH, make_prompts, processor_name
from megalith.generate.crew import Crew
from megalith.generate.engine import decode
from megalith.generate.reading import prepare_for_reading
from megalith.generate.sampling import Sampling
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT
from megalith.parallel.apply import build
from megalith.testing.pool import RankPool
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

LAYOUTS = {"one process": Sizes(), "tensor 2": Sizes(tensor=2), "pipeline 2": Sizes(pipeline=2)}
CEILING = 1.25
RESULTS = Path(__file__).parent / "results" / "generate_processes.json"


class Side:
    """A layout's model on this process; of one process's the first has it alone."""

    def __init__(self, sizes: Sizes, positions: int, precision: str) -> None:
        self.works = sizes.world > 1 or dist.get_rank() == 0
        if not self.works:
            return
        self.crew = Crew(Topology.of(sizes) if sizes.world > 1 else Topology.single())
        config = ModelConfig(
            vocab_size=VOCABULARY,
            num_layers=LAYERS,
            hidden_size=WIDTH,
            num_attention_heads=8,
            max_position_embeddings=positions,
            init_method_std=0.1,  # so that predictions differ
        )
        (model,) = build(GPT, config, self.crew.topology, seed=1, precision=precision)
        half = torch.bfloat16 if precision == "bf16-mixed" else None
        self.model = prepare_for_reading(model, half)

    def write(self, batch: int, tokens: int) -> list[list[int]]:
        """The continuations; nothing where this process has no part."""
        if not self.works:
            return []
        *_, rows = decode(
            self.model,
            make_prompts(batch).tolist(),
            Sampling(tokens_to_generate=tokens),
            eod=None,
            agree=self.crew.same,
            relay=self.crew.relay,
        )
        return [row.continuation for row in rows]


def measure(rounds: int, batches: list[int], tokens: int) -> dict[str, dict[str, list[float]]]:
    """On each process: batch size → layout → seconds of each round, until both are done."""
    torch.set_num_threads(1)
    exact = {name: Side(sizes, PROMPT + tokens, "32") for name, sizes in LAYOUTS.items()}
    made = [side.write(4, 16) for side in exact.values() if side.works]
    if any(each != made[0] for each in made):
        raise RuntimeError("the layouts make different tokens in fp32")
    sides = {name: Side(sizes, PROMPT + tokens, "bf16-mixed") for name, sizes in LAYOUTS.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for batch in batches:
        found[str(batch)] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, side in sides.items():
                dist.barrier()
                start = time.perf_counter()
                side.write(batch, tokens)
                dist.barrier()
                if number:  # the first warms up
                    found[str(batch)][name].append(time.perf_counter() - start)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    pool = RankPool(2, timeout=3600)
    seconds, _ = pool.run(measure, 2, options.rounds, options.batch, options.tokens)
    pool.close()
    results: dict = {"machine": processor_name(), "torch": torch.__version__, "tokens": options.tokens}
    for batch, times in seconds.items():
        alone = times["one process"]
        results[f"batch {batch}"] = {
            name: {
                "milliseconds_a_token": round(1000 * statistics.median(each) / options.tokens, 2),
                "of_one_process": round(
                    statistics.median(a / b for a, b in zip(each, alone, strict=True)), 3
                ),
                "of_bests": round(min(each) / min(alone), 3),
                "rounds": [round(a / b, 3) for a, b in zip(each, alone, strict=True)],
            }
            for name, each in times.items()
        }
        for name, said in results[f"batch {batch}"].items():
            print(
                f"batch {batch}, {name}: {said['milliseconds_a_token']} ms a token, {said['of_one_process']} × ({said['of_bests']} of the bests)"
            )
    options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(results[f"batch {batch}"]["pipeline 2"]["of_one_process"] > CEILING for batch in seconds))


if __name__ == "__main__":
    sys.exit(main())
