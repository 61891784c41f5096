"""What was written, opened anew, its weights beside the source's, and the logits of both sides.

Weights are compared bit by bit while the written ones compute. Where all are the same, the source's logits are the same
computation once more, and are not made again; where any is not, they are.

Knows sources. The verdict is `certificate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from megalith.checkpoint.convert.certificate import Computed, Failed, precision_of
from megalith.checkpoint.convert.independent import ask_transformers
from megalith.checkpoint.convert.passage import Tokens
from megalith.checkpoint.convert.source import Source, of_foreign, open_native
from megalith.checkpoint.convert.streamed import logits
from megalith.checkpoint.convert.twins import different, twins
from megalith.checkpoint.files import Progress
from megalith.checkpoint.foreign import open_foreign
from megalith.checkpoint.lazy import Lazy
from megalith.models.config import ModelConfig, effective
from megalith.tokenizers.base import Tokenizer

Report = Callable[[str, int, int], None]
"""Told what is being done, bytes done and all bytes of it."""


def open_back(folder: Path, source: Source, to: str) -> Source:
    """What was written, opened as anybody would. Errors: `Failed` where it is another architecture."""
    back = (
        open_native(folder)
        if to == "native"
        else of_foreign(open_foreign(folder, vocab_size=source.config.vocab_size))
    )
    ours, theirs = effective(source.config), effective(back.config)
    free = _not_kept(to)
    odd = [name for name in ours if name not in free and ours[name] != theirs.get(name)]
    if odd:
        lines = [f"{name}: {ours[name]} before, {theirs.get(name)} after" for name in odd]
        raise Failed("\n    ".join(["what was written is another model", *lines]))
    return back


def _not_kept(to: str) -> set[str]:
    """Fields that a format does not keep and that change no logit."""
    training = {"init_method_std", "hidden_dropout", "attention_dropout", "use_scaled_init_method"}
    return set() if to == "native" else {"make_vocab_size_divisible_by", "attention_core", *training}


def compute(
    source: Source,
    sides: tuple[Mapping[str, Lazy], Mapping[str, Lazy]],
    back: Source,
    asked: tuple[Tokens, Tokenizer | None],
    report: Report,
) -> Computed:
    (weights, tensors), (tokens, tokenizer) = sides, asked
    dtype = precision_of(source)
    changed = any(
        lazy.dtype != tensors[name].dtype and _loses(lazy.dtype, tensors[name].dtype)
        for name, lazy in weights.items()
    )
    passes = 2 if changed else 1
    progress = told(report, "comparing", passes * sum(lazy.nbytes for lazy in back.tensors.values()))

    def of(config: ModelConfig, named: Mapping[str, Lazy]) -> torch.Tensor:
        return logits(config, named, tokens.ids, dtype, progress)

    pairs = twins(back.tensors, tensors, source.config.vocab_size)
    written = of(back.config, {**back.tensors, **pairs})
    odd = sorted({*different(pairs.values()), *(back.tensors.keys() ^ tensors.keys())})
    return Computed(
        tokens,
        dtype,
        source=of(source.config, tensors) if odd else written,
        written=written,
        compared=len(pairs),
        different=tuple(odd),
        unrounded=of(source.config, weights) if changed else None,
        theirs=ask_transformers(back.folder, back.config, tokens.ids, tokenizer if back.tokenizer else None)
        if back.kind == "huggingface"
        else None,
    )


def _loses(old: torch.dtype, new: torch.dtype) -> bool:
    return torch.promote_types(old, new) != new


def told(report: Report, what: str, total: int) -> Progress:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        report(what, min(done, total), total)

    return progress
