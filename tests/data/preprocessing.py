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
from megalith.data.sentences import Sentences
from megalith.tokenizers.base import Tokenizer
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


def make_prose(count: int, seed: int = 0) -> list[str]:
    """Texts of paragraphs and sentences, some quoted, with white space of all kinds, some texts empty, blank, or twice."""
    rng = random.Random(seed)
    ends, gaps = (".", "!", "?", '."', ".”", ""), (" ", "  ", "\n", "\n\n", " \n \n\t", "\n\n\n")

    def sentence() -> str:
        words = rng.choices(WORDS[:13], k=rng.randint(1, 9))
        return rng.choice(("", "", "“", '"')) + " ".join(words).capitalize() + rng.choice(ends)

    texts = [
        "".join(sentence() + rng.choice(gaps) for _ in range(int(30 * rng.random() ** 3)))
        for _ in range(count)
    ]
    for number in range(7, count, 13):
        texts[number] = rng.choice((texts[number - 5], " \n\n ", "..."))
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
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    append_eod: bool = False,
    dtype: str = "<u2",
    sentences: Sentences | None = None,
) -> tuple[bytes, bytes]:
    """`.bin` and `.idx` of the documents, by the format's definition and the reference tokenizer, item by item."""
    tokens, lengths, ends = [], [], [0]
    for text in texts:
        parts = [part.decode() for part in sentences.split(text.encode())] if sentences else [text]
        items = [ids for ids in map(tokenizer.encode, parts) if ids]
        if not items:
            continue
        if append_eod:
            items[-1] = [*items[-1], tokenizer.eod]
        for item in items:
            tokens += item
            lengths.append(len(item))
        ends.append(len(lengths))
    size = np.dtype(dtype).itemsize
    offsets = size * (np.cumsum(lengths) - lengths)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8 if size == 2 else 4, len(lengths), len(ends))
    index += np.array(lengths, "<i4").tobytes()
    index += offsets.astype("<i8").tobytes() + np.array(ends, "<i8").tobytes()
    return np.array(tokens, dtype).tobytes(), index


def output(folder: Path, key: str = "text", unit: str = "document") -> tuple[bytes, bytes]:
    prefix = folder / f"out_{key}_{unit}"
    return prefix.with_name(prefix.name + ".bin").read_bytes(), prefix.with_name(
        prefix.name + ".idx"
    ).read_bytes()


def rejects(folder: Path) -> list[dict[str, Any]]:
    path = folder / "out.rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
