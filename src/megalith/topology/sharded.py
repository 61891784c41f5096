"""Is a tensor shared between processes? Asked without importing DTensor, which with the symbolic algebra that it brings is a
second in the start of every process, and one process has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: torch.Tensor | None) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, of which this process holds a part. Not for compiled graphs, whose tensors have no such attribute."""
    return hasattr(tensor, "to_local")
