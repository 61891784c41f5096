"""A corpus of a few hundred lines that follow a pattern, its tokenizer and token files, and the smallest run on them.

A corpus is of one family: documents for GPT, sentences for the others. A run on it is a run of that family.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from megalith.config.compose import compose
from megalith.data.indexed.builder import IndexedWriter
from megalith.tasks.pretrain import run
from megalith.tasks.pretrain_config import ROOTS
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import WORD_PIECE_CASE, TokenizerFiles
from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained

LENGTH, DECODER_LENGTH, BATCH = 16, 8, 4
FAMILIES = list(ROOTS)
TOKENS = {"gpt": LENGTH, "bert": LENGTH, "t5": LENGTH + DECODER_LENGTH, "bart": 2 * LENGTH}
"""Of one sample."""


def make_corpus(folder: Path, family: str = "gpt") -> Path:
    """Tokenizer in `tok/`, token files `nano.bin|idx` and `more.bin|idx`, the family in `family`."""
    folder.mkdir(exist_ok=True)
    (folder / "family").write_text(family)
    if family == "gpt":
        return make_documents(folder)
    return make_sentences(folder)


def family_of(corpus: Path) -> str:
    return (corpus / "family").read_text()


def make_sentences(folder: Path) -> Path:
    """Documents of two to six sentences, in `whole` not cut into them; `vocab.txt` knows their words."""
    words = [f"w{i:02d}" for i in range(23)]
    (folder / "tok").mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "tok/vocab.txt").write_text("\n".join(vocabulary) + "\n")
    files = TokenizerFiles(type=WORD_PIECE_CASE, vocab_file=str(folder / "tok/vocab.txt"))
    tokenizer = load_tokenizer(files)
    for name, documents in (("nano", range(200)), ("more", range(200, 260)), ("whole", range(200))):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for d in documents:
                texts = [
                    " ".join(words[(i * 7 + d * 3 + s) % 23] for i in range(3 + (d + s) % 5))
                    for s in range(2 + d % 5)
                ]
                for text in [" ".join(texts)] if name == "whole" else texts:
                    writer.add_item(tokenizer.encode(text))
                writer.end_document()
            writer.finish()
    return folder


def make_documents(folder: Path) -> Path:
    texts = [" ".join(f"w{(i * 7 + d * 3) % 23:02d}" for i in range(10 + d % 40)) for d in range(200)]
    tokenizer = train_bpe(texts, TrainingOptions(vocab_size=290))
    write_trained(tokenizer, folder / "tok")
    for name, some in (("nano", texts), ("more", texts[:60])):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for ids in tokenizer.encode_batch(some):
                writer.add_item([*ids, tokenizer.eod])
                writer.end_document()
            writer.finish()
    return folder


def of_family(corpus: Path) -> list[str]:
    """What a run of the family says besides."""
    family = family_of(corpus)
    if family == "gpt":
        return [f"model.tokenizer.file={corpus}/tok/tokenizer.json", "model.optim.sched.warmup_steps=2"]
    found = [f"model.tokenizer.vocab_file={corpus}/tok/vocab.txt", "model.optim.sched.warmup_steps=2"]
    of_rows = {"t5": f"model.data.seq_length_dec={DECODER_LENGTH}", "bert": "model.data.masked_lm_prob=0.4"}
    return [*found, of_rows[family]] if family in of_rows else found


def overrides(corpus: Path, folder: Path, *more: str, steps: int = 12) -> list[str]:
    return [
        "model.num_layers=2", "model.hidden_size=16", "model.num_attention_heads=2", "model.ffn_hidden_size=32",
        f"model.encoder_seq_length={LENGTH}", "model.micro_batch_size=2", f"model.global_batch_size={BATCH}",
        f"model.data.data_prefix=[{corpus}/nano]", "model.data.splits_string='80,10,10'", "model.data.num_workers=1",
        f"model.data.index_mapping_dir={corpus}/index",
        "model.optim.lr=1e-2", "model.optim.sched.name=constant",
        "model.optim.sched.min_lr=0", "model.optim.sched.constant_steps=0", "trainer.accelerator=cpu", "trainer.precision=32",
        f"trainer.max_steps={steps}", "trainer.val_check_interval=4", "trainer.limit_val_batches=2",
        "trainer.log_every_n_steps=1", "exp_manager.create_tensorboard_logger=false",
        f"exp_manager.explicit_log_dir={folder}", *of_family(corpus), *more,
    ]  # fmt: skip


def pretrain(corpus: Path, folder: Path, *more: str, steps: int = 12) -> tuple[int, str]:
    """Exit code and what was printed."""
    text = io.StringIO()
    composed = compose(ROOTS[family_of(corpus)], overrides=overrides(corpus, folder, *more, steps=steps))
    return run(composed, console=Console(file=text, width=300)), text.getvalue()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, key: str = "train_loss") -> dict[int, float]:
    found = [(row["step"], row[key]) for row in rows(folder) if key in row]
    assert len(found) == len(dict(found)), "a step was logged twice"
    return dict(found)


def steps_in(folder: Path) -> list[int]:
    return [int(p.name[5:]) for p in sorted((folder / "checkpoints").glob("step_*"))]
