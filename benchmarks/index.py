"""The GPT index against compiled helpers, and the whole build: 2·10⁶ documents, 10⁹ tokens (and two other shapes).

    python benchmarks/index.py [--helpers FOLDER] [--rounds N]

Rivals: megatron-core's compiled `helpers_cpp` where it is installed or lies in FOLDER (an unpacked wheel's
megatron/core/datasets); and a plain C++ loop that is compiled here where g++ exists. All must give the same rows. Rounds are
interleaved; medians and the median of the paired ratios are printed. Blends and the reading of samples follow.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megalith.data.blend import blend, normalised
from megalith.data.build import Request, open_run_data
from megalith.data.config import DataConfig
from megalith.data.index import epoch_index, megatron_index, sample_rows, samples_in
from megalith.data.indexed.builder import IndexedWriter
from megalith.data.loader import Loader
from megalith.data.masks import MaskOptions
from megalith.data.schedule import BatchRampUp

SHAPES = [(2_000_000, 10**9, 1024), (2_000_000, 10**9, 128), (20_000, 10**9, 1024)]

PLAIN_LOOP = r"""
#include <cstdint>
extern "C" void rows(const int32_t* sizes, const int32_t* order, int64_t seq, int64_t count, int32_t* out) {
    int64_t place = 0;
    int32_t offset = 0;
    out[0] = out[1] = 0;
    for (int64_t k = 1; k <= count; ++k) {
        int64_t left = seq;                       // tokens to move on
        while (sizes[order[place]] - offset <= left) {
            left -= sizes[order[place]] - offset;
            ++place;
            offset = 0;
        }
        offset += static_cast<int32_t>(left);
        out[2 * k] = static_cast<int32_t>(place);
        out[2 * k + 1] = offset;
    }
}
"""
"""Walks `seq` tokens on from each row to the next: what anybody would write first."""

Rows = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--helpers", type=Path, help="folder with megatron-core's helpers_cpp")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rivals = {"plain C++": plain_loop(), "megatron-core": megatron_core(arguments.helpers)}
    for documents, tokens, seq_length in SHAPES:
        compare_rows(corpus(documents, tokens), seq_length, rivals, arguments.rounds)
    whole_build(corpus(*SHAPES[0][:2]))
    blends()
    reading()


def corpus(documents: int, tokens: int) -> np.ndarray:
    """Lengths of documents, log-normal, that add up to about `tokens`."""
    draws = np.random.RandomState(1).lognormal(0, 1, documents)
    return np.maximum(draws * tokens / draws.sum(), 1).astype(np.int32)


def compare_rows(sizes: np.ndarray, seq_length: int, rivals: dict[str, Rows | None], rounds: int) -> None:
    order = np.arange(len(sizes), dtype=np.int32)
    np.random.RandomState(2).shuffle(order)
    count = samples_in(int(sizes.sum(dtype=np.int64)), seq_length)
    print(
        f"\nsample index: {len(sizes):,} documents, {sizes.sum(dtype=np.int64):,} tokens, length {seq_length}"
    )
    made: dict[str, Rows] = {"ours": sample_rows} | {name: rows for name, rows in rivals.items() if rows}
    expected = sample_rows(sizes, order, seq_length, count)
    times: dict[str, list[float]] = {name: [] for name in made}
    for name, rows in made.items():
        assert np.array_equal(rows(sizes, order, seq_length, count), expected), name
    for _ in range(rounds):
        for name, rows in made.items():
            times[name].append(seconds(lambda rows=rows: rows(sizes, order, seq_length, count)))
    for name, taken in times.items():
        paired = statistics.median(theirs / mine for theirs, mine in zip(taken, times["ours"], strict=True))
        said = "" if name == "ours" else f"   our speed: {paired:.2f} × theirs"
        print(f"  {name:<14} {statistics.median(taken) * 1e3:8.1f} ms (best {min(taken) * 1e3:.1f}){said}")


def whole_build(sizes: np.ndarray) -> None:
    documents = np.arange(len(sizes), dtype=np.int32)
    epoch = samples_in(int(sizes.sum(dtype=np.int64)), 1024)
    print("\nwhole index (documents, samples, shuffles), length 1024")
    for name, build in {
        "native epoch": lambda: epoch_index(sizes, documents, 1024, [1, 0, 0]),
        "megatron, 0.9 epochs": lambda: megatron_index(
            sizes, documents, 1024, samples=epoch * 9 // 10, seed=1
        ),
        "megatron, 2.3 epochs": lambda: megatron_index(
            sizes, documents, 1024, samples=epoch * 23 // 10, seed=1
        ),
    }.items():
        print(f"  {name:<22} {statistics.median(seconds(build) for _ in range(5)):6.3f} s")


def blends() -> None:
    print("\nblends")
    for count, sources in ((10**6, 3), (10**7, 3), (10**7, 10), (10**6, 200)):
        weights = normalised(np.random.default_rng(sources).random(sources) + 0.01)
        print(
            f"  {count:>11,} samples of {sources:>3} sources {seconds(lambda w=weights, n=count: blend(w, n)):6.3f} s"
        )


def reading() -> None:
    print("\nreading, batches of 64, warm")
    with tempfile.TemporaryDirectory() as folder:
        lengths = corpus(100_000, 60_000_000)
        with IndexedWriter(Path(folder) / "corpus", np.uint16) as writer:
            writer.add_block(
                np.random.default_rng(0).integers(1, 50_000, lengths.sum()).astype(np.uint16), lengths
            )
        for seq_length in (128, 1024):
            config = DataConfig(data_prefix=f"{folder}/corpus", splits_string="1,0,0")
            data = open_run_data(config, Request(seq_length=seq_length, seed=1, samples={"train": 10**6}))
            masks = MaskOptions(0, mask_loss=True, reset_positions=True, reset_attention=True)
            for name, options in (("plain", MaskOptions()), ("all masks", masks)):
                for workers in (0, 2):
                    rate = read_rate(Loader(data.train, options, workers=workers, vocab_size=50_000))
                    print(
                        f"  length {seq_length:>4}, {name:<9}, {workers} threads: {rate:8,.0f} samples/s, "
                        f"{rate * seq_length / 1e6:5.1f} M tokens/s"
                    )


def read_rate(loader: Loader, batches: int = 100) -> float:
    made = loader.training(BatchRampUp.constant(64))
    next(made)
    taken = seconds(lambda: [next(made) for _ in range(batches)])
    made.close()
    return 64 * batches / taken


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain_loop() -> Rows | None:
    compiler = shutil.which("g++")
    if compiler is None:
        print("no g++: the plain C++ loop is left out")
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "rows.cpp", Path(folder) / "rows.so"
        source.write_text(PLAIN_LOOP)
        subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-o", library, source], check=True)
        function = ctypes.CDLL(str(library)).rows

    def rows(sizes: np.ndarray, order: np.ndarray, seq_length: int, count: int) -> np.ndarray:
        out = np.empty((count + 1, 2), np.int32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (sizes, order)]
        function(
            *pointers, ctypes.c_int64(seq_length), ctypes.c_int64(count), ctypes.c_void_p(out.ctypes.data)
        )
        return out

    return rows


def megatron_core(folder: Path | None) -> Rows | None:
    if folder:
        sys.path.insert(0, str(folder))
    try:
        helpers = importlib.import_module("helpers_cpp" if folder else "megatron.core.datasets.helpers_cpp")
    except ImportError:
        print("megatron-core is not installed: its helper is left out")
        return None

    def rows(sizes: np.ndarray, order: np.ndarray, seq_length: int, count: int) -> np.ndarray:
        tokens = int(sizes.sum(dtype=np.int64))
        return helpers.build_sample_idx_int32(sizes, order, seq_length, 1, tokens, True, 1)

    return rows


if __name__ == "__main__":
    main()
