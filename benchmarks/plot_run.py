"""Draws the loss curve of a run from its metrics.jsonl, with the baselines of `megalith evaluate perplexity --json`.

python benchmarks/plot_run.py RUN/metrics.jsonl --perplexity perplexity.json --output curve.png
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    arguments = parse()
    rows = [json.loads(line) for line in arguments.metrics.read_text("utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(7.5, 4), dpi=110)
    train = [(r["step"], r["train_loss"]) for r in rows if "train_loss" in r]
    held = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
    axes.plot(*zip(*train, strict=True), color="#9db8d9", label="training (one batch)")
    axes.plot(*zip(*held, strict=True), color="#1f4e8c", marker="o", label="validation")
    if arguments.perplexity:
        report = json.loads(arguments.perplexity.read_text("utf-8"))
        for name, style in (("unigram", ":"), ("bigram", "--")):
            value = report[f"{name}_perplexity"]
            axes.axhline(
                math.log(value), color="#b3541e", linestyle=style, label=f"{name}: perplexity {value:.0f}"
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(arguments.output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--perplexity", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
