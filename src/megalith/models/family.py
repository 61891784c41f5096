"""Which class and which config make a model of a family: how a checkpoint says what it holds, and is understood again.

state.json: {"architecture": {"family": "gpt", "config": {…the fields of ModelConfig…}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from megalith.errors import CheckpointError
from megalith.models.bert import Bert
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec import EncoderDecoder
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.gpt import GPT

ARCHITECTURE = "architecture"
"""Key of a checkpoint's state."""

FAMILIES: Mapping[str, tuple[type[nn.Module], type[ModelConfig]]] = {
    "gpt": (GPT, ModelConfig),
    "bert": (Bert, BertConfig),
    "t5": (EncoderDecoder, EncoderDecoderConfig),
    "bart": (EncoderDecoder, EncoderDecoderConfig),
}


def class_of(config: ModelConfig) -> type[nn.Module]:
    """The class that a config describes a model of."""
    return next(model for model, kind in FAMILIES.values() if kind is type(config))


def describe(family: str, config: ModelConfig) -> dict[str, Any]:
    """What a checkpoint's state says of its model: plain JSON."""
    return {ARCHITECTURE: {"family": family, "config": config.model_dump(mode="json")}}


def understand(state: Mapping[str, Any], *, where: str) -> tuple[type[nn.Module], ModelConfig]:
    """Class and config from a checkpoint's state. Errors: `CheckpointError` naming `where` and what is wrong."""
    entry = state.get(ARCHITECTURE)
    if not isinstance(entry, Mapping) or not {"family", "config"} <= entry.keys():
        raise CheckpointError("its state does not say what model it holds", where=where)
    if entry["family"] not in FAMILIES:
        raise CheckpointError(
            f"it holds a model of the family {entry['family']!r}, this version knows {', '.join(FAMILIES)}",
            where=where,
            fix="use a newer Megalith",
        )
    model_class, config_class = FAMILIES[entry["family"]]
    try:
        return model_class, config_class(**entry["config"])
    except (ValidationError, TypeError) as error:
        raise CheckpointError(f"its architecture cannot be understood: {error}", where=where) from None
