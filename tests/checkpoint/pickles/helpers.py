"""Compares what was saved with what is read of it."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from megalith.checkpoint.pickles.stub import Stub


def raw(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor's values, bit by bit comparable whatever the dtype."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).tolist()


def assert_same(saved: Any, read: Any) -> None:
    """Types, order and values, tensors bit by bit."""
    if isinstance(saved, torch.Tensor):
        assert (saved.dtype, tuple(saved.shape)) == (read.dtype, read.shape)
        assert read.nbytes == saved.numel() * saved.element_size()
        assert raw(saved) == raw(read.read())
        if saved.dim() and len(saved):
            for rows in ((0, 1), (len(saved) // 2, len(saved)), (1, 1)):
                assert raw(saved[slice(*rows)]) == raw(read.rows(*rows))
    elif isinstance(saved, argparse.Namespace):
        assert isinstance(read, Stub)
        assert (read.module, read.name) == ("argparse", "Namespace")
        assert_same(vars(saved), read.state)
    elif isinstance(saved, np.ndarray):
        assert (read.dtype, read.shape) == (saved.dtype, saved.shape)
        assert np.array_equal(read, saved)
    elif isinstance(saved, dict):
        assert isinstance(read, dict)
        assert list(saved) == list(read)
        for key, value in saved.items():
            assert_same(value, read[key])
    elif isinstance(saved, (list, tuple)):
        assert isinstance(read, list if isinstance(saved, list) else tuple)
        assert len(saved) == len(read)
        for one, other in zip(saved, read, strict=True):
            assert_same(one, other)
    elif isinstance(saved, np.generic):
        assert (type(read), read) == (type(saved.item()), saved.item())
    else:
        assert (type(read), read) == (type(saved), saved)
