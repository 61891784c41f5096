"""Megalith: pretrain, tune, evaluate and serve GPT, BERT, T5 and BART, on one process or on many, by one config."""

__version__ = "0.1.0"
