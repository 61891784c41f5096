"""What tuning reaches on real tasks: rows of SST-2, RTE and WinoGrande, and how many a model answers.

    MEGALITH_DATA=… python benchmarks/tasks.py rows FOLDER
    python benchmarks/tasks.py score FOLDER/sst2_valid.jsonl --checkpoint M [--prompts A] --label prompts --output results.json
    python benchmarks/tasks.py draw results.json --image docs/images/tasks.png

`rows` writes TASK_train.jsonl and TASK_valid.jsonl for `megalith tune`: {"prompt_tag", "taskname", "text", "answer", "answers"}.
SST-2: its own train and dev files. RTE: RTE 1-3 against the validation set, premises cut to 50 words so that a small model has room
for them. WinoGrande: 600 of the 860 items there are, the other 260 to score.
`score`: the answer to which the model gives the greater probability; accuracy with the 95 % interval of Wilson. A result takes
the place of an earlier one of the same rows and label.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch

import megalith
from megalith.generate.asking import ask
from megalith.generate.prompting import Tagged

matplotlib.use("Agg")
from matplotlib import pyplot

Row = dict[str, Any]
BATCH = 32


def sst2(data: Path) -> dict[str, list[Row]]:
    def read(name: str) -> list[Row]:
        lines = (line.split("\t", 1) for line in (data / "sst2" / name).read_text("utf-8").splitlines())
        return [row("SST2", f"{text} It was", [" bad", " good"], int(label)) for label, text in lines]

    return {"train": read("train.tsv"), "valid": read("dev.tsv")}


def rte(data: Path) -> dict[str, list[Row]]:
    def read(lines: list[str]) -> list[Row]:
        found = []
        for each in map(json.loads, lines):
            yes = str(each["label"]).lower() in ("entailment", "yes", "true")
            premise = " ".join(each["premise"].split()[:50])
            text = f"{premise} Question: {each['hypothesis']} True or false? Answer:"
            found.append(row("RTE", text, [" false", " true"], int(yes)))
        return found

    with gzip.open(data / "rte" / "rte1-3.jsonl.gz", "rt", encoding="utf-8") as file:
        train = read(file.read().splitlines())
    return {
        "train": train,
        "valid": read((data / "rte" / "rte_val.part.jsonl").read_text("utf-8").splitlines()),
    }


def winogrande(data: Path) -> dict[str, list[Row]]:
    lines = (data / "winogrande" / "winogrande_val.first860.jsonl").read_text("utf-8").splitlines()
    found = []
    for each in map(json.loads, lines):
        first, second = each["context_options"]
        words = zip(first.split(" "), second.split(" "), strict=False)
        same = " ".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], words))
        options = [first[len(same) :], second[len(same) :]]
        text = f"{same} _ {each['continuation']} The blank is"
        found.append(row("Winogrande", text, options, each["gold"]))
    return {"train": found[:600], "valid": found[600:]}


def row(tag: str, text: str, answers: list[str], right: int) -> Row:
    """`taskname` is what rows of a template call their tag."""
    return {"prompt_tag": tag, "taskname": tag, "text": text, "answer": answers[right], "answers": answers}


@torch.inference_mode()
def score(loaded: megalith.Loaded, rows: list[Row]) -> int:
    """How many rows are answered rightly."""
    tokenizer, right = loaded.needs_tokenizer(), 0
    tagged = loaded.prompting is not None and bool(loaded.prompting.adapter.names)
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        begins = [
            ask(loaded, Tagged(each["prompt_tag"], {"text": each["text"]}) if tagged else each["text"]).tokens
            for each in some
        ]
        sums = []
        for number in range(2):
            ends = [tokenizer.encode(each["answers"][number]) for each in some]
            sums.append(_log_probabilities(loaded, begins, ends))
        right += sum(
            int((b > a) == (each["answer"] == each["answers"][1]))
            for a, b, each in zip(*sums, some, strict=True)
        )
    return right


def _log_probabilities(
    loaded: megalith.Loaded, begins: list[list[int]], ends: list[list[int]]
) -> list[float]:
    rows = [[*begin, *end] for begin, end in zip(begins, ends, strict=True)]
    longest = max(map(len, rows))
    device = next(loaded.model.parameters()).device
    tokens = torch.tensor([[*each, *[0] * (longest - len(each))] for each in rows], device=device)
    hidden = loaded.model(tokens)
    found = []
    for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        logits = loaded.model.logits(hidden[i, len(begin) - 1 : len(begin) + len(end) - 1]).float()
        ids = torch.tensor(end, device=device)
        found.append(float(logits.log_softmax(-1).gather(1, ids[:, None]).sum()))
    return found


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's, 95 %."""
    z, share = 1.959964, right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return centre - half, centre + half


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("rows").add_argument("folder", type=Path)
    scoring = commands.add_parser("score")
    scoring.add_argument("rows", type=Path)
    scoring.add_argument("--checkpoint", required=True)
    scoring.add_argument("--prompts")
    scoring.add_argument("--label", default="untuned")
    scoring.add_argument("--output", type=Path)
    drawing = commands.add_parser("draw")
    drawing.add_argument("results", type=Path)
    drawing.add_argument("--image", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "rows":
        given.folder.mkdir(parents=True, exist_ok=True)
        for make in (sst2, rte, winogrande):
            for split, found in make(Path(os.environ["MEGALITH_DATA"])).items():
                lines = "".join(json.dumps(each) + "\n" for each in found)
                (given.folder / f"{make.__name__}_{split}.jsonl").write_text(lines, "utf-8")
        return 0
    if given.command == "draw":
        draw(json.loads(given.results.read_text("utf-8")), given.image)
        return 0
    rows = [json.loads(line) for line in given.rows.read_text("utf-8").splitlines()]
    loaded = megalith.load(given.checkpoint, prompts=[given.prompts] if given.prompts else [], precision="32")
    right = score(loaded, rows)
    result = {"rows": given.rows.stem, "label": given.label, "count": len(rows), "right": right,
              "accuracy": round(right / len(rows), 4), "interval": [round(end, 4) for end in interval(right, len(rows))]}  # fmt: skip
    print(json.dumps(result))
    if given.output:
        keep(result, given.output)
    return 0


def keep(result: Row, path: Path) -> None:
    """Beside the others of the file."""
    old = json.loads(path.read_text("utf-8")) if path.exists() else []
    others = [each for each in old if (each["rows"], each["label"]) != (result["rows"], result["label"])]
    path.write_text("[\n" + ",\n".join(map(json.dumps, [*others, result])) + "\n]\n", "utf-8")


def draw(results: list[Row], image: Path) -> None:
    """A point with its interval for each way, one panel a task."""
    tasks = list(dict.fromkeys(each["rows"] for each in results))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 3.0), dpi=110, squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        found = [each for each in results if each["rows"] == task]
        for place, each in enumerate(found):
            low, high = (100 * end for end in each["interval"])
            colour = "#8a8a8a" if each["label"] == "untuned" else "#1f4e8c"
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(100 * each["accuracy"], place, "o", color=colour)
        axes.set_yticks(range(len(found)), [each["label"] for each in found])
        axes.invert_yaxis()
        axes.axvline(50, color="#b3541e", linestyle=":")
        axes.set_xlim(30, 85)
        axes.set_title(f"{task.removesuffix('_valid')}: {found[0]['count']} rows", fontsize=10)
        axes.set_xlabel("answered rightly, %")
        axes.grid(axis="x", alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(image)


if __name__ == "__main__":
    sys.exit(main())
