"""A tokenizer trained on the spot and token files made with it, side-car included."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalith.data.indexed.builder import IndexedWriter
from megalith.data.indexed.sidecar import SideCar, TokenizerRecord, content_record, write_side_car
from megalith.tokenizers.bpe import DefinedTokenizer
from megalith.tokenizers.config import TokenizerConfig
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained

TEXTS = ["The cat sat.", "A dog, on the mat!", "Third: naïve 中文"]


def make_tokenizer(folder: Path, vocab_size: int = 280) -> DefinedTokenizer:
    write_trained(
        train_bpe(["the cat sat on the mat, a dog sat on the cat " * 9], TrainingOptions(vocab_size)), folder
    )
    return load_tokenizer(folder)


def make_pair(
    prefix: Path, folder: Path, texts: list[str] = TEXTS, *, append_eod: bool = True, side_car: bool = True
) -> Path:
    """Token files of texts, by the tokenizer in `folder`."""
    tokenizer = load_tokenizer(folder)
    ends = [tokenizer.eod] if append_eod else []
    writer = IndexedWriter(prefix, np.uint16)
    for text in texts:
        writer.add_item(np.array(tokenizer.encode(text) + ends, np.int64))
        writer.end_document()
    written = writer.finish()
    if side_car:
        config = TokenizerConfig(file=str(folder)).located()
        record = TokenizerRecord(
            tokenizer.type, tokenizer.hash(), tokenizer.vocab_size, tokenizer.eod, config
        )
        write_side_car(
            prefix,
            SideCar(
                tokenizer=record,
                content=content_record(written),
                items=written.items,
                documents=written.documents,
                tokens=written.tokens,
                append_eod=append_eod,
                created_by="megalith test",
                sources=[f"{prefix.name}.jsonl"],
            ),
        )
    return prefix
