"""What another program makes of a folder that was written: transformers, where it is installed and the model is small enough.

Knows transformers by name alone: it is no requirement, and is imported here only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalith.checkpoint.convert.passage import PASSAGE
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig, num_parameters
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.tokenizers.base import Tokenizer

MOST = 512 << 20
"""Bytes of fp32 weights up to which a second program may hold the whole model: beyond, a conversion would take the memory it saves."""

LOADERS: Mapping[type[ModelConfig], str] = {
    BertConfig: "AutoModelForPreTraining",
    EncoderDecoderConfig: "AutoModelForSeq2SeqLM",
    ModelConfig: "AutoModelForCausalLM",
}
"""The class of transformers that loads a model with its heads; the first that a config is of."""


@dataclass(frozen=True)
class Theirs:
    """`logits` (T, V) of `reader`; `tokenizer`: what its tokenizer made of the passage."""

    reader: str
    logits: torch.Tensor
    tokenizer: str


def ask_transformers(
    folder: Path, config: ModelConfig, ids: torch.Tensor, tokenizer: Tokenizer | None
) -> Theirs | None:
    """transformers' logits of a folder, in fp32; None where it is not installed or the model is too large for it."""
    if importlib.util.find_spec("transformers") is None or 4 * num_parameters(config) > MOST:
        return None
    theirs: Any = importlib.import_module("transformers")
    with _quiet(theirs), torch.no_grad():
        loader = getattr(theirs, next(name for kind, name in LOADERS.items() if isinstance(config, kind)))
        model = loader.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        ).eval()
        both = {"decoder_input_ids": ids[None]} if isinstance(config, EncoderDecoderConfig) else {}
        out = model(ids[None], **both)
        logits = (out.prediction_logits if "prediction_logits" in out else out.logits)[0]
        said = _tokenizer(theirs, folder, tokenizer)
    return Theirs(f"transformers {theirs.__version__}", logits, said)


def _tokenizer(theirs: Any, folder: Path, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "none was written"
    own = theirs.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    same = own(PASSAGE, add_special_tokens=False)["input_ids"] == tokenizer.encode(PASSAGE)
    return "the same tokens" if same else "other tokens"


@contextmanager
def _quiet(theirs: Any) -> Iterator[None]:
    """Neither bars nor warnings of another program in this one's output."""
    logging = theirs.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
