"""What every tensor that still lies in files can say and do, whichever format wrote it."""

from __future__ import annotations

from typing import Protocol

import torch


class Lazy(Protocol):
    """A tensor that is read only when asked. `dtype` and `shape` are known without reading."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...

    def read(self) -> torch.Tensor:
        """The whole tensor, in host memory."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dim."""
        ...
