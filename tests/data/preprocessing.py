"""What the tests of the preprocessing share: a tokenizer, nasty corpora, and the output spelt out byte by byte."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalith.data.preprocess.options import Options
from megalith.data.preprocess.report import Summary
from megalith.data.preprocess.run import preprocess
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import TokenizerFiles
from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat;",
    "naïve",
    "café",
    "中文",
    "字",
    "«quoted»",
    "don't",
    "1984",
    "3.14",
    "END\tindented",
    "line\n\nnew",
    "paragraph",
    "👍🏽",
]
BAD_LINES = [
    (b'{"text": "cut off', "the line ends early"),
    (b'{"text": "a"} {"text": "b"}', "malformed JSON"),
    (b'{"txt": "other key"}', "no key 'text'"),
    (b'{"text": null}', "the value of 'text' is null, not text"),
    (b'{"text": 5}', "the value of 'text' is a number, not text"),
    (b'{"text": ["a"]}', "the value of 'text' is an array, not text"),
    (b'["text"]', "Expected `object`, got `array`"),
    (b'{"text": "caf\xe9"}', "invalid UTF-8 at byte 13"),
    (b'{"text": "fine", "title": "\xff"}', "invalid UTF-8 at byte 27"),
    (b'\xef\xbb\xbf{"text": "after a mark"}', "byte order mark"),
    (b'{"text": "\\ud800 alone"}', "lone surrogate"),
    (b'{"text": "at the end \\ud800"}', "lone surrogate"),
    (b'{"text": NaN}', "malformed JSON"),
    (b"plain text", "malformed JSON"),
    (b'{"text": "a\x01b"}', "malformed JSON"),
]


def make_tokenizer(folder: Path, vocab_size: int = 400) -> DefinedTokenizer:
    write_trained(
        train_bpe([" ".join(WORDS) * 9, "over and over again " * 50], TrainingOptions(vocab_size)), folder
    )
    return load_tokenizer(folder)


def make_texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Texts of very unequal length, some of them empty, some of them twice."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=int(words * rng.random() ** 3))) for _ in range(count)]
    for number in range(7, count, 13):
        texts[number] = texts[number - 5]
    return texts


def json_lines(texts: Iterable[str], **extra: Any) -> bytes:
    lines = [
        json.dumps({"text": text, **extra}, ensure_ascii=number % 2 == 0) for number, text in enumerate(texts)
    ]
    return ("\n".join(lines) + "\n").encode()


def options(folder: Path, inputs: Sequence[Path | str], **changes: Any) -> Options:
    """A run over the tokenizer in `folder`/tok with small blocks, output prefix `folder`/out."""
    values: dict[str, Any] = {
        "inputs": tuple(map(str, inputs)),
        "output_prefix": folder / "out",
        "tokenizer": TokenizerFiles(file=str(folder / "tok")),
        "block_bytes": 1 << 14,
    }
    return Options(**{**values, **changes})


def run(folder: Path, inputs: Sequence[Path | str], **changes: Any) -> Summary:
    return preprocess(options(folder, inputs, **changes), notify=lambda text: None)


def expected_files(
    tokenizer: DefinedTokenizer, texts: Iterable[str], *, append_eod: bool = False, dtype: str = "<u2"
) -> tuple[bytes, bytes]:
    """`.bin` and `.idx` of the documents, by the format's definition and the reference tokenizer."""
    rows = [ids + [tokenizer.eod] * append_eod for ids in map(tokenizer.encode, texts) if ids]
    tokens = np.array([id for row in rows for id in row], dtype).tobytes()
    size = np.dtype(dtype).itemsize
    offsets, at = [], 0
    for row in rows:
        offsets.append(at)
        at += len(row) * size
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8 if size == 2 else 4, len(rows), len(rows) + 1)
    index += np.array([len(row) for row in rows], "<i4").tobytes()
    index += np.array(offsets, "<i8").tobytes() + np.arange(len(rows) + 1, dtype="<i8").tobytes()
    return tokens, index


def output(folder: Path, key: str = "text") -> tuple[bytes, bytes]:
    prefix = folder / f"out_{key}_document"
    return prefix.with_name(prefix.name + ".bin").read_bytes(), prefix.with_name(
        prefix.name + ".idx"
    ).read_bytes()


def rejects(folder: Path) -> list[dict[str, Any]]:
    path = folder / "out.rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
