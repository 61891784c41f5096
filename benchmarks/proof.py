"""What a run of a BERT, T5 or BART has learned, against the entropy of the words that it guesses.

    python benchmarks/proof.py RUN [RUN …] --image docs/images/families.png --output benchmarks/results/proof.json

Reads each run's config.yaml, metrics.jsonl and newest checkpoint, makes the batches of its validation again, and counts the
targets. The unigram entropy is that of the targets themselves, −Σ p ln p, the least that a guess without the context can reach. A BART
writes the whole text, most of which it has before it: of its targets those count that its encoder was not shown (`difflib`),
and their loss is computed from the checkpoint, on more batches than the run's own, since they are few. Exit code 1 when the loss
of the tokens is above 0.85 of the entropy.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import torch

import megalith
from megalith.checkpoint.native import read_state
from megalith.config.compose import compose
from megalith.models.family import ARCHITECTURE
from megalith.tasks.pretrain_config import ROOTS
from megalith.tasks.pretrain_data import open_data
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.topology import Topology

matplotlib.use("Agg")
from matplotlib import pyplot

SHARE = 0.85
BART_BATCHES = 64


def measure(run: Path) -> dict[str, Any]:
    """Names and numbers of one run."""
    state = read_state(max((run / "checkpoints").glob("step_*")))
    family = state[ARCHITECTURE]["family"]
    more = [f"trainer.limit_val_batches={BART_BATCHES}"] if family == "bart" else []
    config = compose(ROOTS[family], config_file=run / "config.yaml", overrides=more).config
    tokenizer = load_tokenizer(config.model.tokenizer)
    data = open_data(
        config,
        tokenizer,
        Topology.single("cpu"),
        vocab_size=config.model.architecture(tokenizer.vocab_size).vocab_size,
        stored=state["data_plan"],
        step=int(state["step"]),
        consumed=int(state["consumed_samples"]),
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    held = [(row["step"], row.get("val_lm_loss", row["val_loss"])) for row in rows if "val_loss" in row]
    last, loss = rows[-1], held[-1][1]
    start, targets = data.validation(), Counter[int]()
    batches = list(start()) if start else []
    if family == "bart":
        targets, loss = unseen(run, batches)
    else:
        for batch in batches:
            targets.update(batch["targets"][batch["targets"] >= 0].tolist())
    count = sum(targets.values())
    entropy = -sum(n / count * math.log(n / count) for n in targets.values())
    return {
        "family": family,
        "parameters": config.model.architecture(tokenizer.vocab_size).count_parameters(tokenizer.vocab_size),
        "vocabulary": tokenizer.vocab_size,
        "steps": int(state["step"]),
        "tokens": int(last["consumed_tokens"]),
        "targets": count,
        "unigram_entropy": round(entropy, 4),
        "loss": round(loss, 4),
        "share": round(loss / entropy, 4),
        "loss_of_all": round(held[-1][1], 4),
        "order_loss": next((round(row["val_sop_loss"], 4) for row in reversed(rows) if "val_sop_loss" in row), None),
        "training": [(row["step"], row.get("lm loss", row["train_loss"])) for row in rows if "train_loss" in row],
        "validation": held,
    }  # fmt: skip


@torch.inference_mode()
def unseen(run: Path, batches: list[dict[str, torch.Tensor]]) -> tuple[Counter[int], float]:
    """The targets that the encoder was not shown, and their mean loss."""
    model = megalith.load(run, device="cpu", precision="32").model
    targets, total = Counter[int](), 0.0
    for batch in batches:
        hidden = model(
            batch["encoder_tokens"], tokens=batch["tokens"], encoder_lengths=batch["encoder_lengths"]
        )
        for i, wanted in enumerate(batch["targets"].tolist()):
            length = sum(target >= 0 for target in wanted)
            source = batch["encoder_tokens"][i, : int(batch["encoder_lengths"][i])].tolist()
            same = difflib.SequenceMatcher(a=source, b=wanted[:length], autojunk=False)
            shown = {block.b + k for block in same.get_matching_blocks() for k in range(block.size)}
            hidden_ones = [place for place in range(length) if place not in shown]
            ids = torch.tensor([wanted[place] for place in hidden_ones], dtype=torch.long)
            targets.update(ids.tolist())
            chosen = model.logits(hidden[i, hidden_ones]).log_softmax(-1)
            total -= float(chosen.gather(1, ids[:, None]).sum())
    return targets, total / sum(targets.values())


def draw(found: list[dict[str, Any]], image: Path) -> None:
    """One curve beside the other, each with its entropy and the target."""
    figure, panels = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.6), dpi=110, squeeze=False)
    for axes, run in zip(panels[0], found, strict=True):
        axes.plot(*zip(*run["training"], strict=True), color="#9db8d9", label="training (one batch)")
        axes.plot(*zip(*run["validation"], strict=True), color="#1f4e8c", marker=".", label="validation")
        if run["loss"] != run["loss_of_all"]:
            axes.plot(
                run["steps"],
                run["loss"],
                "*",
                color="#1f4e8c",
                markersize=12,
                label="of hidden tokens, in the end",
            )
        entropy = run["unigram_entropy"]
        axes.axhline(entropy, color="#b3541e", linestyle=":", label=f"unigram entropy {entropy:.2f}")
        axes.axhline(
            SHARE * entropy, color="#b3541e", linestyle="--", label=f"0.85 of it: {SHARE * entropy:.2f}"
        )
        axes.set_title(
            run["family"].upper() + ("" if run["loss"] == run["loss_of_all"] else ": curves of all tokens")
        )
        axes.set_xlabel("step")
        axes.set_ylim(top=min(max(value for _, value in run["training"]), entropy + 2))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0][0].set_ylabel("loss of the guessed tokens, nats")
    figure.tight_layout()
    figure.savefig(image)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = [measure(run) for run in arguments.runs]
    if arguments.image:
        draw(found, arguments.image)
    short = [
        {key: value for key, value in run.items() if key not in ("training", "validation")} for run in found
    ]
    print(json.dumps(short, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(short, indent=1) + "\n", "utf-8")
    return int(any(run["share"] > SHARE for run in found))


if __name__ == "__main__":
    sys.exit(main())
