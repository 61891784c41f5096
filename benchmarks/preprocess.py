"""`megalith data preprocess` against raw gigatoken, on the same file, in turns; and with BERT's and T5's tokenizers.

    MEGALITH_DATA=… python benchmarks/preprocess.py [--rounds 7] [--copies 5] [--output benchmarks/results/preprocess.json]

The file is the novels of `corpus-eltec-novels`, unpacked and put behind each other `--copies` times (≥ 200 MB); the
tokenizer is GPT-2's. Each round runs both ways once, each in a fresh process, process start included:

    megalith  megalith data preprocess … --workers 2 --append-eod, with everything it does: lines checked, bad ones put
              aside, journal, hashes, duplicates, the check against the reference tokenizer, fsync, side-car
    raw       gigatoken's encode_files over the whole file (its own threads), ids to uint16 with the end-of-document
              token after each document, .bin and .idx written; nothing checked, nothing synced

Both leave the same .bin and .idx, which is compared. Reported are medians, MB of the input file a second, and the median
of the ratios inside a round (raw time ÷ megalith time: above 1 megalith is faster). Peak memory (PSS of the process
tree) is taken in runs of their own, since looking costs time. Exit code 1 when the target is missed.

    python benchmarks/preprocess.py --families [--rounds 5] [--copies 1]

measures WordPiece (bert-base-uncased) and SentencePiece (t5-small) instead and leaves the other rows of the results as
they are: megalith as above, with `--split-sentences` too, and the `tokenizers` library's encode_batch_fast of the same
documents with its own threads, nothing written. Reported are the best and the median of each, and the ratio of bests.
"""

from __future__ import annotations

import argparse
import filecmp
import gzip
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

TARGET_RATIO = 0.9
LEAST_BYTES = 200_000_000
EOD = 50256

RAW = """
import sys
import numpy as np
from gigatoken import JsonlFileSource, Tokenizer

source, definition, prefix, eod = sys.argv[1:]
layout = Tokenizer(definition).encode_files(JsonlFileSource([source], field="text")).layout
ids, ends = np.asarray(layout.content.data), np.asarray(layout.offsets.data)
sizes = np.diff(ends) + 1
sizes = sizes[sizes > 1]
last = np.cumsum(sizes) - 1
tokens = np.empty(len(ids) + len(sizes), np.uint16)
kept = np.ones(len(tokens), bool)
kept[last] = False
tokens[kept] = ids
tokens[last] = int(eod)
tokens.tofile(prefix + ".bin")
with open(prefix + ".idx", "wb") as file:
    file.write(b"MMIDIDX\\0\\0" + np.array([1], "<u8").tobytes() + bytes([8]))
    file.write(np.array([len(sizes), len(sizes) + 1], "<u8").tobytes())
    file.write(sizes.astype("<i4").tobytes())
    file.write(((last + 1 - sizes) * 2).astype("<i8").tobytes())
    file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
"""


def make_corpus(folder: Path, data: Path, copies: int) -> Path:
    """The novels, `copies` times, in one file; read once so that both ways find it in the page cache."""
    path = folder / "novels.jsonl"
    with path.open("wb") as out:
        for _ in range(copies):
            for part in sorted((data / "corpus-eltec-novels").glob("*.jsonl.gz")):
                with gzip.open(part) as file:
                    shutil.copyfileobj(file, out, 1 << 20)
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    return path


def make_definition(folder: Path, vocab: Path) -> Path:
    """GPT-2's tokenizer as the tokenizer.json that gigatoken loads, without special tokens to be found in text."""
    from megalith.tokenizers.definition import corpus_definition, read_gpt2_files

    path = folder / "tokenizer.json"
    definition = corpus_definition(read_gpt2_files(vocab / "vocab.json", vocab / "merges.txt"))
    path.write_text(json.dumps(definition))
    return path


