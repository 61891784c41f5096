"""Trains a byte-level BPE (GPT-2's scheme), BERT's WordPiece or a SentencePiece Unigram, and writes the customary files.

Knows texts in, a tokenizer out. Refuses to know where the texts come from.
"""

from __future__ import annotations

import io
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO

import msgspec
from sentencepiece import SentencePieceTrainer

import tokenizers
from megalith.errors import DataError
from megalith.tokenizers.base import END_OF_TEXT
from megalith.tokenizers.bpe import ROLES_FILE, TOKENIZER_FILE, DefinedTokenizer, write_files
from megalith.tokenizers.names import GPT2_BPE, SENTENCE_PIECE, WORD_PIECE_LOWER, WORD_PIECE_TYPES
from megalith.tokenizers.sentencepiece import MODEL_FILE, SentencePieceTokenizer, from_model
from megalith.tokenizers.wordpiece import BERT_ROLES, UNKNOWN, from_vocabulary
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

_BYTES = 256
_LONGEST_LINE = 1 << 20
_MOST_LETTERS = 1000
_DECODER = msgspec.json.Decoder(str)


@dataclass(frozen=True)
class TrainingOptions:
    """Size of the vocabulary (special tokens included), how often a pair must occur to be merged, special tokens."""

    vocab_size: int
    min_frequency: int = 2
    special_tokens: Sequence[str] = (END_OF_TEXT,)

    def check(self, alphabet: int = _BYTES) -> None:
        """DataError for what cannot be; `alphabet` is what the vocabulary holds besides special tokens and what is learnt."""
        if len(set(self.special_tokens)) != len(self.special_tokens) or not all(self.special_tokens):
            raise DataError("a special token is empty or given twice", where="special tokens")
        smallest = alphabet + len(self.special_tokens)
        if self.vocab_size < smallest:
            before = f"the {alphabet} bytes and " if alphabet else ""
            raise DataError(
                f"{self.vocab_size} is too small: {before}the special tokens alone are {smallest}",
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


def train_word_piece(
    texts: Iterable[str], options: TrainingOptions, *, type: str, progress: bool = False
) -> DefinedTokenizer:
    """Train BERT's WordPiece on texts: BertWordPieceLowerCase or BertWordPieceCase.

    Ids: BERT's five special tokens, those of `options`, the letters inside words (`##a`), then characters and pieces in
    the order they were learnt; the same texts and options give the same tokenizer. Megatron's [BOS] and [EOS] follow the vocabulary.
    """
    special = [*BERT_ROLES.values(), *options.special_tokens]
    replace(options, special_tokens=special).check(alphabet=0)
    engine = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    engine.normalizer = normalizers.BertNormalizer(lowercase=type == WORD_PIECE_LOWER)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    with tempfile.TemporaryFile() as copy:
        inner = [f"##{letter}" for letter in _inner_letters(texts, engine.normalizer, copy)]
        replace(options, special_tokens=[*special, *inner]).check(alphabet=0)
        trainer = trainers.WordPieceTrainer(
            vocab_size=options.vocab_size,
            min_frequency=options.min_frequency,
            limit_alphabet=_MOST_LETTERS,
            special_tokens=[*special, *inner],  # given ids here, or they depend on a hash table's order
            show_progress=progress,
        )
        copy.seek(0)
        engine.train_from_iterator(map(_DECODER.decode, copy), trainer)
    vocabulary = dict(sorted(engine.get_vocab().items(), key=lambda item: item[1]))
    return from_vocabulary(vocabulary, type=type, where="trained tokenizer")


def _inner_letters(texts: Iterable[str], normalizer: normalizers.Normalizer, copy: IO[bytes]) -> list[str]:
    """The most frequent characters that may stand inside a word, sorted; the texts are copied to a file, line by line."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
        copy.write(msgspec.json.encode(text) + b"\n")
    inner = [letter for letter in counts if _is_inner(letter)]
    return sorted(sorted(inner, key=lambda letter: (-counts[letter], letter))[:_MOST_LETTERS])


def _is_inner(letter: str) -> bool:
    """Whether BERT's rules leave it with its neighbours: white space, punctuation and Chinese characters stand alone."""
    if letter.isascii():
        return letter.isalnum()
    return unicodedata.category(letter)[0] in "LMNS" and not 0x3400 <= ord(letter) <= 0x9FFF


def train_sentence_piece(texts: Iterable[str], options: TrainingOptions) -> SentencePieceTokenizer:
    """Train a SentencePiece Unigram on texts, by SentencePiece's own trainer; T5's ids: <pad> 0, </s> 1, <unk> 2.

    A line is a sentence to the trainer. `options.min_frequency` does not count. Megatron's special tokens follow.
    """
    replace(options, special_tokens=("<pad>", "</s>", "<unk>", *options.special_tokens)).check(alphabet=0)
    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    first = next(lines, None)
    if first is None:
        raise DataError("no text was found", fix="check the files, and the key that has the text")
    try:
        SentencePieceTrainer.train(
            sentence_iterator=chain([first], lines),
            model_writer=model,
            vocab_size=options.vocab_size,
            hard_vocab_limit=False,
            max_sentence_length=_LONGEST_LINE,
            control_symbols=list(options.special_tokens),
            num_threads=1,
            minloglevel=2,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"SentencePiece cannot learn from this text: {str(error).rpartition(') ')[2] or error}",
            where="vocabulary size",
            fix="give more text, or a larger vocabulary: every character of the text is an entry",
        ) from None
    return from_model(model.getvalue(), type=SENTENCE_PIECE, where="trained tokenizer")


def write_trained(tokenizer: DefinedTokenizer | SentencePieceTokenizer, folder: Path) -> list[Path]:
    """Write the folder of `save` and beside it what others read: GPT-2's `vocab.json` and `merges.txt`, or BERT's
    `vocab.txt`; returns the files.
    """
    tokenizer.save(folder)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [folder / MODEL_FILE, folder / ROLES_FILE]
    more = _word_piece_files(tokenizer) if tokenizer.type in WORD_PIECE_TYPES else _gpt2_files(tokenizer)
    write_files(folder, more)
    return [folder / name for name in (TOKENIZER_FILE, ROLES_FILE, *more)]


def _word_piece_files(tokenizer: DefinedTokenizer) -> dict[str, bytes]:
    return {"vocab.txt": "".join(f"{piece}\n" for piece in tokenizer.definition["model"]["vocab"]).encode()}


def _gpt2_files(tokenizer: DefinedTokenizer) -> dict[str, bytes]:
    vocabulary = dict(sorted(tokenizer.vocabulary.items(), key=lambda item: item[1]))
    merges = [" ".join(merge) for merge in tokenizer.definition["model"]["merges"]]
    written = "\n".join(["#version: 0.2", *merges]) + "\n"
    return {"vocab.json": msgspec.json.encode(vocabulary), "merges.txt": written.encode("utf-8")}
