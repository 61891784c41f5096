"""Trains a byte-level BPE (GPT-2's scheme) and writes it in both customary forms.

Knows texts in, a tokenizer out. Refuses to know where the texts come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import tokenizers
from megalith.errors import DataError
from megalith.tokenizers.base import END_OF_TEXT
from megalith.tokenizers.bpe import DefinedTokenizer, write_files
from megalith.tokenizers.names import GPT2_BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

_BYTES = 256


@dataclass(frozen=True)
class TrainingOptions:
    """Size of the vocabulary (special tokens included), how often a pair must occur to be merged, special tokens."""

    vocab_size: int
    min_frequency: int = 2
    special_tokens: Sequence[str] = (END_OF_TEXT,)

    def check(self) -> None:
        if len(set(self.special_tokens)) != len(self.special_tokens) or not all(self.special_tokens):
            raise DataError("a special token is empty or given twice", where="special tokens")
        smallest = _BYTES + len(self.special_tokens)
        if self.vocab_size < smallest:
            raise DataError(
                f"{self.vocab_size} is too small: the 256 bytes and the special tokens alone are {smallest}",
                where="vocabulary size",
                fix=f"give at least {smallest}",
            )
        if self.min_frequency < 1:
            raise DataError(f"{self.min_frequency} is below 1", where="min frequency")


def train_bpe(texts: Iterable[str], options: TrainingOptions, *, progress: bool = False) -> DefinedTokenizer:
    """Train on texts; the same texts and options give the same tokenizer.

    Ids: special tokens, the 256 bytes, then merges in the order they were learnt. `<|endoftext|>` ends a document if it
    is among the special tokens. The vocabulary is smaller than asked where no pair occurs often enough.
    """
    options.check()
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        min_frequency=options.min_frequency,
        special_tokens=list(options.special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    engine.train_from_iterator(texts, trainer)
    definition = msgspec.json.decode(engine.to_str())
    roles = dict.fromkeys(("eod", "bos", "eos"), END_OF_TEXT) if END_OF_TEXT in options.special_tokens else {}
    return DefinedTokenizer(definition, roles, type=GPT2_BPE, where="trained tokenizer")


def write_trained(tokenizer: DefinedTokenizer, folder: Path) -> list[Path]:
    """Write the folder of `save` and GPT-2's `vocab.json` and `merges.txt` beside it; returns the files."""
    tokenizer.save(folder)
    model = tokenizer.definition["model"]
    vocabulary = dict(sorted(tokenizer.vocabulary.items(), key=lambda item: item[1]))
    merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]) + "\n"
    write_files(folder, {"vocab.json": msgspec.json.encode(vocabulary), "merges.txt": merges.encode("utf-8")})
    return [
        folder / name for name in ("tokenizer.json", "megalith_tokenizer.json", "vocab.json", "merges.txt")
    ]
