"""Megalith: pretrain, tune, evaluate and serve GPT, BERT, T5 and BART, on one process or on many, by one config."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


_FACES = {
    **dict.fromkeys(("load", "use_prompts"), "megalith.api"),
    **dict.fromkeys(("GPTModel", "BertModel", "T5Model", "BARTModel"), "megalith.nemo.models"),
    **dict.fromkeys(("Trainer", "exp_manager"), "megalith.nemo.trainer"),
}
"""Name → the module that has it."""


def __getattr__(name: str) -> Any:
    """`megalith.load`, `megalith.GPTModel` and their like, found when they are asked for: importing the package imports no torch."""
    if name in _FACES:
        return getattr(importlib.import_module(_FACES[name]), name)
    raise AttributeError(f"module 'megalith' has no attribute {name!r}")
