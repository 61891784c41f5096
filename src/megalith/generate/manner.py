"""What stands around the texts of a checkpoint: before and behind a prompt, at a decoder's beginning, at a text's end.

    trained here, or by Megatron     the samples' own manner: nothing around a prompt, a decoder begins with [BOS]
    from transformers                what the tokenizer's template adds; T5's decoder begins with <pad>, BART's with </s>, and
                                     its first word is forced to be <s>

BERT's texts are [CLS] … [SEP] everywhere. A checkpoint's state may say of its decoder: {"decoding": {"start": [ids], "first":
id or null, "last": id or null}}; of a whole model that was tuned, or with LoRA in it, what its texts began with:
{"tuning": {"before": [ids]}}.
Knows ids and families; reads no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalith.errors import ConfigError, DataError, Problem
from megalith.generate.engine import Forced
from megalith.models.family import ARCHITECTURE
from megalith.tokenizers.base import Tokenizer

Ids = tuple[int, ...]
DECODING, TUNED = "decoding", "tuning"
"""Keys of a checkpoint's state."""
NAMES = {
    "bos": "begin-of-sequence",
    "eos": "end-of-sequence",
    "cls": "[CLS]",
    "sep": "[SEP]",
    "pad": "padding",
}


@dataclass(frozen=True)
class Manner:
    """`before` and `behind` a prompt; what a decoder's row begins with (`start`) and must hold (`forced`); `eod` ends a text."""

    before: Ids = ()
    behind: Ids = ()
    start: Ids = ()
    eod: int | None = None
    forced: Forced = (None, None)


def family_of(state: Mapping[str, Any]) -> str:
    """The family that a checkpoint's state names."""
    return str((state.get(ARCHITECTURE) or {}).get("family", "gpt"))


def manner_of(state: Mapping[str, Any], tokenizer: Tokenizer, bos: bool | None = None) -> Manner:
    """That of a checkpoint with this state and tokenizer. `bos`: is a GPT's prompt begun with that token? None: as it was trained.

    Errors: `DataError` where the tokenizer lacks a token, `ConfigError` for `bos` of another family.
    """
    family, around = family_of(state), ((), ()) if "data_plan" in state else tokenizer.around
    if bos is not None and family != "gpt":
        problem = Problem(
            "--bos, --no-bos", f"is a GPT's; this checkpoint is a {family.upper()}", "leave it out"
        )
        raise ConfigError([problem])
    usual = tuple((state.get(TUNED) or {}).get("before", around[0]))
    if family == "gpt":
        before = usual if bos is None else (_id(tokenizer, "bos", "--bos asks for"),) * bos
        return Manner(before=before, eod=tokenizer.eod)
    if family == "bert":
        before, behind = (_id(tokenizer, role, "BERT's texts stand in") for role in ("cls", "sep"))
        return Manner((before,), (behind,))
    said = state.get(DECODING) or {}
    if "start" in said and "data_plan" not in state:
        start, forced = tuple(said["start"]), (said.get("first"), said.get("last"))
    else:
        start, forced = _decoder(family, tokenizer, taught=any(around))
    return Manner(usual, around[1], start, _id(tokenizer, "eos", "a decoder ends with"), forced)


def _decoder(family: str, tokenizer: Tokenizer, *, taught: bool) -> tuple[Ids, Forced]:
    """How a decoder's rows begin. `taught`: by transformers' code, which puts tokens around the prompt, too."""
    what = f"a {family.upper()}'s decoder begins with"
    if not taught:
        return (_id(tokenizer, "bos", what),), (None, None)
    if family == "t5":
        return (_id(tokenizer, "pad", what),), (None, None)
    eos = _id(tokenizer, "eos", what)
    return (eos,), (_id(tokenizer, "bos", what), eos)


def _id(tokenizer: Tokenizer, role: str, why: str) -> int:
    found = tokenizer.special.get(role)
    if found is None:
        raise DataError(
            f"the tokenizer has no {NAMES[role]} token, which {why}",
            where="tokenizer",
            fix="give --tokenizer: that of the model's training",
        )
    return found
