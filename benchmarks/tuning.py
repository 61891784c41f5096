"""Prompt tuning of a small GPT-2 beside `peft`: the same weights, the same prompt, the same batch, in turns.

    python benchmarks/tuning.py [--rounds 7] [--threads N] [--precision 32|bf16]

Model: 6 layers of 512, 8 heads, vocabulary 50304; 4 rows of 20 virtual tokens and 236 of text; SDPA on both sides, no dropout.
First both sides make one step in fp32, and loss and gradient of the prompt must agree, or the benchmark fails. Then every round
times one step of each side, one after the other in one process; reported are medians and the median of the paired ratios, of
wall time and of processor time. Memory is that of all tensors alive at once in a step, weights included, counted exactly. Ends
with exit code 1 when a goal of issue 9 is missed: 1.2 × the tokens a second, 1.02 × the memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from turns import machine

from generate import HEADS, LAYERS, VOCABULARY, WIDTH, our_config, our_weights, their_model
from megalith.adapt.prompts import NewPrompt
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.engine.engine import Engine
from megalith.models.gpt import GPT
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.testing.memory import TensorBytes
from megalith.topology.topology import Topology

ROWS, PROMPT, TEXT = 4, 20, 236
LEARNING_RATE = 1e-3
FASTER, MEMORY = 1.2, 1.02
RESULTS = Path(__file__).parent / "results" / "tuning.json"
Step = Callable[[], float]


class Theirs:
    """peft's prompt tuning in a plain loop: autocast in bf16, fused AdamW over what trains, clipping at 1.

    The frozen model is in evaluation, as ours is: nothing drops out.
    """

    def __init__(self, model: transformers.GPT2LMHeadModel, text: torch.Tensor, *, half: bool) -> None:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
        self.model, self.text, self.half = peft.get_peft_model(model, config).eval(), text, half
        self.prompt = self.model.prompt_encoder["default"].embedding.weight
        self.optimizer = torch.optim.AdamW([self.prompt], lr=LEARNING_RATE, fused=True)

    def step(self) -> float:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = self.model(input_ids=self.text, labels=self.text).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.prompt], 1.0)
        self.optimizer.step()
        return loss.item()

    @property
    def state(self) -> list[torch.Tensor]:
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *moments]


class Ours:
    """The engine as `megalith prompt-tune` has it."""

    def __init__(
        self, weights: dict[str, torch.Tensor], prompt: torch.Tensor, text: torch.Tensor, *, half: bool
    ) -> None:
        topology, optim = Topology.single(), OptimConfig(lr=LEARNING_RATE)
        method = SoftPrompts([NewPrompt("task", PROMPT)])
        precision = "bf16-mixed" if half else "32"
        config = our_config(PROMPT + TEXT).model_copy(update={"hidden_dropout": 0.0})
        method.dropout = 0.0
        (model,) = stages = build(GPT, config, topology, seed=1, precision=precision, adapt=method.install)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert all("prompts" in name for name in missing)
        method.fill(
            stages,
            {
                "prompts.0.tokens": prompt,
                "prompts.0.positions": weights["position_embedding.weight"][:PROMPT],
            },
        )
        self.engine = Engine(
            stages, topology, optim=optim, seed=1, micro_batch_size=len(text), precision=precision, frozen=method.frozen,
            schedule=make_schedule(optim, max_steps=1000, global_batch=len(text), sequence_length=PROMPT + TEXT),
        )  # fmt: skip
        ids = torch.arange(VOCABULARY, VOCABULARY + PROMPT).expand(len(text), -1)
        nothing = torch.full((len(text), PROMPT), -1)
        targets = torch.cat((nothing[:, 1:], text, nothing[:, :1]), 1)
        tokens = torch.cat((ids, text), 1)
        self.batch = {"tokens": tokens, "targets": targets, "sample": torch.arange(len(text))}
        self.prompt = model.prompts.tables[0].tokens

    def step(self) -> float:
        return self.engine.train_step(self.batch).loss

    @property
    def state(self) -> list[torch.Tensor]:
        moments = [t for state in self.engine.optimizer.state.values() for t in state.values()]
        return [*self.engine.parameters.values(), *moments]


def both(*, half: bool) -> dict[str, Any]:
    """The two sides, alike in every number."""
    torch.manual_seed(1)
    text = torch.randint(VOCABULARY, (ROWS, TEXT))
    model = their_model(PROMPT + TEXT)
    weights = our_weights(model)
    theirs = Theirs(model, text, half=half)
    return {"megalith": Ours(weights, theirs.prompt.detach().clone(), text, half=half), "peft": theirs}


def differences() -> dict[str, float]:
    """Of the loss and of the prompt's gradient in the first fp32 step, relative to theirs."""
    sides = both(half=False)
    ours, theirs = sides["megalith"], sides["peft"]
    loss, expected = ours.step(), theirs.step()
    gap = (ours.prompt.grad - theirs.prompt.grad).abs().max() / theirs.prompt.grad.abs().max()
    return {"loss": abs(loss / expected - 1), "gradient": gap.item()}


def compare(sides: dict[str, Any], rounds: int) -> dict[str, Any]:
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.step()
        side.step()
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter(), time.process_time()
            side.step()
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    peaks = {}
    for name, side in sides.items():
        with TensorBytes(side.state) as seen:
            side.step()
        peaks[name] = seen.peak
    weights = sum(p.numel() * p.element_size() for p in sides["megalith"].engine.parameters.values())
    tokens = ROWS * (PROMPT + TEXT)
    return {
        "tokens_per_second": {name: round(tokens / statistics.median(t), 1) for name, t in wall.items()},
        "ratio": round(ratio(wall), 3),
        "processor_ratio": round(ratio(processor), 3),
        "peak_mib": {name: round(peak / 2**20, 1) for name, peak in peaks.items()},
        "memory_ratio": round(peaks["megalith"] / peaks["peft"], 3),
        "weights_mib": round(weights / 2**20, 1),
    }


def ratio(times: dict[str, list[float]]) -> float:
    """How many times faster ours is: the median of the rounds."""
    return statistics.median(b / a for a, b in zip(times["megalith"], times["peft"], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    gaps = differences()
    print(f"first step: loss differs by {gaps['loss']:.1e}, gradient by {gaps['gradient']:.1e}", flush=True)
    if max(gaps.values()) > 1e-3:
        print("the sides do not compute the same")
        return 1
    found = compare(both(half=chosen.precision == "bf16"), chosen.rounds)
    print(json.dumps(found, indent=2))
    setting = {
        "layers": LAYERS, "width": WIDTH, "heads": HEADS, "vocabulary": VOCABULARY, "rows": ROWS, "prompt": PROMPT,
        "text": TEXT, "rounds": chosen.rounds, "machine": machine(), "peft": peft.__version__,
    }  # fmt: skip
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(
        json.dumps({**before, chosen.precision: {**setting, **found, "differences": gaps}}, indent=2) + "\n"
    )
    missed = found["ratio"] < FASTER or found["memory_ratio"] > MEMORY
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
