"""Megalith: pretrain, tune, evaluate and serve GPT, BERT, T5 and BART, on one process or on many, by one config."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`megalith.load`, found when it is asked for: importing the package imports no torch."""
    if name == "load":
        return importlib.import_module("megalith.api").load
    raise AttributeError(f"module 'megalith' has no attribute {name!r}")