def commands(folder: Path, corpus: Path, vocab: Path, workers: int) -> dict[str, list[str]]:
    definition = make_definition(folder, vocab)
    flags = {
        "--input": corpus,
        "--output-prefix": folder / "own",
        "--vocab-file": vocab / "vocab.json",
        "--merge-file": vocab / "merges.txt",
        "--workers": workers,
    }
    own = [sys.executable, "-m", "megalith", "data", "preprocess", "--append-eod"]
    for flag, value in flags.items():
        own += [flag, str(value)]
    raw = [sys.executable, "-c", RAW, str(corpus), str(definition), str(folder / "raw"), str(EOD)]
    return {"megalith": own, "raw": raw}


def clear(folder: Path) -> None:
    """Nothing is left to be overwritten, which would cost one way more than the other."""
    for path in [*folder.glob("own*"), *folder.glob("raw*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def timed(command: list[str]) -> tuple[float, float]:
    """Wall seconds, and processor seconds of the process and all its children."""
    before = os.times()
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, used


def peak_memory(command: list[str]) -> float:
    """Most MiB of the process tree at any time, shared pages counted once; NaN where /proc does not tell."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_kibibytes(process.pid))
        time.sleep(0.01)
    return peak / 1024 if peak else float("nan")


def tree_kibibytes(pid: int) -> int:
    total, todo = 0, [pid]
    while todo:
        each = todo.pop()
        try:
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
            todo += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
        except OSError:
            continue
        total += sum(map(int, re.findall(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)))
    return total


def same_output(folder: Path) -> bool:
    pairs = [(folder / f"own_text_document.{end}", folder / f"raw.{end}") for end in ("bin", "idx")]
    return all(filecmp.cmp(own, raw, shallow=False) for own, raw in pairs)


def measure(folder: Path, corpus: Path, vocab: Path, rounds: int, workers: int) -> dict[str, object]:
    ways = commands(folder, corpus, vocab, workers)
    size = corpus.stat().st_size
    walls: dict[str, list[float]] = {way: [] for way in ways}
    cores: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        clear(folder)
        order = list(ways) if number % 2 == 0 else list(reversed(ways))
        for way in order:
            wall, used = timed(ways[way])
            walls[way].append(wall)
            cores[way].append(used)
        if not same_output(folder):
            raise SystemExit("the two ways wrote different files")
        print(
            f"round {number + 1}: "
            + ", ".join(
                f"{way} {walls[way][-1]:.2f} s ({size / 1e6 / walls[way][-1]:.0f} MB/s)" for way in ways
            )
            + f", ratio {walls['raw'][-1] / walls['megalith'][-1]:.2f}, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    memory = {}
    for way, command in ways.items():
        clear(folder)
        memory[way] = round(peak_memory(command), 1)
    ratios = [raw / own for own, raw in zip(walls["megalith"], walls["raw"], strict=True)]
    return {
        "input_bytes": size,
        "rounds": rounds,
        "workers": workers,
        "median_seconds": {way: round(statistics.median(values), 3) for way, values in walls.items()},
        "median_mb_per_second": {
            way: round(size / 1e6 / statistics.median(values), 1) for way, values in walls.items()
        },
        "median_processor_seconds": {
            way: round(statistics.median(values), 3) for way, values in cores.items()
        },
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "seconds": {way: [round(value, 3) for value in values] for way, values in walls.items()},
        "peak_memory_mib": memory,
        "same_output": True,
        "target_ratio": TARGET_RATIO,
    }


LIBRARY = """
import json, sys
import tokenizers

source, definition = sys.argv[1:]
engine = tokenizers.Tokenizer.from_file(definition)
with open(source, "rb") as file:
    texts = [json.loads(line)["text"] for line in file]
for first in range(0, len(texts), 256):
    engine.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
"""
SLOW_EVERY = 4
"""Of so many rounds, one measures the slow ways, too."""
TARGETS = {"wordpiece": 30.0, "sentencepiece": 20.0}


def family_commands(folder: Path, corpus: Path, data: Path, workers: int) -> dict[str, dict[str, list[str]]]:
    """By family and way."""
    from megalith.tokenizers.wordpiece import read_vocabulary, word_piece_definition

    vocab = data / "bert-vocab" / "bert-base-uncased-vocab.txt"
    definition = folder / "bert.json"
    definition.write_text(json.dumps(word_piece_definition(read_vocabulary(vocab), lowercase=True)))
    own = [sys.executable, "-m", "megalith", "data", "preprocess", "--input", str(corpus)]
    own += ["--output-prefix", str(folder / "own"), "--workers", str(workers), "--tokenizer-type"]
    model = data / "t5-vocab" / "spiece.reconstructed.model"
    families = {
        "wordpiece": ([*own, "BertWordPieceLowerCase", "--vocab-file", str(vocab)], definition),
        "sentencepiece": (
            [*own, "SentencePieceTokenizer", "--tokenizer-model", str(model)],
            data / "t5-vocab" / "t5-small-tokenizer.json",
        ),
    }
    return {
        name: {
            "megalith": command,
            "megalith, sentences": [*command, "--split-sentences"],
            "tokenizers": [sys.executable, "-c", LIBRARY, str(corpus), str(library)],
        }
        for name, (command, library) in families.items()
    }


def measure_families(folder: Path, corpus: Path, data: Path, rounds: int, workers: int) -> dict[str, object]:
    size = corpus.stat().st_size
    found: dict[str, object] = {}
    for family, ways in family_commands(folder, corpus, data, workers).items():
        runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(rounds):
            for way, command in ways.items():
                if way == "megalith" or number % SLOW_EVERY == 0:
                    clear(folder)
                    runs[way].append(timed(command))
        walls = {way: [wall for wall, _ in each] for way, each in runs.items()}
        best = {way: size / 1e6 / min(each) for way, each in walls.items()}
        found[family] = {
            "input_bytes": size,
            "runs": {way: len(each) for way, each in runs.items()},
            "workers": workers,
            "best_mb_per_second": {way: round(speed, 1) for way, speed in best.items()},
            "median_mb_per_second": {
                way: round(size / 1e6 / statistics.median(each), 1) for way, each in walls.items()
            },
            "least_processor_seconds": {
                way: round(min(used for _, used in each), 2) for way, each in runs.items()
            },
            "best_ratio_to_tokenizers": round(best["megalith"] / best["tokenizers"], 2),
            "target_mb_per_second": TARGETS[family],
            "load_average": round(os.getloadavg()[0], 1),
        }
        print(family, json.dumps(found[family]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--copies", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the corpus and the output go [a temporary folder]")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/preprocess.json"))
    parser.add_argument("--families", action="store_true", help="WordPiece and SentencePiece only")
    arguments = parser.parse_args()
    if "MEGALITH_DATA" not in os.environ:
        raise SystemExit("set MEGALITH_DATA to the folder with corpus-eltec-novels and gpt2-vocab")
    data = Path(os.environ["MEGALITH_DATA"])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        corpus = make_corpus(Path(name), data, arguments.copies)
        if corpus.stat().st_size < LEAST_BYTES and not arguments.families:
            print("note: under 200 MB process start counts for more than it should", file=sys.stderr)
        if arguments.families:
            result = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
            result["families"] = measure_families(
                Path(name), corpus, data, arguments.rounds, arguments.workers
            )
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")
            return
        result = measure(Path(name), corpus, data / "gpt2-vocab", arguments.rounds, arguments.workers)
    result["machine"] = {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gigatoken": version("gigatoken"),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(
        json.dumps(
            {key: result[key] for key in ("median_seconds", "median_mb_per_second", "peak_memory_mib")}
        )
    )
    print(f"median ratio {result['ratio']} (target {TARGET_RATIO}), written to {arguments.output}")
    sys.exit(result["ratio"] < TARGET_RATIO)


if __name__ == "__main__":
    main()
